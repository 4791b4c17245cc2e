"""The TensorRT-RTX probe without a GPU: its model, its report, and its builds for other devices."""

import json

import pytest
import torch

from benchmarks.gpu import rtx_probe
from benchmarks.gpu.rtx_probe import described, main, model, tried
from moma_rt.errors import MomaError


def test_a_missing_library_is_no_failure(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(rtx_probe.importlib, "import_module", missing)
    assert main(["--carried", str(tmp_path), "--work", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("TensorRT-RTX was not packed")


@pytest.mark.slow
def test_the_model_and_its_pytorch_reference_agree():
    onnxruntime = pytest.importorskip("onnxruntime")
    proto, reference = model()
    for tensor in (*proto.graph.input, *proto.graph.output):
        assert tensor.type.tensor_type.elem_type == rtx_probe.TensorProto.FLOAT16
    x = torch.randn(2, 320, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": x.numpy()})
    wanted = reference(x)
    assert (torch.from_numpy(found).float() - wanted).norm() / wanted.norm() < 2e-2


def test_a_refusal_is_a_result():
    def refuse():
        raise MomaError("the engine cannot be loaded on this GPU")

    found = tried(refuse)
    assert found == {"refused": "MomaError: the engine cannot be loaded on this GPU"}
    assert described(found).startswith("refused (MomaError: the engine")
    ran = {"bytes": 1, "ms": 0.5, "relative_error": 1e-3, "graph": {"refused": "x"}}
    assert described(ran) == "0.500 ms, error 1.0e-03, no graph"


@pytest.mark.tensorrt
@pytest.mark.slow
def test_engines_are_built_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("MOMA_RT_RESULTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--carried", str(tmp_path), "--work", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "rtx_probe.json").read_text())
    by_name = {case["capability"]: case for case in found["cases"]}
    assert by_name["SM89"]["bytes"] > 1000
    assert by_name["SM120"]["bytes"] > 1000
