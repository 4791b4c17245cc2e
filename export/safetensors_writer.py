"""Write a safetensors file one tensor at a time, so that a model of 7 billion weights is never in memory as a whole.

The `safetensors` library writes only what is in memory already. Its format is a length, a JSON header with the place
of each tensor, and the tensors' bytes; ONNX graphs refer to these places as external data.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor

# In bytes. Tensors whose size is a multiple of it also begin at one, which makes vector loads fastest.
_ALIGNMENT = 64
# The format's names of dtypes. It has none for 4-bit integers, so pairs of them are stored as bytes.
_NAMES = {
    onnx_ir.DataType.FLOAT: "F32",
    onnx_ir.DataType.FLOAT16: "F16",
    onnx_ir.DataType.BFLOAT16: "BF16",
    onnx_ir.DataType.INT8: "I8",
    onnx_ir.DataType.INT32: "I32",
    onnx_ir.DataType.INT64: "I64",
    onnx_ir.DataType.INT4: "U8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weights file; `read` returns its content, C-contiguous, and is called only when it is written."""

    name: str
    dtype: onnx_ir.DataType
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.bitwidth // 8

    @property
    def described(self) -> dict[str, Any]:
        """Dtype and shape as in the file's header."""
        shape = list(self.shape) if self.dtype is not onnx_ir.DataType.INT4 else [self.nbytes]
        return {"dtype": _NAMES[self.dtype], "shape": shape}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in a file."""

    offset: int
    length: int


def write_safetensors(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """Write tensors to a file in their order, except that sizes that are no multiple of the alignment come last.

    The write is not atomic, so write to a temporary folder if the process may be killed.

    Raises:
        ValueError: a tensor's content has another size than described, or is not contiguous.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.nbytes % _ALIGNMENT != 0)
    header, end = dict[str, Any](), 0
    for tensor in ordered:
        header[tensor.name] = {**tensor.described, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            content = tensor.read()
            if content.nbytes != tensor.nbytes or not content.flags.c_contiguous:
                raise ValueError(f"{tensor.name} has {content.nbytes} bytes, not {tensor.nbytes} contiguous bytes")
            file.write(content.reshape(-1).view("uint8").data)


def places(path: Path) -> dict[str, Place]:
    """Return where each tensor of a safetensors file is."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: Place(begin + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def as_bytes(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's content as a NumPy array; bfloat16, which NumPy lacks, as bytes."""
    tensor = tensor.detach().contiguous()
    return (tensor.reshape(-1).view(torch.uint8) if tensor.dtype is torch.bfloat16 else tensor).numpy()
