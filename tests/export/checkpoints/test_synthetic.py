import math

import pytest
import torch

from export.checkpoints import presets
from export.checkpoints.architectures import attention_layers, expected_shapes, image_size, llama_config
from export.checkpoints.model import LANGUAGE, TEXT_ENCODER, UNET, VAE, VISION
from export.checkpoints.synthetic import random_adapters, random_component

TINY, SD15 = presets.TINY, presets.SD15
CONFIGS = {
    UNET: TINY.unet,
    VAE: TINY.vae,
    TEXT_ENCODER: TINY.text_encoder,
    LANGUAGE: TINY.language,
    VISION: TINY.vision,
}


@pytest.mark.parametrize("role", CONFIGS)
def test_seeded_and_complete(role):
    component = random_component(role, CONFIGS[role], 3)
    found, again = component.load(), random_component(role, CONFIGS[role], 3).load()
    assert {name: tuple(t.shape) for name, t in found.items()} == expected_shapes(role, component.config, "preset")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in found.values())
    other = random_component(role, CONFIGS[role], 4)
    assert other.sha256 != component.sha256 == random_component(role, CONFIGS[role], 3).sha256
    assert any(not torch.equal(tensor, other.load()[name]) for name, tensor in found.items())


def test_hash_follows_the_config():
    plain = random_component(VAE, TINY.vae, 0)
    assert random_component(VAE, {**TINY.vae, "scaling_factor": 0.2}, 0).sha256 != plain.sha256
    assert random_component(UNET, TINY.unet, 0).sha256 != plain.sha256
    narrow, wide = (random_adapters(TINY.unet, width, TINY, 0) for width in (64, 128))
    assert narrow.sha256 != wide.sha256
    gate = "mapping.gate_proj.weight"
    assert (narrow.load()[gate].shape, wide.load()[gate].shape) == ((128, 64), (128, 128))


def test_values_do_not_change_between_versions():
    """Raise the generator's version, which is part of every hash, when these change."""
    found = random_component(VAE, TINY.vae, 0).load()["decoder.conv_in.weight"].flatten()[:3].tolist()
    assert found == pytest.approx([-0.22040313482284546, 0.09166643023490906, -0.07710391283035278], abs=1e-6)


def test_initialisation():
    adapters = random_adapters(TINY.unet, 64, TINY, 0).load()
    assert adapters["projectors.norm.weight"].eq(1).all()
    assert adapters["projectors.norm.bias"].eq(0).all()
    assert adapters["projectors.proj.bias"].std() > 0
    for layer in attention_layers(TINY.unet):
        weight = adapters[f"attention.{layer.path}.to_v_ip.weight"]
        assert weight.std().item() == pytest.approx(1 / math.sqrt(weight.shape[1]), rel=0.1)
        if layer.is_self:
            assert adapters[f"attention.{layer.path}.scale_learnable"].tolist() == [1.0]
    text = random_component(TEXT_ENCODER, TINY.text_encoder, 0).load()
    embedding = next(tensor for name, tensor in text.items() if name.endswith("token_embedding.weight"))
    assert embedding.std().item() == pytest.approx(1.0, rel=0.05)


def test_tiny_networks_load_strictly_and_stay_in_scale():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

    def build(module, role):
        weights = random_component(role, CONFIGS[role], 0).load()
        module.load_state_dict({n: t for n, t in weights.items() if not n.startswith("mm_projector.")}, strict=True)
        return module.eval()

    unet = build(UNet2DConditionModel.from_config(dict(TINY.unet)), UNET)
    vae = build(AutoencoderKL.from_config(dict(TINY.vae)), VAE)
    text = build(CLIPTextModel(CLIPTextConfig(**TINY.text_encoder)), TEXT_ENCODER)
    vision = build(CLIPVisionModel(CLIPVisionConfig(**TINY.vision)), VISION)
    llama = build(LlamaModel(LlamaConfig(**llama_config(dict(TINY.language)))), LANGUAGE)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = text(torch.arange(154).reshape(2, 77)).last_hidden_state
        eps = unet(torch.randn(1, 4, 32, 32, generator=noise).expand(2, -1, -1, -1), 900, tokens).sample
        image = vae.decode(torch.randn(1, 4, 32, 32, generator=noise) * 10).sample
        seen = vision(torch.randn(1, 3, 112, 112, generator=noise), output_hidden_states=True).hidden_states[-2]
        read = llama(torch.arange(90)[None]).last_hidden_state
    assert image.shape == (1, 3, 256, 256)
    assert seen.shape == (1, 65, 64)
    for tensor in (tokens, eps, seen, read):
        assert 0.2 < tensor.std() < 4
    assert 0.1 < image.std() < 0.6
    assert (eps[0] - eps[1]).std() > 0.05


def test_geometries():
    assert image_size(TINY.unet, TINY.vae) == 256
    assert image_size(SD15.unet, SD15.vae) == 512
    assert len(attention_layers(TINY.unet)) == len(attention_layers(SD15.unet)) == 32
    sizes = {
        UNET: 859_520_964,
        VAE: 83_653_863,
        TEXT_ENCODER: 123_060_480,
        VISION: 303_507_456,
        LANGUAGE: 6_607_343_616 + 20_979_712,
    }
    for role, size in sizes.items():
        config = dict(getattr(SD15, role))
        assert sum(math.prod(shape) for shape in expected_shapes(role, config, "sd15").values()) == size


def test_full_size_language_model_is_half_precision():
    small = {**SD15.language, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 16}
    assert {t.dtype for t in random_component(LANGUAGE, small, 0).load().values()} == {torch.float16}
