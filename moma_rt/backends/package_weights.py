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


class Weight:
    """A tensor on a device, whose memory is freed with the last network that holds this.

    The tensor itself outlives them: of one that code reads in place, PyTorch keeps a reference for ever (pull request
    194480 of its repository, later than 2.13). Only its memory can be given back.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        weakref.finalize(self, _free, tensor.untyped_storage()).atexit = False

    @property
    def is_mapped(self) -> bool:
        """Whether it lies in pages of its file, which the system takes back where memory runs short."""
        return not self.tensor.untyped_storage().resizable()


class LoadedWeights:
    """Weights on a device, which live as long as a network that reads them; those of mapped files always."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: weakref.WeakValueDictionary[tuple[Path, str, bool], Weight] = weakref.WeakValueDictionary()
        # Their mapping stays whatever is done: it is used again, so that loading in turn makes no new ones.
        self._mapped: list[Weight] = []

    def of(self, package: Path, names: Mapping[str, str], files: Sequence[Path]) -> dict[str, Weight]:
        """The weights that a package's code asks for, by its own names for them.

        Args:
            names: the module's name of each tensor, by the code's own.
            files: the network's weights files.

        Raises:
            BundleError: the files lack one of them, or have it in another dtype or shape.
        """
        wanted, own = _read(package)
        found = {name: Weight(tensor.to(self._device, copy=True)) for name, tensor in own.items()}
        asked = set(names.values())
        for file in files:
            found |= self._from_file(package, file, wanted, asked)
        missing = sorted(asked - found.keys())
        if missing:
            short_repr = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise BundleError(
                f"{package} asks for {len(missing)} weights that are not in {_spelled(files)}: {short_repr}; "
                "build the bundle again"
            )
        return {code: found[name] for code, name in names.items()}

    def _from_file(self, package: Path, file: Path, wanted: Wanted, asked: set[str]) -> dict[str, Weight]:
        found = {}
        try:
            with safe_open(file, framework="pt", device=str(self._device)) as content:
                for name in asked.intersection(content.keys()):
                    key = (file, name, wanted.channels_last)
                    weight = self._loaded.get(key) or self._new(content.get_tensor(name), wanted.channels_last)
                    kind = (str(weight.tensor.dtype).removeprefix("torch."), tuple(weight.tensor.shape))
                    if wanted.tensors.get(name, kind) != kind:
                        raise BundleError(
                            f"{package} was compiled for {name} {_kind(wanted.tensors[name])}, and {file} has it as "
                            f"{_kind(kind)}: the weights are those of another geometry or precision"
                        )
                    self._loaded[key] = found[name] = weight
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{file} cannot be read as weights: {one_line(error)}") from None
        return found

    def _new(self, tensor: torch.Tensor, channels_last: bool) -> Weight:
        if channels_last and tensor.dim() == 4:
            # The strides that the module had, of 1x1 kernels too, whose layout is both at once.
            tensor = tensor.to(memory_format=torch.channels_last)
        weight = Weight(tensor)
        if weight.is_mapped:
            self._mapped.append(weight)
        return weight


def _free(storage: torch.UntypedStorage) -> None:
    if storage.resizable():
        storage.resize_(0)


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
