import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.llava import (
    check_widths,
    has_vision_tower,
    read_language,
    read_language_config,
    read_vision,
    read_vision_copy,
)
from moma_rt.errors import CheckpointError

TOWER = "model.vision_tower.vision_tower."
INDEX = "model.safetensors.index.json"


def stored(hub):
    return {name: t for file in sorted(hub.llava.glob("*.safetensors")) for name, t in load_file(file).items()}


def rewrite(copy, tensors, extension=".safetensors", shards=3):
    """Replace the language model's weights by the given tensors in as many shards."""
    for file in (*copy.llava.glob("*.safetensors"), copy.llava / INDEX):
        file.unlink()
    names = sorted(tensors)
    stem, save = ("model", save_file) if extension == ".safetensors" else ("pytorch_model", torch.save)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, f"{stem}-{number}{extension}")
        save(part, copy.llava / f"{stem}-{number}{extension}")
    (copy.llava / f"{stem}{extension}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def language_part(tensors):
    kept = {n: t for n, t in tensors.items() if not n.startswith((TOWER, "lm_head"))}
    return {name.removeprefix("model."): tensor for name, tensor in kept.items()}


def error_of(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_language_values_and_strict_loading(original):
    from transformers import LlamaConfig, LlamaModel

    from export.checkpoints.architectures import llama_config

    component = read_language(original.llava)
    found = component.load()
    assert_same(found, language_part(stored(original)))
    assert found["layers.0.mlp.up_proj.weight"].dtype == torch.float16
    projector = {name for name in found if name.startswith("mm_projector.")}
    assert projector == {f"mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    llama = LlamaModel(LlamaConfig(**llama_config(component.config)))
    llama.load_state_dict({name: t for name, t in found.items() if name not in projector}, strict=True)


def test_bin_shards_and_old_buffers(copy):
    tensors = stored(copy)
    expected = language_part(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    rewrite(copy, tensors, ".bin")
    assert_same(read_language(copy.llava).load(), expected)
    assert has_vision_tower(copy.llava)


def test_vision_encoder_in_its_own_folder(original):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    component = read_vision(original.clip)
    found = component.load()
    source = load_file(original.clip / "model.safetensors")
    assert_same(found, {name.removeprefix("vision_model."): tensor for name, tensor in source.items()})
    CLIPVisionModel(CLIPVisionConfig(**component.config)).load_state_dict(found, strict=True)
    assert component.config["num_attention_heads"] == 4


def test_vision_half_alone_and_full_model(copy):
    expected = read_vision(copy.clip).load()
    config = json.loads((copy.clip / "config.json").read_text())
    file = copy.clip / "model.safetensors"
    extra = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    extra |= {"text_projection.weight": torch.ones(2, 2), "visual_projection.weight": torch.ones(2, 2)}
    extra["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    full = {**load_file(file), **extra}
    copy.save(file, lambda path: save_file(full, path))
    assert_same(read_vision(copy.clip).load(), expected)
    copy.save(file, lambda path: save_file(expected, path))
    copy.replace(copy.clip / "config.json", json.dumps(config["vision_config"]).encode())
    assert_same(read_vision(copy.clip).load(), expected)
    copy.edit_json(copy.clip / "config.json", model_type="siglip")
    assert "siglip" in error_of(read_vision, copy.clip)
    assert "--vision takes" in error_of(read_vision, copy.clip / "none")


def test_vision_encoder_inside_the_language_model(copy):
    assert has_vision_tower(copy.llava)
    clip = json.loads((copy.clip / "config.json").read_text())
    copy.edit_json(copy.llava / "config.json", vision_config=clip["vision_config"])
    found = read_vision_copy(copy.llava, "hash")
    assert found.sha256 == "hash"
    inside = {n: t for n, t in stored(copy).items() if n.startswith(TOWER)}
    assert_same(found.load(), {name.removeprefix(TOWER + "vision_model."): t for name, t in inside.items()})


def test_unknown_vision_encoder_inside_the_language_model(copy):
    message = error_of(read_vision_copy, copy.llava, "")
    assert "clip-vit-large-patch14-336" in message
    assert "--vision" in message
    copy.edit_json(copy.llava / "config.json", mm_vision_tower="google/siglip")
    assert "google/siglip" in error_of(read_vision_copy, copy.llava, "")


def test_language_model_without_a_vision_encoder(copy):
    rewrite(copy, {name: t for name, t in stored(copy).items() if not name.startswith(TOWER)})
    assert not has_vision_tower(copy.llava)
    assert len(read_language(copy.llava).load()) == 33


CONFIGS = [
    ({"architectures": ["LlavaForConditionalGeneration"]}, "LlavaForConditionalGeneration"),
    ({"architectures": None}, "unknown"),
    ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
    ({"mm_vision_select_layer": -1}, "mm_vision_select_layer -1"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"mm_hidden_size": 0}, "mm_hidden_size"),
    ({"num_hidden_layers": 2}, "unexpected layers.2"),
    ({"architectures": 5}, "architectures 5"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ({"num_hidden_layers": 1}, "names 1 layers, fewer than are stored"),
    ({"num_hidden_layers": 4}, "missing layers.3"),
    ({"vocab_size": 600}, "embed_tokens.weight is [555, 128] instead of [600, 128]"),
    ({"mm_hidden_size": 1024}, "mm_projector.0.weight is [128, 64] instead of [128, 1024]"),
    ({"num_attention_heads": 7}, "config.json"),
]


@pytest.mark.parametrize(("changes", "said"), CONFIGS, ids=[said[:40] for _, said in CONFIGS])
def test_other_language_models(copy, changes, said):
    copy.edit_json(copy.llava / "config.json", **changes)
    assert said in error_of(read_language, copy.llava)


def test_positions_as_transformers_5_stores_them(copy):
    config = json.loads((copy.llava / "config.json").read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    copy.replace(copy.llava / "config.json", json.dumps(config).encode())
    assert read_language_config(copy.llava)["rope_theta"] == 5e5


def test_missing_pieces(copy):
    assert "--mllm takes" in error_of(read_language, copy.llava / "none")
    (copy.llava / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002" in error_of(read_language, copy.llava)
    (copy.llava / "tokenizer.model").unlink()
    assert "tokenizer.model" in error_of(read_language, copy.llava)
    (copy.llava / "config.json").unlink()
    assert "config.json does not exist" in error_of(read_language, copy.llava)


def test_widths_must_agree(original):
    language, vision = read_language_config(original.llava), read_vision(original.clip).config
    check_widths(language, vision)
    assert "width 64" in error_of(check_widths, {**language, "mm_hidden_size": 1024}, vision)
