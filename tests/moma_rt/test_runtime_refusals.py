"""Arguments, subjects and bundles that the runtime refuses, with fake networks."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import BundleError, InputError, SubjectError
from moma_rt.runtime import Runtime


async def hear(info):
    return False


async def stream(info):
    yield info


def numbers(info):
    yield info.step


class Listener:
    async def __call__(self, info):
        return False

    async def hear(self, info):
        return False


WRONG = [
    ({"strength": -0.1}, "strength is -0.1: it must be between 0 and 2"),
    ({"strength": 2.001}, "strength is 2.001: it must be between 0 and 2"),
    ({"strength": math.nan}, "strength is nan: it must be between 0 and 2"),
    ({"strength": "much"}, "strength is 'much': it must be between 0 and 2"),
    ({"strength": 10**400}, f"strength is 1{'0' * 79}...: it must be between 0 and 2"),
    ({"strength": 10**5000}, "strength is <int>: it must be between 0 and 2"),
    ({"strength": 1j}, "strength is 1j: it must be between 0 and 2"),
    ({"strength": np.zeros((2, 1))}, "strength is array([[0.], [0.]]): it must be between 0 and 2"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf: it must be between 0 and 100"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan: it must be between 0 and 100"),
    ({"guidance_scale": 1e39}, "guidance_scale is 1e+39: it must be between 0 and 100"),
    ({"guidance_scale": 100.01}, "guidance_scale is 100.01: it must be between 0 and 100"),
    ({"guidance_scale": 10**400}, "it must be between 0 and 100"),
    ({"guidance_scale": -1}, "guidance_scale is -1: it must be between 0 and 100"),
    ({"guidance_interval": (-1, 5)}, "guidance_interval is -1: it must be between 0 and 999"),
    ({"guidance_interval": (0, 999.5)}, "guidance_interval is 999.5: it must be between 0 and 999"),
    ({"guidance_interval": (math.nan, 5)}, "guidance_interval is nan: it must be between 0 and 999"),
    ({"guidance_interval": (0, 10**5000)}, "guidance_interval is <int>: it must be between 0 and 999"),
    ({"guidance_interval": (600, 400)}, "guidance_interval is (600, 400): its first number must not be above its"),
    ({"guidance_interval": (1, 2, 3)}, "guidance_interval is (1, 2, 3): it must be two numbers, the lowest and the"),
    ({"guidance_interval": 400}, "guidance_interval is 400: it must be two numbers"),
    ({"guidance_interval": None}, "guidance_interval is None: it must be two numbers"),
    ({"guidance_interval": "09"}, "guidance_interval is '09': it must be two numbers"),
    ({"guidance_interval": ("0", "9")}, "guidance_interval is '0': it must be between 0 and 999"),
    ({"scheduler": "lcm", "steps": 51}, "with lcm, steps must be 1 to 50, not 51"),
    ({"steps": 0}, "steps must be 1 to 999, not 0"),
    ({"steps": 2.5}, "steps must be a whole number, 1 to 999, not 2.5"),
    ({"scheduler": "euler-ish"}, "unknown scheduler 'euler-ish'; available: ddim"),
    ({"num_images": 0}, "num_images is 0: it must be from 1 to 64"),
    ({"num_images": 65}, "num_images is 65: it must be from 1 to 64"),
    ({"num_images": 10**5000}, "num_images is <int>: it must be from 1 to 64"),
    ({"num_images": True}, "num_images is True: it must be a whole number from 1 to 64"),
    ({"seed": -1}, "seed must be 0 to 18446744073709551615, not -1"),
    ({"seed": 2**64 - 1, "num_images": 2}, "2 images need seeds up to"),
    ({"latents": np.zeros((1, 4, 8, 7))}, "latents has shape [1, 4, 8, 7]: it must be [1, 4, 8, 8]"),
    ({"latents": np.zeros((1, 4, 8, 8)), "num_images": 2}, "it must be [2, 4, 8, 8]"),
    ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents contains NaN or infinity"),
    ({"context_embedding": np.zeros(17)}, "context_embedding has shape [17]: it must be [16]"),
    ({"context_embedding": np.full(16, np.nan)}, "context_embedding contains NaN or infinity"),
    ({"latents": np.zeros((1, 4, 8, 8), complex)}, "latents is not an array of real numbers but of complex128"),
    ({"latents": np.full((1, 4, 8, 8), 1e300)}, "latents contains NaN or infinity"),
    ({"latents": [[1], [1, 2]]}, "latents is not an array of real numbers but list"),
    ({"latents": [10**400]}, "latents is not an array of real numbers but list"),
    ({"latents": np.full((1, 4, 8, 8), "1")}, "latents is not an array of real numbers but of <U1"),
    ({"context_embedding": [1j] * 16}, "context_embedding is not an array of real numbers but list"),
    ({"subject": None}, "subject must be a Subject, from enroll or Subject.load, not None"),
    ({"subject": "car.subject"}, "subject must be a Subject, from enroll or Subject.load, not 'car.subject'"),
    ({"on_step": 0}, "on_step must be a function of a StepInfo, not 0"),
    ({"on_step": "print"}, "on_step must be a function of a StepInfo, not 'print'"),
    ({"on_step": hear}, "on_step must not be async: <function hear"),
    ({"on_step": functools.partial(hear)}, "on_step must not be async: functools.partial(<function hear"),
    ({"on_step": Listener()}, "on_step must not be async: <"),
    ({"on_step": Listener().hear}, "on_step must not be async: <bound method Listener.hear"),
    ({"on_step": stream}, "on_step must not be async: <function stream"),
    ({"on_step": numbers}, "on_step must not be a generator: <function numbers"),
    ({"scheduler": None}, "unknown scheduler None; available: ddim"),
    ({"scheduler": ["ddim"]}, "unknown scheduler ['ddim']; available: ddim"),
    ({"prompt": None}, "prompt must be a text, not None"),
    ({"prompt": b"A car."}, "prompt must be a text, not b'A car.'"),
    ({"prompt": "A car " + "and more " * 400}, "prompt is too long"),
    ({"negative_prompt": None}, "negative prompt must be a text, not None"),
    ({"prompt": "An <image>."}, "prompt must not contain <image>"),
    ({"negative_prompt": "An <image>."}, "negative prompt must not contain <image>"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_input_is_refused_before_any_network_runs(runtime, backend, subject, changes, message):
    arguments = {"subject": subject, "prompt": "A car.", "steps": 1, **changes}
    with pytest.raises(InputError) as caught:
        runtime.generate(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert backend.runs == []


@pytest.mark.parametrize("strength", [0, 2, np.float32(0.5)])
def test_the_ends_of_the_range_and_numpy_numbers_are_fine(runtime, backend, subject, strength):
    runtime.generate(subject, "", strength=strength, steps=np.int64(1), num_images=np.int32(1), guidance_scale=0)
    assert backend.inputs_of("denoiser")[0]["strength"].tolist() == [strength]


@pytest.mark.parametrize("bundle", [None, 7, b"bundle", ["bundle"]])
def test_a_bundle_that_is_no_path(bundle):
    with pytest.raises(InputError, match="bundle must be the path of a bundle's folder, not"):
        Runtime.load(bundle)


def test_a_subject_of_another_base_is_refused(tmp_path, fakes, backend, subject):
    runtime = Runtime(Bundle.open(fakes.make_bundle(tmp_path, base="other")), backend)
    with pytest.raises(SubjectError, match=r"'car' was enrolled with base 'fake' .*this bundle is of base 'other'"):
        runtime.generate(subject, "A car.", steps=1)
    assert backend.runs == []


def test_a_subject_of_another_language_model_is_refused_only_where_it_matters(runtime, backend, subject):
    other = dataclasses.replace(subject, origin=dataclasses.replace(subject.origin, language="0" * 64))
    with pytest.raises(SubjectError, match="another language model"):
        runtime.generate(other, "A car.", steps=1)
    assert runtime.generate(other, "A car.", steps=1, context_embedding=np.zeros(16)).images
    with pytest.raises(SubjectError, match="another language model"):
        runtime.context_embedding(other, "A car.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "A car."), "subject must be a Subject, from enroll or Subject.load, not None"),
        ((7,), "prompt must be a text, not 7"),
        (("<image>",), "prompt must not contain <image>"),
        (("a " * 4000,), "prompt is too long"),
    ],
)
def test_a_context_embedding_of_wrong_input_is_refused(runtime, backend, subject, arguments, message):
    with pytest.raises(InputError, match=message):
        runtime.context_embedding(*(arguments if len(arguments) == 2 else (subject, *arguments)))
    assert backend.runs == []


def test_a_subject_without_prefix_says_what_to_do(runtime, subject):
    other = dataclasses.replace(subject, prefix=None)
    with pytest.raises(SubjectError, match="give context_embedding, or enroll it again"):
        runtime.generate(other, "A car.", steps=1)


@pytest.mark.parametrize("change", ["missing", "wider", "longer"])
def test_a_subject_whose_tensors_do_not_fit_is_refused(runtime, backend, subject, change):
    keys = dict(subject.reference_k)
    name = "down_blocks.0.attentions.0"
    if change == "missing":
        del keys[name]
    elif change == "wider":
        keys[name] = np.zeros((len(keys[name]), 5), np.float32)
    else:
        keys[name] = np.zeros((100, 4), np.float32)
    with pytest.raises(SubjectError, match=f"reference_k.{name} has shape"):
        runtime.generate(dataclasses.replace(subject, reference_k=keys), "A car.", steps=1)
    assert backend.runs == []


def test_an_altered_network_is_refused_when_it_is_needed(tmp_path, fakes, backend, photo, mask):
    bundle = fakes.make_bundle(tmp_path)
    path = bundle / "networks/denoiser/model.onnx"
    path.write_text(path.read_text().replace("denoiser", "denoises"))
    runtime = Runtime(Bundle.open(bundle), backend)
    subject = runtime.enroll(photo, mask, "car")
    with pytest.raises(BundleError, match="networks/denoiser/model.onnx was altered"):
        runtime.generate(subject, "A car.", steps=1)
    assert "denoiser" not in backend.loads


def test_a_subject_of_a_name_that_this_bundle_cannot_find_is_refused(runtime, backend, subject):
    other = dataclasses.replace(subject, name="é" * 60)
    with pytest.raises(InputError, match="subject name is too long") as caught:
        runtime.generate(other, "A car.", steps=1, context_embedding=np.zeros(16))
    assert "\n" not in str(caught.value)
    assert backend.runs == []
