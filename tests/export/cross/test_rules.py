from types import SimpleNamespace

import pytest
import torch
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties

from export.cross import rules
from export.cross.rules import choose, install, look_up
from moma_rt.errors import BundleError


def config(**kwargs):
    return SimpleNamespace(kwargs=kwargs)


@pytest.mark.parametrize(
    ("configs", "chosen"),
    [
        ([{"XBLOCK": 256}], 0),
        ([{"XBLOCK": 256}, {"XBLOCK": 128}], 0),
        ([{"XBLOCK": 1, "R0_BLOCK": 512}, {"XBLOCK": 8, "R0_BLOCK": 512}, {"XBLOCK": 32, "R0_BLOCK": 64}], 1),
        ([{"XBLOCK": 1}, {"XBLOCK": 8}], 1),
        # Two-dimensional blocks are those of pointwise kernels.
        ([{"XBLOCK": 32, "YBLOCK": 32}, {"XBLOCK": 8, "YBLOCK": 64}], 0),
        ([{"BLOCK_QUERIES": 64}], 0),
    ],
)
def test_the_chosen_configuration(configs, chosen):
    configs = [config(**kwargs) for kwargs in configs]
    assert choose(configs) is configs[chosen]


def test_this_pytorch_has_everything_that_cross_compiling_uses():
    """Fails when a version of PyTorch renames something; `rules.py` must then be adapted."""
    rules.check()


@pytest.mark.parametrize(
    "path",
    ["torch._inductor.nothing", "torch._nothing.config", "torch._inductor.config.nothing.more", "no_such_module"],
)
def test_a_missing_name_is_one_line(path):
    with pytest.raises(BundleError) as caught:
        look_up(path)
    said = str(caught.value)
    assert said.startswith(f"PyTorch {torch.__version__}: {path} is missing, and cross-compiling needs it: install")
    assert "\n" not in said


@pytest.mark.parametrize("name", ["cached_autotune", "CachingAutotuner"])
def test_nothing_is_compiled_without_the_autotuner(monkeypatch, name):
    monkeypatch.delattr(triton_heuristics, name)
    with pytest.raises(BundleError, match=rf"triton_heuristics\.{name}\S* is missing"):
        install()


def test_a_function_with_another_signature_is_missing(monkeypatch):
    monkeypatch.setattr(triton_heuristics, "cached_autotune", lambda size_hints, candidates: None)
    with pytest.raises(BundleError, match=r"cached_autotune\(\.\.\., configs\) is missing"):
        rules.check()


def test_a_missing_setting(monkeypatch):
    monkeypatch.setattr(rules, "SETTINGS", {"shape_padding": False, "shape_knitting": False})
    with pytest.raises(BundleError, match=r"torch\._inductor\.config\.shape_knitting is missing"):
        rules.check()


def test_every_generated_kernel_is_chosen_by_rule(monkeypatch):
    """Through the functions that inductor's generated code calls."""
    seen = []

    def autotune(size_hints, configs, **options):
        seen.append([c.kwargs for c in configs])
        return lambda fn: fn

    monkeypatch.setattr(triton_heuristics, "cached_autotune", autotune)
    monkeypatch.setattr(triton_heuristics.CachingAutotuner, "bench", triton_heuristics.CachingAutotuner.bench)
    chosen = install()
    device = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    meta = {"device": device, "signature": {}}
    inductor = {"autotune_pointwise": True, "kernel_name": "k", "num_load": 1, "num_store": 1, "num_reduction": 1}
    hints = {"x": 4096, "y": 4096}
    triton_heuristics.pointwise(hints, triton_meta=meta, inductor_meta=dict(inductor), tile_hint=None, filename="f")
    triton_heuristics.persistent_reduction(
        {"x": 4096, "r0_": 256}, reduction_hint=None, triton_meta=meta, inductor_meta=dict(inductor), filename="f"
    )
    assert [len(configs) for configs in seen] == [1, 1]
    assert seen[1][0]["XBLOCK"] == 8
    assert chosen() == 2
    with pytest.raises(RuntimeError, match="there is no device"):
        triton_heuristics.CachingAutotuner.bench(None, None)
