"""The baselines make the pictures of the original implementation and of diffusers' own pipeline."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.latency import original
from benchmarks.latency.original import Original, PlainDiffusion
from benchmarks.latency.requests import Request, Settings, requests
from export.checkpoints.load import CheckpointRequest, load_checkpoint
from moma_rt.bundle.specs import Precision
from moma_rt.errors import InputError
from moma_rt.inputs.noise import Stream
from moma_rt.runtime import Runtime
from moma_rt.timing import StageTimer


def settings(bundle: Path, steps: int, scheduler: str = "ddim", strength: float = 1.0) -> Settings:
    return Settings(bundle, "onnxruntime", steps, scheduler, None, argparse.Namespace(), strength=strength)


def keep_latents(baseline: PlainDiffusion) -> list[np.ndarray]:
    """The latents that the baseline decodes."""
    kept, decode = [], baseline.decode

    def decoding(latents, **options):
        kept.append((latents * baseline.vae.config.scaling_factor).numpy())
        return decode(latents, **options)

    baseline.decode = decoding
    return kept


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: waiting threads of PyTorch spin, which slows small networks tenfold on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(CheckpointRequest("tiny"))


# LCM's only step injects nothing, has no guidance, and adds no noise.
@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 3), ("lcm", 1)])
def test_the_original_and_the_runtime_make_the_same_latents(scheduler, steps, tiny, tiny_bundle):
    request, asked = requests(3)["cold"], settings(tiny_bundle, steps, scheduler)
    original = Original(tiny, asked)
    latents = keep_latents(original)
    answer = original.answer(request)
    runtime = Runtime.load(tiny_bundle, "onnxruntime", threads=2)
    subject = runtime.enroll(request.photo, request.mask, request.name, seed=request.subject_seed)
    options = {"steps": steps, "scheduler": scheduler, "guidance_scale": asked.guidance_scale}
    result = runtime.generate(subject, request.prompt, seed=request.seed, **options)
    (buffers,) = runtime._sampler._buffers._values.values()
    assert relative_error(buffers.read_state("latents"), latents[0]) < 1e-3
    assert np.abs(result.foreground_masks[0] - answer.foreground_mask).mean() < 1e-3
    assert np.abs(np.asarray(result.images[0], np.int16) - answer.image).max() <= 1


class OriginalWithGoldenNoise(Original):
    """The original with the noise of the golden trace."""

    trace: dict[str, np.ndarray]

    def _noise(self, seed: int, stream: Stream) -> torch.Tensor:
        names = {Stream.INITIAL_LATENTS: "init_latents", Stream.VAE: "vae_noise", Stream.REFERENCE: "ref_noise"}
        return torch.from_numpy(self.trace[names[stream]])


@pytest.mark.slow
def test_the_original_makes_the_golden_picture(goldens, hub, golden_bundle):
    """The first of its 20 steps injects nothing."""
    case = goldens / "context"
    meta = json.loads((case / "meta.json").read_text())
    checkpoint = load_checkpoint(
        CheckpointRequest(
            str(hub / "SG161222/Realistic_Vision_V4.0_noVAE"),
            adapters=hub / "checkpoints/attn_adapters_projectors.th",
            mllm=hub / "KunpengSong/MoMA_llava_7b",
            vision=hub / "openai/clip-vit-large-patch14-336",
            vae=hub / "stabilityai/sd-vae-ft-mse",
        )
    )
    original = OriginalWithGoldenNoise(checkpoint, settings(golden_bundle, meta["steps"], strength=meta["strength"]))
    original.trace = dict(np.load(case / "trace.npz"))
    latents = keep_latents(original)
    answer = original.answer(Request(case / "image.png", case / "mask.png", meta["subject"], meta["prompt"], 0, 0))
    assert relative_error(latents[0], original.trace["latents_after"][-1]) < 1e-3
    expected_mask = original.trace["final_mask_64"][0, 0].repeat(8, 0).repeat(8, 1)
    assert (np.abs(answer.foreground_mask - expected_mask) > 1e-3).mean() <= 1e-3
    final = np.load(case / "final_image.npz")["final_image_f16"][0].transpose(1, 2, 0).astype(np.float64)
    assert -10 * np.log10(np.mean((answer.image / 255 - final) ** 2)) >= 50


@pytest.mark.parametrize("scheduler", ["ddim", "lcm"])
def test_plain_is_the_pipeline_of_diffusers(scheduler, tiny, tiny_bundle):
    from diffusers import StableDiffusionPipeline

    plain, request = PlainDiffusion(tiny, settings(tiny_bundle, 2, scheduler)), requests(0)["warm"]
    torch.manual_seed(0)  # LCM draws noise
    found = plain.answer(request).image
    made, latents = plain._start(request)
    pipeline = StableDiffusionPipeline(
        vae=plain.vae,
        text_encoder=None,
        tokenizer=None,
        unet=plain.unet,
        scheduler=made,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = [plain._text(text, StageTimer()) for text in plain._texts(request)]
    torch.manual_seed(0)
    expected = pipeline(
        prompt_embeds=texts[-1],
        negative_prompt_embeds=texts[0] if len(texts) == 2 else None,
        guidance_scale=plain.settings.guidance_scale,
        num_inference_steps=2,
        latents=latents,
        output_type="np",
    ).images[0]
    assert np.abs(found / 255 - expected).max() < 1 / 255


def test_compiled_is_eager_with_its_unet_and_decoder_compiled(tiny, tiny_bundle, monkeypatch):
    compiled = []

    def traced(function, mode):
        assert mode == "reduce-overhead"
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", traced)
    baseline = Original(tiny, settings(tiny_bundle, 1), "compiled")
    assert compiled == [baseline.unet, baseline.vae.decode]
    assert baseline.step is baseline.unet
    image = baseline.answer(requests(0)["warm"]).image
    np.testing.assert_array_equal(image, Original(tiny, settings(tiny_bundle, 1)).answer(requests(0)["warm"]).image)


def test_the_compiled_unet_is_one_graph_for_steps_with_and_without_injection(tiny, tiny_bundle, monkeypatch):
    """The first of three steps injects nothing."""
    monkeypatch.setattr(original, "_INJECTION_BELOW", 500)
    embedding = np.random.default_rng(0).standard_normal(1024, dtype=np.float32)
    asked = dataclasses.replace(settings(tiny_bundle, 3), embedding=embedding)
    eager = Original(tiny, asked).answer(requests(0)["warm"])
    counter, compile = CompileCounter(), torch.compile
    # `fullgraph` makes a graph break an error; the backend counts the graphs.
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile(function, backend=counter, fullgraph=True))
    compiled = Original(tiny, asked, "compiled").answer(requests(0)["warm"])
    torch.compiler.reset()
    # The UNet's and the decoder's.
    assert counter.frame_count == 2
    assert np.abs(compiled.image.astype(int) - eager.image).max() <= 1
    np.testing.assert_allclose(compiled.foreground_mask, eager.foreground_mask, atol=1e-4)


@pytest.mark.parametrize("kind", [Original, PlainDiffusion])
def test_precision_and_memory_format_are_settings(kind, tiny, tiny_bundle):
    """In bfloat16 with channels last, the picture is about that of fp32 with channels first."""
    embedding = np.random.default_rng(0).standard_normal(1024, dtype=np.float32)
    asked = dataclasses.replace(settings(tiny_bundle, 1), embedding=embedding)
    exact = kind(tiny, asked)
    assert exact.dtype == torch.float32
    other = kind(tiny, dataclasses.replace(asked, baseline_precision=Precision.BF16, channels_last=True))
    assert {p.dtype for p in other.unet.parameters()} == {torch.bfloat16}
    assert other.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert other.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not exact.unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    found, wanted = (baseline.answer(requests(0)["warm"]).image.astype(float) for baseline in (other, exact))
    assert np.abs(found - wanted).mean() < 8


def test_a_cuda_graph_of_the_unet_needs_a_gpu(tiny, tiny_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        PlainDiffusion(tiny, settings(tiny_bundle, 1), "graph")


@pytest.mark.gpu
def test_a_cuda_graph_of_the_unet_makes_the_eager_picture(tiny, tiny_bundle):
    eager, captured = (PlainDiffusion(tiny, settings(tiny_bundle, 3), how) for how in ("eager", "graph"))
    for request in (requests(0)["warm"], requests(1)["warm"]):
        found, wanted = (baseline.answer(request).image.astype(int) for baseline in (captured, eager))
        assert np.abs(found - wanted).max() <= 2
