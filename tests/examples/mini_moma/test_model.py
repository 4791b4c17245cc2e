"""The module's weights under the original's names, its token ids, and the context embedding."""

import pytest
import torch

from examples.mini_moma.checkpoint import write_checkpoint
from examples.mini_moma.model import MiniMoma, Tokens, original_weights
from examples.mini_moma.vae import make_vae
from export.checkpoints import CheckpointRequest, load_checkpoint
from moma_rt.errors import InputError


def test_weights_are_written_and_read_back_under_the_originals_names(model, drawn_data, tmp_path):
    vae, tokenizers = make_vae(), drawn_data / "tokenizers"
    weights = {**original_weights(model), "vae": vae.state_dict()}
    write_checkpoint(tmp_path / "mini", weights, tokenizers / "text", tokenizers / "language")
    checkpoint = load_checkpoint(CheckpointRequest("mini", weights=str(tmp_path / "mini")))
    loaded = {component.role: component.load() for component in checkpoint.components}
    unet = {name: tensor for name, tensor in model.unet.state_dict().items() if ".processor." not in name}
    assert loaded["unet"].keys() == unet.keys()
    assert all(torch.equal(loaded["unet"][name], tensor.half()) for name, tensor in unet.items())
    assert torch.equal(loaded["vae"]["quant_conv.bias"], vae.quant_conv.bias.half())
    adapters = loaded["adapters"]
    down = list(dict.fromkeys(name.split(".")[0] for name in model.unet.attn_processors))
    assert down == ["down_blocks", "up_blocks", "mid_block"]
    for name, processor in model.unet.attn_processors.items():
        for key, tensor in processor.state_dict().items():
            stored = adapters[f"attention.{name.removesuffix('.processor')}.{key}"]
            assert torch.equal(stored.flatten(), tensor.half().flatten())
    assert torch.equal(adapters["projectors.proj.weight"], model.proj.weight.half())
    assert torch.equal(adapters["mapping.gate_proj.weight"], model.context.gate_proj.weight.half())


def test_weights_of_the_adapters_are_numbered_down_up_mid(model):
    attentions = original_weights(model)["adapters"]["self_cross_attentions"]
    blocks = {0: model.unet.down_blocks[0], 12: model.unet.up_blocks[1], 30: model.unet.mid_block}
    for number, block in blocks.items():
        attn1 = block.attentions[0].transformer_blocks[0].attn1.processor
        assert torch.equal(attentions[f"{number}.to_k_ip.weight"], attn1.to_k_ip.weight)
        assert f"{number}.scale_learnable" in attentions
        attn2 = block.attentions[0].transformer_blocks[0].attn2.processor
        assert torch.equal(attentions[f"{number + 1}.to_v_ip.weight"], attn2.to_v_ip.weight)
        assert f"{number + 1}.scale_learnable" not in attentions


def test_training_starts_with_the_photos_own_keys_and_values(tokens):
    fresh = MiniMoma(tokens)
    processor = fresh.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    assert torch.equal(processor.to_k_ip.weight, torch.eye(64))
    assert processor.scale_learnable.tolist() == [1]
    assert not fresh.unet.conv_out.weight.any()


def test_an_embedding_does_not_depend_on_longer_prompts_beside_it(model, tokens):
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    short, long = "A car on a beach.", "A car on a beach at sunset, with a guitar and a dragon and a horse in the snow."

    def embed(*prompts):
        texts = tokens.prompts(["car"] * len(prompts), prompts)
        return model.context(pixels, tokens.before, texts, torch.zeros(len(prompts), dtype=torch.long)), texts

    alone, _ = embed(short)
    beside, texts = embed(short, long)
    assert texts.lengths_b[0] < texts.lengths_b[1] == texts.language_bl.shape[1]
    torch.testing.assert_close(beside[:1], alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(beside[1:], alone, rtol=1e-2)
    assert alone.shape == (1, 1024)


def test_an_embedding_depends_on_the_photo(model, tokens):
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    texts = tokens.prompts(["car"] * 3, ["A car."] * 3)
    first, second, again = model.context(pixels, tokens.before, texts, torch.tensor([0, 1, 0]))
    assert torch.allclose(first, again, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-6)


def test_context_tokens_of_zeros_are_not_zeros(model):
    unconditional = model.context_tokens(torch.zeros(2, 1024))
    assert unconditional.shape == (2, 4, 128)
    assert torch.equal(unconditional[0], unconditional[1])
    assert unconditional.abs().max() > 0.1


def test_ids_are_the_runtimes(tokens):
    texts = tokens.prompts(["red ball", "car"], ["A red ball in the snow.", "A car."])
    assert texts.text_bt.shape == texts.subject_bt.shape == (2, 77)
    assert torch.equal(texts.text_bt[1], tokens.text("photo of a car. A car."))
    marked = texts.text_bt[0][texts.subject_bt[0] > 0].tolist()
    # Begin token, then the first token of each word.
    first = [int(tokens.text(word)[1]) for word in ("red", "ball")]
    assert sorted(set(marked)) == sorted(first)
    assert all(marked.count(token) >= 2 for token in first)
    assert tokens.before[0] == 1
    assert bool((texts.language_bl < tokens.language_vocabulary).all())


def test_without_tokenizers(tmp_path):
    with pytest.raises(InputError, match="has no tokenizers; first run: python -m examples.mini_moma data"):
        Tokens(tmp_path)
