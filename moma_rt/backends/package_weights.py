"""The weights of inductor's packages: read from the bundle's files, and loaded once for all networks."""

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

# Files that a build adds to a package: a list of the weights that it may read, and the constants of its code.
WEIGHTS_MEMBER, CONSTANTS_MEMBER = "moma/weights.json", "moma/constants.safetensors"
# Raised on reading a file that is not a package.
PACKAGE_ERRORS = (zipfile.BadZipFile, StopIteration, ValueError, AttributeError, EOFError, KeyError, TypeError)
_MAX_LISTED = 3


@dataclass(frozen=True)
class WeightSpecs:
    """The weights that a package reads: dtype and shape by name, and whether convolutions are channels-last."""

    channels_last: bool
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class Weight:
    """A tensor on a device, whose memory is freed with the last network that uses it.

    The tensor object is never freed: PyTorch keeps a reference to each tensor that code reads in place (pull request
    194480 of its repository, later than 2.13). Only its storage can be freed.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        weakref.finalize(self, _free, tensor.untyped_storage()).atexit = False

    @property
    def is_mapped(self) -> bool:
        """Whether it is memory-mapped from its file, so that the system can reclaim its pages."""
        return not self.tensor.untyped_storage().resizable()


class LoadedWeights:
    """A cache of weights on a device. Weights are freed with the last network that uses them; mapped ones stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: weakref.WeakValueDictionary[tuple[Path, str, bool], Weight] = weakref.WeakValueDictionary()
        # A mapping cannot be freed, so it is reused: loading a network again creates no new one.
        self._mapped: list[Weight] = []

    def load(self, package: Path, names: Mapping[str, str], files: Sequence[Path]) -> dict[str, Weight]:
        """Load the weights that a package's code reads, by the code's names for them.

        Args:
            names: the module's name of each tensor, by the code's name.
            files: the network's weights files.

        Raises:
            BundleError: a tensor is missing in the files, or has another dtype or shape there.
        """
        wanted, constants = _read(package)
        found = {name: Weight(tensor.to(self._device, copy=True)) for name, tensor in constants.items()}
        asked = set(names.values())
        for file in files:
            found |= self._from_file(package, file, wanted, asked)
        missing = sorted(asked - found.keys())
        if missing:
            listed = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
            raise BundleError(
                f"{package} asks for {len(missing)} weights that are not in {_format_paths(files)}: {listed}; "
                "build the bundle again"
            )
        return {code: found[name] for code, name in names.items()}

    def _from_file(self, package: Path, file: Path, wanted: WeightSpecs, asked: set[str]) -> dict[str, Weight]:
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
                            f"{_kind(kind)}: the weights have another geometry or precision"
                        )
                    self._loaded[key] = found[name] = weight
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{file} cannot be read as weights: {one_line(error)}") from None
        return found

    def _new(self, tensor: torch.Tensor, channels_last: bool) -> Weight:
        if channels_last and tensor.dim() == 4:
            # The module's strides, also for 1x1 kernels, which have the same memory layout either way.
            tensor = tensor.to(memory_format=torch.channels_last)
        weight = Weight(tensor)
        if weight.is_mapped:
            self._mapped.append(weight)
        return weight


def _free(storage: torch.UntypedStorage) -> None:
    if storage.resizable():
        storage.resize_(0)


def _read(package: Path) -> tuple[WeightSpecs, dict[str, torch.Tensor]]:
    """Read which weights a package needs, and the constants of its code.

    Raises:
        BundleError: the package does not contain them.
    """
    try:
        with zipfile.ZipFile(package) as archive:
            specs = json.loads(archive.read(WEIGHTS_MEMBER))
            constants = load(archive.read(CONSTANTS_MEMBER))
        tensors = {str(name): (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in specs["tensors"].items()}
        return WeightSpecs(bool(specs["channels_last"]), tensors), constants
    except (OSError, SafetensorError, *PACKAGE_ERRORS) as error:
        raise not_a_package(package, error) from None


def not_a_package(path: Path, error: Exception) -> BundleError:
    """The error for a file that is not a package of this project's builds."""
    return BundleError(f"{path} is not an inductor package: {one_line(error) or type(error).__name__}")


def _kind(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def _format_paths(files: Sequence[Path]) -> str:
    return " or ".join(str(file) for file in files) or "the bundle"
