"""Loading weights for inductor packages, on the host; for real packages see tests/export/test_packages.py."""

import gc
import json
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from moma_rt.backends.package_weights import CONSTANTS_MEMBER, WEIGHTS_MEMBER, LoadedWeights
from moma_rt.errors import BundleError

TENSORS = {
    "unet.conv.weight": torch.arange(72.0).reshape(2, 4, 3, 3),
    "unet.point.weight": torch.arange(8.0).reshape(2, 4, 1, 1),
    "unet.bias": torch.ones(2),
}
NAMES = {name.replace(".", "_"): name for name in TENSORS}


@pytest.fixture
def files(tmp_path):
    """A package's notes, for both layouts of convolutions, and a weights file."""
    kinds = {name: ["float32", list(tensor.shape)] for name, tensor in TENSORS.items()}
    for layout in (False, True):
        with zipfile.ZipFile(tmp_path / f"{layout}.pt2", "w") as archive:
            archive.writestr(WEIGHTS_MEMBER, json.dumps({"channels_last": layout, "tensors": kinds}))
            archive.writestr(CONSTANTS_MEMBER, save({"lifted_tensor_0": torch.tensor(7)}))
    save_file(TENSORS, tmp_path / "weights.safetensors")
    return tmp_path


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_are_laid_out_as_the_package_wants_them(files, channels_last):
    loaded = LoadedWeights(torch.device("cpu"))
    found = loaded.load(files / f"{channels_last}.pt2", NAMES, [files / "weights.safetensors"])
    for name, side in (("unet_conv_weight", 3), ("unet_point_weight", 1)):
        module = torch.nn.Conv2d(4, 2, side, device="meta")
        wanted = module.to(memory_format=torch.channels_last) if channels_last else module
        assert found[name].tensor.stride() == wanted.weight.stride(), name
    for code, name in NAMES.items():
        assert torch.equal(found[code].tensor, TENSORS[name])


def test_two_networks_share_one_copy(files):
    loaded, weights = LoadedWeights(torch.device("cpu")), [files / "weights.safetensors"]
    first, second = (loaded.load(files / "False.pt2", NAMES, weights) for _ in range(2))
    assert all(first[name] is second[name] for name in NAMES)
    other = loaded.load(files / "True.pt2", NAMES, weights)
    assert other["unet_conv_weight"] is not first["unet_conv_weight"], "another layout is another copy"
    memory = other["unet_conv_weight"].tensor.untyped_storage()
    del other
    gc.collect()
    assert memory.nbytes() == 0, "a copy of its own is given back with the last network that reads it"
    assert torch.equal(first["unet_conv_weight"].tensor, TENSORS["unet.conv.weight"])


def test_tensors_of_the_code_come_with_it(files):
    names = {**NAMES, "constant": "lifted_tensor_0"}
    found = LoadedWeights(torch.device("cpu")).load(files / "False.pt2", names, [files / "weights.safetensors"])
    assert found["constant"].tensor == 7
    with pytest.raises(BundleError, match=r"asks for 1 weights .*: unet\.gone; build the bundle again"):
        LoadedWeights(torch.device("cpu")).load(
            files / "False.pt2", {**names, "gone": "unet.gone"}, [files / "weights.safetensors"]
        )
