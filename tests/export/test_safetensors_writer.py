"""Files of the streaming writer, read back by the `safetensors` library."""

import gc
import json
import weakref

import numpy as np
import onnx_ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.quantize import packed_int4
from export.safetensors_writer import StoredTensor, as_bytes, places, write_safetensors

TORCH = {
    torch.float32: onnx_ir.DataType.FLOAT,
    torch.float16: onnx_ir.DataType.FLOAT16,
    torch.bfloat16: onnx_ir.DataType.BFLOAT16,
    torch.int8: onnx_ir.DataType.INT8,
    torch.int32: onnx_ir.DataType.INT32,
    torch.int64: onnx_ir.DataType.INT64,
}
SHAPES = [(), (1,), (3,), (63,), (64,), (5, 111), (2, 3, 3, 3), (0,), (4, 0)]
ALIGNMENT = 64


def stored(name: str, tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(name, TORCH[tensor.dtype], tuple(tensor.shape), lambda: as_bytes(tensor))


def some_tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype and shape, with values of both signs."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}{list(shape)}".removeprefix("torch."): torch.randint(-99, 99, shape, generator=generator).to(dtype)
        for dtype in TORCH
        for shape in SHAPES
    }


def test_the_library_reads_every_dtype_and_shape(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "w", (stored(name, tensor) for name, tensor in tensors.items()))
    found = load_file(tmp_path / "w")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


def test_nan_infinity_and_negative_zero_keep_their_bits(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        write_safetensors(tmp_path / "w", [stored("x", values.to(dtype))])
        found = load_file(tmp_path / "w")["x"]
        assert bytes(as_bytes(found)) == bytes(as_bytes(values.to(dtype)))


def test_four_bit_integers_are_pairs_in_bytes(tmp_path):
    values = np.random.default_rng(0).integers(-8, 8, (6, 5), np.int8)
    packed = packed_int4(values)
    write_safetensors(tmp_path / "w", [StoredTensor("x", onnx_ir.DataType.INT4, (6, 5), lambda: packed)])
    found = load_file(tmp_path / "w")["x"].numpy()
    assert (found.dtype, found.shape) == (np.uint8, (15,))
    low, high = (found & 0xF).astype(np.int8), (found >> 4).astype(np.int8)
    pairs = np.stack([low, high], 1).reshape(6, 5)
    np.testing.assert_array_equal((pairs ^ 8) - 8, values)


def test_the_library_lists_an_empty_file(tmp_path):
    write_safetensors(tmp_path / "w", [])
    with safe_open(tmp_path / "w", framework="np") as content:
        assert list(content.keys()) == []
    assert places(tmp_path / "w") == {}


def test_places_are_those_of_the_bytes(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "w", [stored(name, tensor) for name, tensor in tensors.items()])
    content, found = (tmp_path / "w").read_bytes(), places(tmp_path / "w")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        place = found[name]
        assert content[place.offset : place.offset + place.length] == as_bytes(tensor).tobytes(), name
    assert len(content) == max(place.offset + place.length for place in found.values())


def test_places_of_a_file_that_the_library_wrote(tmp_path):
    """With metadata, and with its own order."""
    tensors = {"b": torch.arange(5, dtype=torch.float16), "a": torch.arange(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "w", metadata={"format": "pt"})
    content = (tmp_path / "w").read_bytes()
    assert {n: content[p.offset : p.offset + p.length] for n, p in places(tmp_path / "w").items()} == {
        name: as_bytes(tensor).tobytes() for name, tensor in tensors.items()
    }


def test_tensors_begin_at_multiples_of_64_where_possible(tmp_path):
    sizes = {"odd": (63,), "even": (64,), "one": (), "matrix": (16, 3), "small": (8,), "other": (65, 2)}
    tensors = [stored(name, torch.zeros(shape)) for name, shape in sizes.items()]
    write_safetensors(tmp_path / "w", tensors)
    found = places(tmp_path / "w")
    # 8 floats are 32 bytes: after such a tensor nothing is aligned, so these come last.
    aligned = {name for name, shape in sizes.items() if 4 * np.prod(shape, dtype=int) % ALIGNMENT == 0}
    assert aligned == {"even", "matrix"}
    assert all(found[name].offset % ALIGNMENT == 0 for name in aligned)
    ends = [found[name].offset for name in sizes if name not in aligned]
    assert min(ends) > max(found[name].offset for name in aligned)
    assert ends == sorted(ends), "in their order otherwise"


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read():
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        array = np.zeros(1000, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_safetensors(tmp_path / "w", [StoredTensor(str(n), onnx_ir.DataType.FLOAT, (1000,), read) for n in range(5)])
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((3, 2), np.float32), "x has 24 bytes, not 48 contiguous bytes"),
        (np.zeros((3, 4), np.float64), "x has 96 bytes, not 48 contiguous bytes"),
        (np.zeros((4, 3), np.float32).T, "x has 48 bytes, not 48 contiguous bytes"),
    ],
    ids=["size", "dtype", "order"],
)
def test_content_that_does_not_match_its_shape_and_dtype(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        write_safetensors(tmp_path / "w", [StoredTensor("x", onnx_ir.DataType.FLOAT, (3, 4), lambda: content)])


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(KeyError):
        write_safetensors(tmp_path / "w", [StoredTensor("x", onnx_ir.DataType.COMPLEX64, (1,), lambda: np.zeros(1))])
    assert not (tmp_path / "w").exists()


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in "ab":
        write_safetensors(tmp_path / name, [stored(n, tensor) for n, tensor in some_tensors().items()])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = (tmp_path / "a").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert (8 + length) % ALIGNMENT == 0
    assert list(json.loads(header[8 : 8 + length])) == list(places(tmp_path / "a"))
