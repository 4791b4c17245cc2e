"""The language model against transformers' own forward pass, with fewer key heads than query heads too."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from export.models.language import ContextProjector, LanguageModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
IMAGES = 5


@pytest.fixture(scope="module", params=[4, 2], ids=["4 key heads", "2 key heads"])
def models(request):
    config = {**SIZES, "num_key_value_heads": request.param, "rope_theta": 500.0}
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(**config, attn_implementation="eager")).eval()
    mapping = {"gate_proj.weight": (24, 32), "up_proj.weight": (24, 32), "down_proj.weight": (1024, 24)}
    mapping = {name: torch.randn(shape) for name, shape in mapping.items()}
    return llama, mapping, LanguageModel(config, dict(llama.state_dict()), mapping)


def run(model, ids, images, past=None):
    kv = torch.zeros(3, 2, model.kv_heads, 0, model.head_width) if past is None else past
    positions = torch.arange(kv.shape[3], kv.shape[3] + len(ids), dtype=torch.int32)
    with torch.inference_mode():
        return model(torch.tensor([ids], dtype=torch.int32), images, positions[None], kv)


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, IMAGES, 32, generator=torch.Generator().manual_seed(1))


IDS = [1, 7, 50, 51, 52, 53, 54, 9, 49, 3, 0, 12]


def test_the_embedding_of_the_last_token(models, images):
    llama, mapping, model = models
    words = llama.embed_tokens(torch.tensor([IDS]).clamp_max(49))
    words[0, 2:7] = images[0]
    with torch.inference_mode():
        last = llama(inputs_embeds=words).last_hidden_state[:, -1]
    gate, up, down = (mapping[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    expected = (torch.nn.functional.silu(last @ gate.T) * (last @ up.T)) @ down.T
    torch.testing.assert_close(run(model, IDS, images)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 4, len(IDS) - 1])
def test_a_cached_prefix_and_a_suffix_equal_one_pass(models, images, cut):
    model = models[2]
    embedding, kv = run(model, IDS, images)
    _, prefix = run(model, IDS[:cut], images)
    found, suffix = run(model, IDS[cut:], images, prefix)
    torch.testing.assert_close(found, embedding, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([prefix, suffix], dim=3), kv, rtol=1e-4, atol=1e-4)


def test_no_token_sees_the_ones_after_it(models, images):
    model = models[2]
    _, kv = run(model, IDS, images)
    _, changed = run(model, [*IDS[:-1], 20], images)
    torch.testing.assert_close(changed[..., :-1, :], kv[..., :-1, :])
    assert not torch.equal(changed[..., -1, :], kv[..., -1, :])


def test_context_tokens_are_normalized_one_by_one():
    torch.manual_seed(0)
    weights = {"proj.weight": torch.randn(24, 10), "proj.bias": torch.randn(24)}
    weights |= {"norm.weight": torch.rand(6), "norm.bias": torch.randn(6)}
    embedding = torch.randn(3, 10)
    tokens = (embedding @ weights["proj.weight"].T + weights["proj.bias"]).reshape(3, 4, 6)
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = scaled * weights["norm.weight"] + weights["norm.bias"]
    torch.testing.assert_close(ContextProjector(weights, 6)(embedding), expected, rtol=1e-4, atol=1e-5)
