"""Pickles as trainers save them, and malicious ones: nothing in a file is ever imported or run."""

import argparse
import builtins
import collections
import enum
import functools
import io
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoints.pickles import as_state_dict, load_pickle
from export.checkpoints.weights import open_weights
from tests.export.checkpoints.state_dicts import assert_same, error_of

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.float16)}
TRAINER = "a_trainer.callbacks"


class Attack:
    """A pickle that creates a file when it is loaded by a careless reader."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Call:
    """A pickle that calls a function when it is loaded by a careless reader."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def trainer(monkeypatch):
    """The classes of a trainer that is not installed where the file is read; call it to uninstall it."""
    module = types.ModuleType(TRAINER)
    for name, bases in (("ModelCheckpoint", ()), ("Config", (dict,)), ("Stage", (enum.Enum,))):
        members = {"FIT": "fit"} if bases == (enum.Enum,) else {}
        made = enum.Enum(name, members) if members else type(name, bases, {})
        made.__module__ = TRAINER
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "a_trainer", types.ModuleType("a_trainer"))
    monkeypatch.setitem(sys.modules, TRAINER, module)
    module.uninstall = lambda: (sys.modules.pop(TRAINER), sys.modules.pop("a_trainer"))
    return module


def config_of(trainer):
    """A dictionary of a class of its own, which has attributes as well."""
    config = trainer.Config(lr=1e-4)
    config.frozen = True
    return config


LEFTOVERS = {
    "class as a key": lambda t: {"callbacks": {t.ModelCheckpoint: {"best_model_score": np.float32(0.1)}}},
    "object": lambda t: {"callbacks": t.ModelCheckpoint()},
    "enum": lambda t: {"stage": {t.Stage.FIT: 1}},
    "dictionary of a class": lambda t: {"hyper_parameters": config_of(t)},
    "NumPy's numbers": lambda t: {"global_step": np.int64(5), "loss": np.float64(0.5)},
    "NumPy's dtype and array": lambda t: {"dtype": np.dtype("float16"), "history": np.arange(3.0)},
    "arguments": lambda t: {"args": argparse.Namespace(path=Path("/data"), lr=1e-4, device=torch.device("cpu"))},
    "containers": lambda t: {"meters": collections.deque([1.0], 10), "log": collections.defaultdict(list, {"a": [1]})},
    "bytes of a picture": lambda t: {"sample": io.BytesIO(b"\x89PNG")},
    "partial": lambda t: {"schedule": functools.partial(t.ModelCheckpoint, 3), "sizes": frozenset({1, 2})},
    "types and bytes": lambda t: {"hyper_parameters": {"type": float, "none": type(None), "bytes": b"123"}},
    "optimizer": lambda t: {
        "optimizer_states": [{"state": {0: {"step": np.int64(3), "exp_avg": torch.ones(2)}}, "param_groups": [{}]}]
    },
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", LEFTOVERS)
def test_training_leftovers_are_neither_imported_nor_in_the_way(tmp_path, trainer, kind, zipped):
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": TENSORS, **LEFTOVERS[kind](trainer)}, path, _use_new_zipfile_serialization=zipped)
    trainer.uninstall()
    before = torch.serialization.get_safe_globals()
    assert_same(open_weights(path).read(TENSORS), TENSORS)
    assert TRAINER not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_module_beside_the_weights(tmp_path):
    path = tmp_path / "run.ckpt"
    data = {"state_dict": TENSORS, "hyper_parameters": {"loss": torch.nn.L1Loss()}}
    torch.save(data, path)
    assert_same(open_weights(path).read(TENSORS), TENSORS)
    # The older format keeps a module's source code, which PyTorch's reader refuses.
    torch.save(data, path, _use_new_zipfile_serialization=False)
    assert "torch.nn.modules.loss.L1Loss" in error_of(open_weights, path)


CODE = {
    "os.system": lambda marker: Call(os.system, f"mkdir {marker}"),
    "builtins.eval": lambda marker: Call(builtins.eval, f"__import__('os').mkdir({str(marker)!r})"),
    "builtins.exec": lambda marker: Call(builtins.exec, f"import os; os.mkdir({str(marker)!r})"),
    "builtins.getattr": lambda marker: Call(getattr, Path(marker), "mkdir"),
    "subprocess": lambda marker: Call(subprocess.check_output, ["mkdir", str(marker)]),
    "functools.reduce": lambda marker: Call(functools.reduce, os.mkdir, [str(marker)]),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", CODE)
def test_code_beside_the_weights_is_refused(tmp_path, what, zipped):
    path, marker = tmp_path / "evil.ckpt", tmp_path / "ran"
    data = {"state_dict": TENSORS, "step": np.int64(3), "callbacks": CODE[what](marker)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    message = error_of(open_weights, path)
    assert not marker.exists()
    assert "contains code" in message
    assert what.removeprefix("os.") in message
    assert "take the .safetensors of the same model" in message


def test_what_cannot_be_read_says_how_to_convert_it(tmp_path, trainer):
    """A protocol that PyTorch's reader does not know, with a class that is no function to run code."""
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": TENSORS, "callbacks": trainer.ModelCheckpoint}, path, pickle_protocol=4)
    message = error_of(open_weights, path)
    assert f"{TRAINER}.ModelCheckpoint" in message
    assert "weights_only=False" in message
    assert "save_file" in message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_other_protocols_are_named(tmp_path, protocol, zipped):
    """The second tensor's type is named by references to what the pickle has had before."""
    path = tmp_path / "x.ckpt"
    tensors = {**TENSORS, "c.weight": torch.ones(2, dtype=torch.float16), "d": torch.ones(3, dtype=torch.float64)}
    torch.save({"state_dict": tensors}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = error_of(open_weights, path)
    assert f"{path} is pickled with protocol {protocol}, which" in message
    assert "torch.save in its default protocol" in message
    assert ("weights_only=False" in message) == (protocol > 0)
    path.write_bytes(path.read_bytes()[:200])
    assert "truncated" in error_of(open_weights, path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_weights_of_pythons_own_pickle(tmp_path, protocol):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(TENSORS, protocol=protocol))
    message = error_of(open_weights, path)
    assert "was written with Python's pickle, not with torch.save" in message
    assert "pickle.load, then" in message


def test_text_is_no_pickle(tmp_path):
    path = tmp_path / "x.pt"
    for text in (b".", b"N.", b"not a pickle.", b"\x80\x04."):
        path.write_bytes(text)
        assert error_of(open_weights, path) == f"{path} is truncated, corrupt or not a PyTorch file"


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_without_values(tmp_path, zipped):
    path = tmp_path / "x.bin"
    data = {**TENSORS, "c.weight": torch.ones(2, device="meta")}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    assert error_of(open_weights, path) == f"{path}: c.weight has no values: it was saved from the meta device"


def test_a_dictionary_inside_itself(tmp_path):
    data = {}
    data["state_dict"] = data
    torch.save(data, tmp_path / "x.pt")
    assert "'state_dict' is a dict" in error_of(open_weights, tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "params"])
def test_weights_beside_other_entries(tmp_path, key):
    torch.save({key: TENSORS, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "x.pt")
    assert_same(open_weights(tmp_path / "x.pt").read(TENSORS), TENSORS)


def test_entries_among_the_tensors():
    assert_same(as_state_dict({**TENSORS, "epoch": 3, "name": "mine", "best": None}, "it"), TENSORS)
    assert "'c.bias' is a int" in error_of(as_state_dict, {**TENSORS, "c.bias": 3}, "it")
    assert "sparse or quantized tensor, c" in error_of(as_state_dict, {"c": torch.eye(3).to_sparse()}, "it")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_malicious_pickle_is_not_run(tmp_path, protocol, wrapped):
    marker, path = tmp_path / "ran", tmp_path / "evil.th"
    attack = Attack(marker)
    path.write_bytes(pickle.dumps({"projectors": attack} if wrapped else attack, protocol=protocol))
    message = error_of(load_pickle, path)
    assert not marker.exists()
    assert "contains code" in message
    assert "mkdir" in message
    assert "refused" in message


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_torch_file_is_not_run(tmp_path, zipped):
    marker, path = tmp_path / "ran", tmp_path / "evil.th"
    torch.save({**TENSORS, "c": Attack(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = error_of(open_weights, path)
    assert not marker.exists()
    assert "contains code" in message
    pickle_module_ran = torch.load(path, weights_only=False)  # the attack works on a careless reader
    assert marker.exists()
    assert pickle_module_ran.keys() == {*TENSORS, "c"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pickled_module_and_torchscript_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "contains code (torch.nn.modules.linear.Linear)" in error_of(open_weights, path)
    torch.save({"a": torch.hub.load}, path)
    assert "contains code (torch.hub.load)" in error_of(open_weights, path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "contains code" in error_of(open_weights, path)


@pytest.mark.parametrize("content", [[1, 2], {"a": {"b": torch.ones(1)}}, {"a": 3}, torch.ones(2), {1: torch.ones(1)}])
def test_pickles_that_are_not_state_dicts(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    assert "state dict" in error_of(open_weights, tmp_path / "x.bin")
