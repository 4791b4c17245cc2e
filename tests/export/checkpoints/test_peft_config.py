"""LoRAs that PEFT wrote, against its own `merge_and_unload`, and what only their configuration tells."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.lora import LoraFile, fuse_loras
from export.checkpoints.model import TEXT_ENCODER
from export.checkpoints.presets import TINY
from moma_rt.errors import CheckpointError
from tests.export.checkpoints.lora_files import tiny_unet, written

peft = pytest.importorskip("peft")
# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYER = "encoder.layers.0.self_attn.q_proj"
NAME = f"base_model.model.{LAYER}"


def text_model(state):
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**TINY.text_encoder))
    model.load_state_dict(state)
    return model


def adapted(model, **config):
    """The model in PEFT's wrapper, with random LoRA weights."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "fc1"], "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(**{**given, **config}))


CONFIGS = {
    "plain": {},
    "alpha of some layers": {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "fc1": 5.5}},
    "anchored pattern": {"alpha_pattern": {"^encoder.layers.1.self_attn.q_proj": 2}},
    "rank of some layers": {"rank_pattern": {"v_proj": 2, r".*layers\.1\..*q_proj": 7}},
    "rank-stabilized": {"use_rslora": True, "rank_pattern": {"fc1": 9}},
    "stored the other way round": {"fan_in_fan_out": True},
    "only some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "out_proj"]},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_encoder_equals_peft(tmp_path, base, states, kind):
    model = adapted(text_model(states[1]), **CONFIGS[kind])
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    unet, found = fuse_loras(*base, [LoraFile(tmp_path)])
    assert unet is base[0]
    found = found.load()
    assert found.keys() == merged.keys()
    changed = {name for name in merged if not torch.equal(merged[name], states[1][name])}
    assert changed == {name for name in found if not torch.equal(found[name], states[1][name])}
    assert changed
    for name in merged:
        torch.testing.assert_close(found[name], merged[name], rtol=0, atol=1e-5)


def test_alpha_over_rank(tmp_path, base, states):
    """W + 8 / 4 · B · A."""
    adapted(text_model(states[1])).save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    weight = next(name for name in states[1] if name.endswith(f"{LAYER}.weight"))
    expected = states[1][weight] + 2.0 * stored[f"{NAME}.lora_B.weight"] @ stored[f"{NAME}.lora_A.weight"]
    found = fuse_loras(*base, [LoraFile(tmp_path / FILE)])[1].load()
    torch.testing.assert_close(found[weight], expected)


SPELLINGS = {
    "transformers 4": lambda name: name.replace("base_model.model.", "base_model.model.text_model."),
    "diffusers' prefix": lambda name: f"text_encoder.{name}",
    "diffusers' prefix, transformers 4": lambda name: f"text_encoder.{name}".replace("model.en", "model.text_model.en"),
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_text_encoder(tmp_path, base, states, spelling):
    adapted(text_model(states[1])).save_pretrained(tmp_path)
    expected = fuse_loras(*base, [LoraFile(tmp_path)])[1].load()
    tensors = {SPELLINGS[spelling](name): tensor for name, tensor in load_file(tmp_path / FILE).items()}
    save_file(tensors, tmp_path / FILE)
    found = fuse_loras(*base, [LoraFile(tmp_path)])[1].load()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_the_unet_and_a_pickle(tmp_path, base, states):
    adapted(tiny_unet(states[0]), target_modules=["to_q"]).save_pretrained(tmp_path)
    expected = fuse_loras(*base, [LoraFile(tmp_path / FILE)])[0].load()
    torch.save(load_file(tmp_path / FILE), tmp_path / "adapter_model.bin")
    (tmp_path / FILE).unlink()
    found = fuse_loras(*base, [LoraFile(tmp_path)])[0].load()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no LoRA: looked for adapter_model\.safetensors, pytorch_lora"):
        fuse_loras(*base, [LoraFile(tmp_path)])


def test_layers_that_the_base_does_not_run_are_left_out(tmp_path, base, states):
    """A base with clip skip runs fewer layers than its LoRAs were trained for."""
    adapted(text_model(states[1])).save_pretrained(tmp_path)
    expected = fuse_loras(*base, [LoraFile(tmp_path)])[1].load()
    tensors = load_file(tmp_path / FILE)
    later = {name.replace("layers.1.", "layers.11."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    save_file({**tensors, **later}, tmp_path / FILE)
    found = fuse_loras(*base, [LoraFile(tmp_path)])[1].load()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    save_file(later, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="changes only layers that the text encoder of .* does not run"):
        fuse_loras(*base, [LoraFile(tmp_path)])


def test_from_the_command_line_to_the_text_encoder(tmp_path, states):
    adapted(text_model(states[1])).save_pretrained(tmp_path / "mine")
    roles = frozenset({TEXT_ENCODER})
    found = load_checkpoint(CheckpointRequest("tiny", roles=roles, loras=(LoraFile(tmp_path / "mine", 0.5),)))
    assert found.base == "tiny+mine"
    assert found.text_encoder.name.endswith(f"+ {FILE}:0.5")


FACTORS = {f"{NAME}.lora_A.weight": torch.ones(2, 64), f"{NAME}.lora_B.weight": torch.ones(64, 2)}


def error_of(folder, base, config, tensors=FACTORS) -> str:
    path = written(folder, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        fuse_loras(*base, [LoraFile(path)])
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": math.nan}, "nan as the alpha of lora_alpha"),
        ({"lora_alpha": math.inf}, "inf as the alpha of lora_alpha"),
        ({"lora_alpha": 1, "alpha_pattern": {"q_proj": math.nan}}, "nan as the alpha of q_proj"),
        ({"lora_alpha": None}, "None as the alpha of lora_alpha; it must be a finite number"),
        ({"lora_alpha": 1, "alpha_pattern": {"q_proj": [2]}}, "[2] as the alpha of q_proj"),
        ({"lora_alpha": 1e300}, "too large"),
        ({"lora_alpha": 1, "peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA is supported"),
        ({"lora_alpha": 1, "use_dora": True}, "use_dora"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"lora_alpha": 1, "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"lora_alpha": 1, "layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path, base, config, said):
    message = error_of(tmp_path, base, config)
    assert said in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [("IA3", "ia3_l"), ("OFT", "oft_R.weight"), ("VERA", "vera_lambda_b"), ("ADALORA", "lora_E")],
)
def test_other_kinds_of_adapters_are_named(tmp_path, base, kind, name):
    message = error_of(tmp_path, base, {"peft_type": kind}, {f"{NAME}.{name}": torch.ones(64, 1)})
    assert f"has peft_type '{kind}'; only LORA is supported" in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({f"{NAME}.lora_B.bias": torch.ones(64)}, "lora_B.bias (the bias of a LoRA's own layers, PEFT's lora_bias"),
        ({f"{NAME}.bias": torch.ones(64)}, "trained as a whole"),
        ({"base_model.model.final_layer_norm.modules_to_save.weight": torch.ones(64)}, "trained as a whole"),
        ({"base_model.model.embeddings.token_embedding.lora_embedding_A": torch.ones(2, 9)}, "of embeddings"),
        ({f"{NAME}.lora_A.other.weight": torch.ones(2, 64)}, "two tensors for one part of a layer"),
        ({f"{NAME}.lora_magnitude_vector.weight": torch.ones(64)}, "of a DoRA"),
    ],
)
def test_more_than_a_lora(tmp_path, base, extra, said):
    assert said in error_of(tmp_path, base, {"lora_alpha": 1}, {**FACTORS, **extra})
