"""Readers of a manifest's specs and geometry."""

import copy
import json

import pytest

from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import MAX_SIZE, Dim, Geometry, NetworkSpec, TensorSpec
from moma_rt.errors import BundleError

HUGE = MAX_SIZE + 1
NO_SIZE = [0, -1, HUGE, True, 1.0, "8", None, [8], 10**30]


def changed(data, path, value):
    """A copy of `data` with the field at `path` replaced, or dropped where `value` is `...`."""
    result = copy.deepcopy(data)
    owner = result
    for key in path[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return result


@pytest.fixture
def geometry(fakes):
    return json.loads(json.dumps(fakes.geometry.to_json()))


@pytest.fixture
def denoiser(fakes):
    return json.loads(json.dumps(fakes.specs["denoiser"].to_json()))


def refused(read, data, match):
    with pytest.raises(ValueError, match=match) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_was_written_is_read(fakes):
    assert Geometry.from_json(json.loads(json.dumps(fakes.geometry.to_json()))) == fakes.geometry
    for spec in fakes.specs.values():
        assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


class TestTensors:
    @pytest.mark.parametrize("size", NO_SIZE)
    def test_a_size_that_is_invalid(self, size):
        refused(TensorSpec.from_json, {"name": "x", "dtype": "float32", "shape": [2, size]}, "a size of 'x' is")

    @pytest.mark.parametrize("size", [1, MAX_SIZE])
    def test_the_ends_of_the_range(self, size):
        assert TensorSpec.from_json({"name": "x", "dtype": "bool", "shape": [size]}).shape == (size,)

    @pytest.mark.parametrize("dtype", ["float64", "complex64", "object", "float32\n", "", None, 7, ["float32"]])
    def test_an_unknown_dtype(self, dtype):
        refused(TensorSpec.from_json, {"name": "x", "dtype": dtype, "shape": []}, "'x' has dtype .* known: float32")

    @pytest.mark.parametrize("name", ["", "a\nb", "a\x00", 7, None, ["x"]])
    def test_a_name_that_is_not_one_line(self, name):
        refused(TensorSpec.from_json, {"name": name, "dtype": "int32", "shape": []}, "the name of a tensor is")

    @pytest.mark.parametrize("shape", ["12", 3, None, {"0": 1}])
    def test_a_shape_that_is_not_a_list(self, shape):
        refused(TensorSpec.from_json, {"name": "x", "dtype": "int32", "shape": shape}, "the shape of tensor 'x' is")

    @pytest.mark.parametrize(
        "data", [None, [], "x", {"name": "x"}, {"name": "x", "dtype": "bool", "shape": [], "y": 1}]
    )
    def test_other_fields(self, data):
        refused(TensorSpec.from_json, data, "TensorSpec has the fields dtype, name, shape, not")


class TestDimensions:
    @pytest.mark.parametrize("bounds", [(0, 0, 1), (1, 1, 1), (0, 7, 9), (3, 3, MAX_SIZE)])
    def test_bounds_in_order(self, bounds):
        data = dict(zip(("name", "min", "opt", "max"), ("n", *bounds), strict=True))
        assert Dim.from_json(data) == Dim("n", *bounds)

    @pytest.mark.parametrize("bounds", [(2, 1, 3), (1, 4, 3), (4, 4, 3)])
    def test_bounds_out_of_order(self, bounds):
        data = dict(zip(("name", "min", "opt", "max"), ("n", *bounds), strict=True))
        refused(Dim.from_json, data, "dimension 'n' needs min <= opt <= max")

    @pytest.mark.parametrize("field", ["min", "opt", "max"])
    @pytest.mark.parametrize("value", [-1, HUGE, True, "1", None, 1.5])
    def test_a_bound_that_is_invalid(self, field, value):
        refused(Dim.from_json, {"name": "n", "min": 1, "opt": 1, "max": 1, field: value}, f"^{field} is")

    def test_a_maximum_of_zero(self):
        refused(Dim.from_json, {"name": "n", "min": 0, "opt": 0, "max": 0}, "^max is 0")


class TestNetworks:
    def test_two_tensors_of_one_name(self, denoiser):
        for place in (["inputs", 1, "name"], ["outputs", 0, "name"]):
            refused(NetworkSpec.from_json, changed(denoiser, place, "latents"), "tensor 'latents' is given twice")

    def test_two_dimensions_of_one_name(self, denoiser):
        data = changed(denoiser, ["outputs", 0, "shape", 0, "max"], 9)
        refused(NetworkSpec.from_json, data, "bounds of dimension 'batch' is given twice")

    @pytest.mark.parametrize("field", ["inputs", "outputs"])
    @pytest.mark.parametrize("value", [..., None, "x", {}, [None]])
    def test_tensors_that_are_invalid(self, denoiser, field, value):
        refused(NetworkSpec.from_json, changed(denoiser, [field], value), "not")


class TestGeometry:
    @pytest.mark.parametrize("value", NO_SIZE)
    @pytest.mark.parametrize(
        "path",
        [
            ["image_size"],
            ["text_tokens"],
            ["embedding_width"],
            ["self_attention", 0, "grid"],
            ["self_attention", 2, "heads"],
            ["language", "vocabulary"],
            ["language", "image_tokens"],
        ],
    )
    def test_a_size_that_is_invalid(self, geometry, path, value):
        refused(Geometry.from_json, changed(geometry, path, value), f"^{path[-1]} is .*, not a whole number of 1 to")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (["latent_size"], 7, "geometry: latent_size 7 does not divide image_size 64"),
            (["latent_size"], 128, "geometry: latent_size 128 does not divide image_size 64"),
            (["self_attention", 1, "grid"], 3, "grid 3 does not divide latent_size 8"),
            (["self_attention", 1, "grid"], 16, "grid 16 does not divide latent_size 8"),
            (["self_attention", 1, "heads"], 4, "heads 4 does not divide channels 6"),
            (["self_attention", 1, "name"], "down_blocks.0.attentions.0", "layer 'down_blocks.*' is given twice"),
            (["self_attention", 1, "name"], "a\nb", "the name of a layer is"),
            (["self_attention"], [], "self_attention has no layers"),
            (["self_attention"], {}, "self_attention is {}, not a list"),
            (["self_attention", 1], None, "SelfAttentionLayer has the fields"),
            (["language"], [], "LanguageGeometry has the fields"),
            (["language"], ..., "Geometry has the fields"),
            (["language", "width"], ..., "LanguageGeometry has the fields"),
            (["language", "depth"], 3, "LanguageGeometry has the fields"),
        ],
    )
    def test_inconsistent_values(self, geometry, path, value, message):
        refused(Geometry.from_json, changed(geometry, path, value), message)

    def test_no_language_model_is_fine(self, geometry):
        assert Geometry.from_json({**geometry, "language": None}).language is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["geometry", "image_size"], "64\n"),
        (["geometry", "self_attention", 0, "grid"], 0),
        (["networks", "denoiser", "spec", "inputs", 0, "shape", 1], -4),
        (["networks", "denoiser", "spec", "inputs", 0, "dtype"], "float128"),
        (["networks", "denoiser", "spec", "inputs", 0, "shape", 0, "min"], 5),
    ],
)
def test_the_bundles_error_is_one_line(tmp_path, fakes, path, value):
    bundle = fakes.make_bundle(tmp_path)
    (bundle / "manifest.json").write_text(
        json.dumps(changed(json.loads((bundle / "manifest.json").read_text()), path, value))
    )
    with pytest.raises(BundleError, match="manifest.json is malformed: ValueError: ") as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)
