"""The weights of inductor's packages: read from the bundle's files, and on the device once for all networks."""

import json
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from moma_rt.errors import BundleError
from moma_rt.messages import one_line

# What a build adds to a package: which weights it may ask for, and the tensors that are part of its code.
WEIGHTS_MEMBER, CONSTANTS_MEMBER = "moma/weights.json", "moma/constants.safetensors"
# What reading a file that is no package raises.
NOT_A_PACKAGE = (zipfile.BadZipFile, StopIteration, ValueError, AttributeError, EOFError, KeyError, TypeError)
_SHOWN = 3


@dataclass(frozen=True)
class Wanted:
    """What a package says of its weights: dtype and shape by name, and whether convolutions' channels come last."""

    channels_last: bool
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class LoadedWeights:
    """Weights on a device, which live as long as a network that reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: weakref.WeakValueDictionary[tuple[Path, str, bool], torch.Tensor] = weakref.WeakValueDictionary()

    def of(self, package: Path, names: Mapping[str, str], files: Sequence[Path]) -> dict[str, torch.Tensor]:
        """The tensors that a package's code asks for, by its own names for them.

        Args:
            names: the module's name of each tensor, by the code's own.
            files: the network's weights files.

        Raises:
            BundleError: the files lack one of them, or have it in another dtype or shape.
        """
        wanted, own = _read(package)
        found = {name: tensor.to(self._device) for name, tensor in own.items()}
        asked = set(names.values())
        for file in files:
            found |= self._from_file(package, file, wanted, asked)
        missing = sorted(asked - found.keys())
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise BundleError(
                f"{package} asks for {len(missing)} weights that are not in {_spelled(files)}: {shown}; "
                "build the bundle again"
            )
        return {code: found[name] for code, name in names.items()}

    def _from_file(self, package: Path, file: Path, wanted: Wanted, asked: set[str]) -> dict[str, torch.Tensor]:
        found = {}
        try:
            with safe_open(file, framework="pt", device=str(self._device)) as content:
                for name in asked.intersection(content.keys()):
                    key = (file, name, wanted.channels_last)
                    tensor = self._loaded.get(key)
                    if tensor is None:
                        tensor = content.get_tensor(name)
                        if wanted.channels_last and tensor.dim() == 4:
                            tensor = tensor.contiguous(memory_format=torch.channels_last)
                    kind = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                    if wanted.tensors.get(name, kind) != kind:
                        raise BundleError(
                            f"{package} was compiled for {name} {_kind(wanted.tensors[name])}, and {file} has it as "
                            f"{_kind(kind)}: the weights are those of another geometry or precision"
                        )
                    self._loaded[key] = found[name] = tensor
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{file} cannot be read as weights: {one_line(error)}") from None
        return found


def _read(package: Path) -> tuple[Wanted, dict[str, torch.Tensor]]:
    """What a package says of its weights, and its own tensors.

    Raises:
        BundleError: it says nothing of them.
    """
    try:
        with zipfile.ZipFile(package) as archive:
            said = json.loads(archive.read(WEIGHTS_MEMBER))
            own = load(archive.read(CONSTANTS_MEMBER))
        tensors = {str(name): (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in said["tensors"].items()}
        return Wanted(bool(said["channels_last"]), tensors), own
    except (OSError, SafetensorError, *NOT_A_PACKAGE) as error:
        raise no_package(package, error) from None


def no_package(path: Path, error: Exception) -> BundleError:
    """What is wrong with a file that is no package of this project's builds."""
    return BundleError(f"{path} is no package of inductor: {one_line(error) or type(error).__name__}")


def _kind(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def _spelled(files: Sequence[Path]) -> str:
    return " or ".join(str(file) for file in files) or "the bundle"
