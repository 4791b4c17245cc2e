"""Read the language model from a folder in LLaVA's own format, and the vision encoder from a CLIP folder.

The language checkpoint contains a copy of the vision tower. The original takes the vision weights from the CLIP folder
and ignores the copy; here the copy is used only if no CLIP folder is given.
"""

from pathlib import Path

from export.checkpoints.architectures import Config, check_clip_numbers, expected_shapes
from export.checkpoints.matching import Origin, fit
from export.checkpoints.model import LANGUAGE, VISION, Component
from export.checkpoints.names import bare, first_layers, renaming
from export.checkpoints.presets import SD15
from export.checkpoints.values import check_positive
from export.checkpoints.weights import content_hash, open_weights, read_json
from moma_rt.errors import CheckpointError

_TOWER = "model.vision_tower."
_KNOWN_TOWER = "openai/clip-vit-large-patch14-336"
# transformers omits these from a config if they have CLIP's default values.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_vision_select_layer": (-2, None),
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_use_im_start_end": (False, False),
    "hidden_act": ("silu", "silu"),
    "rope_scaling": (None, None),
}


def read_language_config(folder: Path) -> Config:
    """Read the config of a language model in LLaVA's own format.

    Raises:
        CheckpointError: no such folder, another format or model, or a variant that MoMA does not use.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --mllm takes a LLaVA folder (config.json, shards, tokenizer)")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or "unknown"
    if not isinstance(architectures, list) or "LlavaLlamaForCausalLM" not in architectures:
        raise CheckpointError(
            f"{folder / 'config.json'} has architectures {architectures!r}; MoMA's language model is a "
            "LlavaLlamaForCausalLM (LLaVA's own format)"
        )
    # transformers 5 keeps what belongs to the positions in an entry of its own.
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"{folder} has rope_type {rope['rope_type']!r}; only 'default' is supported")
        config = {**config, "rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
    for key, (required, default) in _REQUIRED.items():
        if config.get(key, default) != required:
            raise CheckpointError(f"{folder} has {key} {config.get(key, default)!r}; only {required!r} is supported")
    for key in (*_SIZES, "mm_hidden_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise CheckpointError(f"{folder / 'config.json'} has no usable {key}: {config.get(key)!r}")
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048, "attention_bias": False}
    check_positive(config, ("rms_norm_eps", "rope_theta"), folder / "config.json")
    config = {key: value for key, value in config.items() if value is not None or key not in defaults}
    return {**defaults, **config, "num_key_value_heads": kv_heads}


def read_language(folder: Path) -> Component:
    """Open the language model with its image projection, without the LM head and the vision tower.

    Raises:
        CheckpointError: see `read_language_config`; or no tokenizer, or weights that are damaged or do not fit.
    """
    config = read_language_config(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer: looked for {' and '.join(_TOKENIZER_FILES)}")
    weights = open_weights(folder)
    origin = Origin(folder.resolve().name, config, content_hash((folder / "config.json", *weights.files)))
    expected = expected_shapes(LANGUAGE, config, folder / "config.json")
    try:
        return fit(LANGUAGE, origin, weights, expected, _language_name)
    except CheckpointError as error:
        layers = config["num_hidden_layers"]
        if any(name.startswith(f"model.layers.{layers}.") for name in weights.shapes):
            raise CheckpointError(f"{error} (its config.json names {layers} layers, fewer than are stored)") from None
        raise


def has_vision_tower(folder: Path) -> bool:
    """Return whether a LLaVA folder contains a copy of its vision tower."""
    return any(name.startswith(_TOWER) for name in open_weights(folder).shapes)


def read_vision_copy(folder: Path, sha256: str) -> Component:
    """Open the copy of the vision tower in a LLaVA folder, whose content hash is `sha256`.

    Raises:
        CheckpointError: the tower's config is unknown or does not fit; a CLIP folder (--vision) can replace it.
    """
    config = read_language_config(folder)
    own = config.get("vision_config")
    if not isinstance(own, dict) and config.get("mm_vision_tower", _KNOWN_TOWER) != _KNOWN_TOWER:
        raise CheckpointError(
            f"{folder} has the vision tower {config['mm_vision_tower']!r}; give its folder by --vision"
        )
    vision = {**_VISION_DEFAULTS, **own} if isinstance(own, dict) else dict(SD15.vision)
    check_clip_numbers(vision, folder / "config.json")
    weights = open_weights(folder)
    expected = expected_shapes(VISION, vision, folder / "config.json")
    rename = first_layers(_copied_vision_name, vision["num_hidden_layers"])
    try:
        return fit(VISION, Origin(folder.resolve().name, vision, sha256), weights, expected, rename)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (its vision tower is read as {_KNOWN_TOWER}; or give --vision)") from None


def read_vision_config(folder: Path) -> Config:
    """Read the vision encoder's config from a CLIP folder.

    Raises:
        CheckpointError: no such folder, or another model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --vision takes a CLIP folder with config.json and weights")
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "unknown")
    vision = config.get("vision_config") if kind == "clip" else config if kind == "clip_vision_model" else None
    if not isinstance(vision, dict):
        raise CheckpointError(f"{folder} is a {kind}; the vision encoder is a clip or a clip_vision_model")
    config = {**_VISION_DEFAULTS, **vision}
    check_clip_numbers(config, folder / "config.json")
    return config


def read_vision(folder: Path) -> Component:
    """Open the vision encoder of a CLIP folder, which holds a full CLIP model or only its vision half.

    Raises:
        CheckpointError: see `read_vision_config`; or weights that are damaged or do not fit.
    """
    vision = read_vision_config(folder)
    weights = open_weights(folder)
    origin = Origin(folder.resolve().name, vision, content_hash((folder / "config.json", *weights.files)))
    rename = first_layers(renaming(VISION), vision["num_hidden_layers"])
    return fit(VISION, origin, weights, expected_shapes(VISION, vision, folder / "config.json"), rename)


def check_widths(language: Config, vision: Config) -> None:
    """Check that the language model's image projection takes the vision encoder's width.

    Raises:
        CheckpointError: their widths differ.
    """
    found, needed = vision["hidden_size"], language["mm_hidden_size"]
    if found != needed:
        raise CheckpointError(f"the vision encoder has width {found}, the language model's projection takes {needed}")


def language_width(folder: Path) -> int:
    """The width of the language model in a LLaVA folder."""
    return int(read_language_config(folder)["hidden_size"])


def _language_name(name: str) -> str | None:
    if name.startswith(("lm_head.", _TOWER)) or name.endswith(".rotary_emb.inv_freq"):
        return None
    return name.removeprefix("model.")


def _copied_vision_name(name: str) -> str | None:
    return bare(VISION, name) if name.startswith(_TOWER) else None
