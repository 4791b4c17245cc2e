"""Which baselines are measured, in which order, and their summary line."""

from benchmarks.gpu.baselines import Variant, summary, variants
from moma_rt.bundle.specs import Precision


def test_both_precisions_are_measured_the_bundles_first():
    found = list(variants("eager", Precision.FP16, rehearse=False))
    assert [(v.kind, v.precision, v.execution) for v in found] == [
        ("moma", Precision.FP16, "eager"),
        ("plain", Precision.FP16, "eager"),
        ("plain", Precision.FP16, "graph"),
        ("moma", Precision.BF16, "eager"),
        ("plain", Precision.BF16, "eager"),
    ]
    assert {v.formats for v in found if v.execution == "eager"} == {(False, True)}


def test_the_variant_that_compiles_fastest_comes_first():
    found = list(variants("compiled", Precision.BF16, rehearse=False))
    assert found == [Variant(kind, Precision.BF16, "compiled", (True,)) for kind in ("plain", "moma")]


def test_a_rehearsal_is_eager_in_the_precision_of_its_bundle():
    for part in ("eager", "compiled"):
        found = list(variants(part, Precision.FP32, rehearse=True))
        assert {(v.precision, v.execution) for v in found} == {(Precision.FP32, "eager")}


def test_the_summary_names_the_fastest():
    cases = [{"kind": "moma", "scheduler": "ddim", "steps": 50, "ms": {"p50": ms}} for ms in (900.0, 800.0)] + [
        {"kind": "plain", "scheduler": "lcm", "steps": 4, "ms": {"p50": 70.0}}
    ]
    steps = [{"ms": {"p50": 9.5}}, {"ms": {"p50": 8.25}}]
    assert summary(cases, steps, 2) == (
        "fastest of 3: moma ddim 50 800 ms, plain lcm 4 70 ms, plain UNet 8.25 ms a step; 2 variants left out"
    )
