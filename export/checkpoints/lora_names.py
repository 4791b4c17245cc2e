"""The names under which LoRAs store the layers of a UNet and a text encoder, in every layout that is read.

kohya       lora_unet_…, lora_te_… with dots as underscores, and `.lora_down.weight`, `.lora_up.weight`, `.alpha`
diffusers   unet.…, text_encoder.… (or neither), and `.lora_A.weight`, `.lora_B.weight`, or from before PEFT
            `.lora.down.weight`, `processor.to_q_lora.down.weight`
PEFT        base_model.model.…, also after diffusers' prefixes, and `.lora_A.weight` or `.lora_A.<adapter>.weight`
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from export.checkpoints.architectures import expected_shapes
from export.checkpoints.compvis_names import unet_names
from export.checkpoints.matching import class_prefix
from export.checkpoints.model import TEXT_ENCODER, UNET, Component
from moma_rt.errors import CheckpointError

DOWN, UP, ALPHA = "down", "up", "alpha"
PEFT_MODEL = "base_model.model."
_LISTED = 3
_SUFFIX = re.compile(
    r"(?:(?:[._]lora\.|\.lora_linear_layer\.|\.lora_)(?P<name>down|up)|\.lora_(?P<letter>[AB])(?:\.[^.]+)?)\.weight$"
    r"|\.(?P<alpha>alpha)$"
)
_SPELLINGS = MappingProxyType({"A": DOWN, "B": UP})
# The oldest files name the text encoder's layers as if they were the UNet's.
_OLD_TEXT_LAYERS = MappingProxyType({"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"})
# CLIP's text encoder has so many layers; a base that runs only the first of them has no use for the others' LoRAs.
_CLIP_LAYERS = 12
# The first that matches a name is given as a hint.
_HINTS = MappingProxyType(
    {
        r"(lora_)?transformer|lora_unet_(double|single|joint)_": "as LoRAs of other architectures have",
        r"lora_te[12]_|text_encoder_2\.|.*transformer_blocks[._][1-9]": "as SDXL's LoRAs have; needed is one for 1.5",
        r"model\.diffusion_model\.": "as whole checkpoints have: --base takes those",
        r"emb_params|string_to_param|.*lora_embedding_": "of embeddings, which are not supported",
        r".*\.(dora_scale|lora_magnitude_vector)": "of a DoRA, which is not supported",
        r".*\.hada_": "of a LoHa, which is not supported",
        r".*\.lokr_": "of a LoKr, which is not supported",
        r".*\.lora_mid\.": "of a LoRA in three factors, which is not supported",
        r".*\.lora_[AB](\.[^.]+)?\.bias$": "the bias of a LoRA's own layers, PEFT's lora_bias, which is not supported",
        r".*\.modules_to_save\.|base_model\..*\.(bias|base_layer\.\w+)$": "trained as a whole, which is not supported",
    }
)


@dataclass(frozen=True)
class Target:
    """The weight that a LoRA changes: its role, its name in `Component.load`, and its shape."""

    role: str
    weight: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one layer of a LoRA: `parts` maps `DOWN`, `UP` and `ALPHA` to stored names.

    `path` is the layer's name inside its model, as the file has it.
    """

    target: Target
    path: str
    parts: Mapping[str, str]


def stored_layers(names: Collection[str], where: object, unet: Component, text_encoder: Component) -> list[StoredLayer]:
    """Return the layers of a LoRA's file, without those of the text encoder beyond the ones that the base runs.

    Raises:
        CheckpointError: names of something else, a part of a layer stored twice, or no layer left.
    """
    targets, unknown = _targets(unet, text_encoder), []
    parts: dict[Target, dict[str, str]] = {}
    paths: dict[Target, str] = {}
    for name in names:
        match = _SUFFIX.search(name)
        layer = _alias(name[: match.start()]) if match else ""
        if match is None or layer not in targets:
            unknown.append(name)
            continue
        target, part = targets[layer], _part(match)
        if target is None:
            continue
        own = parts.setdefault(target, {})
        if part in own:
            raise CheckpointError(f"{where} has two tensors for one part of a layer: {own[part]} and {name}")
        own[part] = name
        paths[target] = _inside(layer)
    if unknown or not names:
        raise CheckpointError(f"{where} cannot be fused: {_described(sorted(unknown))}")
    if not parts:
        raise CheckpointError(f"{where} changes only layers that the text encoder of {text_encoder.name} does not run")
    return [StoredLayer(target, paths[target], own) for target, own in parts.items()]


def is_peft(names: Iterable[str]) -> bool:
    """Whether these are names of PEFT's own layout, whose alpha is in a configuration."""
    return any(re.match(rf"(unet\.|text_encoder\.)?{re.escape(PEFT_MODEL)}", name) for name in names)


def _described(names: list[str]) -> str:
    listed = ", ".join(names[:_LISTED]) or "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    hints = (f" ({hint})" for pattern, hint in _HINTS.items() if any(re.match(pattern, name) for name in names))
    return (
        f"it has {listed}{more}{next(hints, '')}; looked for layers of this base's UNet and text encoder named "
        "lora_unet_*, lora_te_*, unet.*, text_encoder.* or base_model.model.*, with lora_down and lora_up, or lora_A "
        "and lora_B"
    )


def _part(match: re.Match[str]) -> str:
    found = next(value for value in match.groupdict().values() if value)
    return _SPELLINGS.get(found, found)


def _alias(layer: str) -> str:
    """Return a layer's name as diffusers has it since PEFT.

    Before, it put LoRAs in attention processors and did not number the layers in `to_out`.
    """
    layer = layer.replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _inside(layer: str) -> str:
    return re.sub(rf"^(unet\.|text_encoder\.)?({re.escape(PEFT_MODEL)})?", "", layer)


def _targets(unet: Component, text_encoder: Component) -> dict[str, Target | None]:
    """Map every name that a LoRA may use for a layer to its weight, None if the base does not run the layer."""
    found: dict[str, Target | None] = {}
    shapes = expected_shapes(UNET, unet.config, unet.name)
    old_names = {new: old for old, new in unet_names(shapes).items()}
    for name, shape in _layer_weights(shapes):
        layer, old = (n.removesuffix(".weight") for n in (name, old_names[name]))
        aliases = (f"{start}{layer}" for start in ("", "unet.", PEFT_MODEL, f"unet.{PEFT_MODEL}"))
        for alias in (*aliases, *(f"lora_unet_{_flat(alias)}" for alias in (layer, old))):
            found[alias] = Target(UNET, name, shape)
    used = expected_shapes(TEXT_ENCODER, text_encoder.config, text_encoder.name)
    layers = max(_CLIP_LAYERS, text_encoder.config["num_hidden_layers"])
    whole = {**text_encoder.config, "num_hidden_layers": layers}
    prefix = class_prefix(used)
    for name, shape in _layer_weights(expected_shapes(TEXT_ENCODER, whole, text_encoder.name)):
        for alias in _text_aliases(name.removeprefix(prefix).removesuffix(".weight")):
            found[alias] = Target(TEXT_ENCODER, name, shape) if name in used else None
    return found


def _text_aliases(layer: str) -> Iterable[str]:
    """The names of a text encoder's layer; transformers put `text_model.` before it until version 5."""
    parent, _, last = layer.rpartition(".")
    yield f"text_encoder.text_model.{parent}.{_OLD_TEXT_LAYERS.get(last, last)}"
    for inner in (layer, f"text_model.{layer}"):
        for start in ("", "text_encoder.", PEFT_MODEL, f"text_encoder.{PEFT_MODEL}"):
            yield f"{start}{inner}"
        yield f"lora_te_{_flat(inner)}"


def _layer_weights(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, s) for n, s in shapes.items() if n.endswith(".weight") and len(s) in (2, 4) and "embeddings." not in n]


def _flat(name: str) -> str:
    return name.replace(".", "_")
