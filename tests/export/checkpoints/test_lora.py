"""LoRAs against diffusers' own `load_lora_weights` and `fuse_lora`."""

import json

import pytest
import torch

from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.lora import LoraFile, fuse_loras, parse_lora
from export.checkpoints.model import TEXT_ENCODER, UNET
from moma_rt.errors import CheckpointError
from tests.export.checkpoints.lora_files import fused_by_diffusers, written

UNET_LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.2.proj_in",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.2.resnets.0.conv_shortcut",
    "down_blocks.2.downsamplers.0.conv",
    "mid_block.resnets.1.time_emb_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "conv_in",
    "conv_out",
]
# Without an out_proj, diffusers takes kohya's names in the text encoder for another layout and drops the others.
TEXT_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]
RANK, ALPHA, SCALE = 3, 5.0, 0.7


@pytest.fixture(scope="module")
def factors(states):
    """Random down and up for each layer, by (role, layer)."""
    generator = torch.Generator().manual_seed(0)
    unet, text = states
    prefix = "text_model." if any(name.startswith("text_model.") for name in text) else ""
    weights = {(UNET, layer): unet[f"{layer}.weight"] for layer in UNET_LAYERS}
    weights |= {(TEXT_ENCODER, layer): text[f"{prefix}{layer}.weight"] for layer in TEXT_LAYERS}
    found = {}
    for key, weight in weights.items():
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], RANK, *([1] * (weight.dim() - 2)), generator=generator) * 0.2
        found[key] = (down, up)
    return found


def kohya(factors):
    file = {}
    for (role, layer), (down, up) in factors.items():
        start = "lora_unet_" if role == UNET else "lora_te_text_model_"
        name = start + layer.replace(".", "_")
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return file


def diffusers_names(factors, down_name: str, up_name: str):
    file = {}
    for (role, layer), (down, up) in factors.items():
        name = f"unet.{layer}" if role == UNET else f"text_encoder.text_model.{layer}"
        file |= {f"{name}.{down_name}.weight": down, f"{name}.{up_name}.weight": up}
    return file


def peft(factors):
    return diffusers_names(factors, "lora_A", "lora_B")


def old_diffusers(factors):
    """Before PEFT: no convolutions, other names in the text encoder than in the UNet."""
    linear = {key: pair for key, pair in factors.items() if pair[0].dim() == 2}
    unet = {key: pair for key, pair in linear.items() if key[0] == UNET}
    text = {key: pair for key, pair in linear.items() if key[0] == TEXT_ENCODER}
    return {
        **diffusers_names(unet, "lora.down", "lora.up"),
        **diffusers_names(text, "lora_linear_layer.down", "lora_linear_layer.up"),
    }


def oldest_diffusers(factors):
    """LoRAs in attention processors; the text encoder's are named as if it had processors."""
    names = {
        (UNET, UNET_LAYERS[0]): "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
        (UNET, UNET_LAYERS[1]): "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
        (TEXT_ENCODER, TEXT_LAYERS[0]): "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora",
        (TEXT_ENCODER, TEXT_LAYERS[1]): "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora",
    }
    pairs = [(name, *factors[key]) for key, name in names.items()]
    return {f"{name}.{part}.weight": t for name, *pair in pairs for part, t in zip(("down", "up"), pair, strict=True)}


LAYOUTS = {"kohya": kohya, "peft": peft, "before PEFT": old_diffusers, "in processors": oldest_diffusers}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_diffusers(tmp_path, base, states, factors, layout):
    pytest.importorskip("peft")
    path = written(tmp_path, LAYOUTS[layout](factors))
    expected = fused_by_diffusers(states, path, SCALE)
    found = tuple(component.load() for component in fuse_loras(*base, [LoraFile(path, SCALE)]))
    for own, theirs, before in zip(found, expected, states, strict=True):
        assert own.keys() == theirs.keys()
        changed = [name for name in own if not torch.equal(own[name], before[name])]
        assert changed == [name for name in theirs if not torch.equal(theirs[name], before[name])]
        assert changed
        for name in own:
            torch.testing.assert_close(own[name], theirs[name], rtol=0, atol=1e-5)


def test_equals_diffusers_with_the_header_it_writes(tmp_path, base, states, factors):
    pytest.importorskip("peft")
    common = {"r": RANK, "lora_dropout": 0.0, "bias": "none"}
    header = {
        **{f"unet.{key}": value for key, value in common.items()},
        **{f"text_encoder.{key}": value for key, value in common.items()},
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn1.to_q": 12},
        "unet.target_modules": UNET_LAYERS,
        "text_encoder.lora_alpha": 4.5,
        "text_encoder.use_rslora": True,
        "text_encoder.target_modules": TEXT_LAYERS,
    }
    path = written(tmp_path, peft(factors), {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    expected = fused_by_diffusers(states, path, 1.0)
    found = tuple(component.load() for component in fuse_loras(*base, [LoraFile(path)]))
    for own, theirs in zip(found, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(own[name], theirs[name], rtol=0, atol=1e-5)


def delta(factors, role, layer):
    down, up = factors[role, layer]
    if down.dim() == 2 or down.shape[2:] == (1, 1):
        product = up.flatten(1) @ down.flatten(1)
        return product.reshape(up.shape[0], *down.shape[1:])
    return torch.einsum("or,rihw->oihw", up[..., 0, 0], down)


def test_other_spellings_mean_the_same(tmp_path, base, factors):
    """CompVis block names, processors from before PEFT, without `unet.` too, 1×1 convolutions as matrices, pickles."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    down, up = factors[UNET, layer]
    expected = fuse_loras(*base, [LoraFile(written(tmp_path, peft({(UNET, layer): (down, up)})))])[0].load()
    processor = layer.removesuffix(".to_out.0") + ".processor.to_out_lora"
    compvis = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0"
    for number, tensors in enumerate(
        (
            {f"unet.{processor}.down.weight": down, f"unet.{processor}.up.weight": up},
            {f"{processor}.down.weight": down, f"{processor}.up.weight": up},
            {f"{compvis}.lora_down.weight": down, f"{compvis}.lora_up.weight": up},
            {f"{compvis}.lora_down.weight": down[..., None, None], f"{compvis}.lora_up.weight": up[..., None, None]},
        )
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(tensors, path)
        found = fuse_loras(*base, [LoraFile(path)])[0].load()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compvis_names_of_the_time_embedding(tmp_path, base, factors):
    layer = "time_embedding.linear_2"
    down, up = factors[UNET, layer]
    expected = fuse_loras(*base, [LoraFile(written(tmp_path, peft({(UNET, layer): (down, up)})))])[0].load()
    tensors = {"lora_unet_time_embed_2.lora_down.weight": down, "lora_unet_time_embed_2.lora_up.weight": up}
    found = fuse_loras(*base, [LoraFile(written(tmp_path, tensors))])[0].load()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loras_add_up_and_identify_what_they_change(tmp_path, base, states, factors):
    unet, text = base
    layer = "up_blocks.1.attentions.2.proj_in"
    path = written(tmp_path, kohya({(UNET, layer): factors[UNET, layer]}))
    once, same_text = fuse_loras(unet, text, [LoraFile(path, 0.5)])
    assert same_text is text
    twice, _ = fuse_loras(unet, text, [LoraFile(path, 0.5), LoraFile(path, -2.0)])
    change = delta(factors, UNET, layer) * ALPHA / RANK
    weight = states[0][f"{layer}.weight"]
    torch.testing.assert_close(once.load()[f"{layer}.weight"], weight + 0.5 * change)
    torch.testing.assert_close(twice.load()[f"{layer}.weight"], weight - 1.5 * change)
    assert len({unet.sha256, once.sha256, twice.sha256, fuse_loras(unet, text, [LoraFile(path)])[0].sha256}) == 4
    assert once.sha256 == fuse_loras(unet, text, [LoraFile(path, 0.5)])[0].sha256
    assert once.name.endswith("+ my.safetensors:0.5")


def test_half_precision_rounds_nothing(tmp_path, factors, original):
    request = CheckpointRequest(str(original.base), roles=frozenset({UNET}))
    layer = "conv_in"
    tensors = kohya({(UNET, layer): (torch.full((1, 4, 3, 3), 1e-3), torch.ones(16, 1, 1, 1))})
    path = written(tmp_path, {**tensors, "lora_unet_conv_in.alpha": torch.tensor(1.0)})
    before = load_checkpoint(request).unet.load()["conv_in.weight"]
    fused = load_checkpoint(CheckpointRequest(str(original.base), roles=request.roles, loras=(LoraFile(path),)))
    assert before.dtype == torch.float16
    torch.testing.assert_close(fused.unet.load()["conv_in.weight"], before.float() + 1e-3, rtol=0, atol=1e-7)
    assert fused.text_encoder.sha256 == ""


def test_alpha_defaults_to_the_rank(tmp_path, base, states, factors):
    layer = UNET_LAYERS[0]
    tensors = {n: t for n, t in kohya({(UNET, layer): factors[UNET, layer]}).items() if not n.endswith("alpha")}
    found = fuse_loras(*base, [LoraFile(written(tmp_path, tensors))])[0].load()
    expected = states[0][f"{layer}.weight"] + delta(factors, UNET, layer)
    torch.testing.assert_close(found[f"{layer}.weight"], expected)


NAME = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP = torch.ones(2, 64, 1, 1), torch.ones(64, 2, 1, 1)
GOOD = {f"{NAME}.lora_down.weight": DOWN, f"{NAME}.lora_up.weight": UP}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({**GOOD, f"{NAME}.dora_scale": UP}, f"it has {NAME}.dora_scale"),
        ({**GOOD, f"{NAME}.lora_mid.weight": UP}, f"it has {NAME}.lora_mid.weight"),
        ({f"{NAME}.hada_w1_a": UP}, "hada_w1_a"),
        ({"lora_unet_other.lora_up.weight": UP}, "lora_unet_other"),
        ({**GOOD, "unet.mid_block.attentions.0.proj_in.lora_A.weight": DOWN}, f"one part of a layer: {NAME}"),
        ({"lora_te_text_model_embeddings_token_embedding.lora_up.weight": UP}, "it has lora_te_text_model_embeddings"),
        ({f"x{i}.lora_up.weight": UP for i in range(5)}, "x2.lora_up.weight and 2 more"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": UP}, "SDXL"),
        ({}, "it has nothing"),
        ({f"{NAME}.lora_down.weight": DOWN}, "no up beside it"),
        ({f"{NAME}.alpha": torch.ones(())}, "no down beside it"),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(32, 2, 1, 1)}, "of shape [64, 64, 1, 1]"),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(64, 3, 1, 1)}, "up is [64, 3, 1, 1]"),
        ({**GOOD, f"{NAME}.lora_down.weight": torch.ones(2, 64, 3, 3)}, "down is [2, 64, 3, 3]"),
        ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(64, 0), f"{NAME}.lora_down.weight": torch.ones(0, 64)}, "fit"),
        ({**GOOD, f"{NAME}.lora_down.weight": torch.ones(())}, "down is []"),
        ({**GOOD, f"{NAME}.alpha": torch.ones(2)}, "is not a number"),
    ],
)
def test_files_that_do_not_fit(tmp_path, base, tensors, said):
    path = written(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        fuse_loras(*base, [LoraFile(path)])
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{", "damaged lora_adapter_metadata"),
        ("3", "damaged lora_adapter_metadata"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}', "damaged lora_adapter_metadata"),
        ('{"unet.lora_alpha": "much"}', r"in its header has 'much' as the alpha of unet\.lora_alpha"),
    ],
)
def test_damaged_header(tmp_path, base, header, said):
    path = written(tmp_path, GOOD, {"lora_adapter_metadata": header})
    with pytest.raises(CheckpointError, match=said):
        fuse_loras(*base, [LoraFile(path)])


def test_missing_file(tmp_path, base):
    with pytest.raises(CheckpointError, match="does not exist"):
        fuse_loras(*base, [LoraFile(tmp_path / "none.safetensors")])


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir:x/a.pt:-1", "dir:x/a.pt", -1.0),
        ("dir:x/a.pt", "dir:x/a.pt", 1.0),
        ("12", "12", 1.0),
        ("C:/a.pt", "C:/a.pt", 1.0),
    ],
)
def test_file_and_scale(text, path, scale):
    assert parse_lora(text) == LoraFile(type(parse_lora(text).path)(path), scale)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scales_that_are_no_numbers(scale):
    with pytest.raises(CheckpointError, match="finite"):
        parse_lora(f"a.safetensors:{scale}")


def test_only_what_is_asked_for_is_fused(tmp_path, factors):
    path = written(tmp_path, kohya(factors))
    plain = load_checkpoint(CheckpointRequest("tiny"))
    fused = load_checkpoint(CheckpointRequest("tiny", loras=(LoraFile(path),)))
    changed = {c.role for c, before in zip(fused.components, plain.components, strict=True) if c != before}
    assert changed == {UNET, TEXT_ENCODER}
    assert fused.base == "tiny+my"
