"""PEFT's configuration of a LoRA: the factor of each layer, and the kinds of LoRA that only it tells apart.

PEFT writes it into `adapter_config.json` beside its own files; newer versions of diffusers write it into the header of
theirs, with the names of the networks before the entries.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from export.checkpoints.model import TEXT_ENCODER, UNET
from export.checkpoints.weights import read_json, read_metadata
from moma_rt.errors import CheckpointError
from moma_rt.messages import short_repr

CONFIG_FILE = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
# Initializations after which the base's weights are not the base's own any more.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSUPPORTED = MappingProxyType(
    {
        "use_dora": "DoRA, which also changes the magnitude of the weights",
        "alora_invocation_tokens": "a LoRA that applies only after certain tokens",
        "layer_replication": "a LoRA of a model with replicated layers",
        "use_bdlora": "a LoRA of blocks",
    }
)


@dataclass(frozen=True)
class PeftConfig:
    """What sets the factor of one network's layers: patterns of layers' names with their own alpha come first."""

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...]
    use_rslora: bool

    def factor(self, layer: str, rank: int) -> float:
        """The number that up · down is multiplied by, for a layer's name inside its model."""
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.fullmatch(layer)), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def has_metadata(file: Path) -> bool:
    """Whether the configuration is in the file's own header."""
    return _METADATA in read_metadata(file)


def read_configs(file: Path, beside: Path | None) -> dict[str, PeftConfig]:
    """Return the configurations in a LoRA's header, or in the file `beside` it, by role; those that there are.

    Raises:
        CheckpointError: damaged, numbers that are not finite, or a kind of LoRA that is not supported.
    """
    where = str(beside) if beside is not None else f"{file}: {_METADATA} in its header"
    try:
        entries = read_json(beside) if beside is not None else json.loads(read_metadata(file).get(_METADATA, "{}"))
        roles = (UNET, TEXT_ENCODER)
        own = {role: _config(entries, f"{role}.", where) for role in roles}
        plain = _config(entries, "", where)
    except (ValueError, TypeError, AttributeError, OverflowError, re.error):
        what = f"{CONFIG_FILE} beside it" if beside is not None else f"{_METADATA} in its header"
        raise CheckpointError(f"{file} has a damaged {what}") from None
    found = {role: config for role in roles if (config := own[role] or plain) is not None}
    if beside is not None and not found:
        raise CheckpointError(f"{file} has a damaged {CONFIG_FILE} beside it: it has no lora_alpha")
    return found


def _config(entries: Mapping[str, Any], prefix: str, where: str) -> PeftConfig | None:
    """Return the configuration of one network; None if `entries` has none for `prefix`."""
    kind = entries.get(f"{prefix}peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{where} has peft_type {kind!r}; only LORA is supported")
    if f"{prefix}lora_alpha" not in entries:
        return None
    for key, what in _UNSUPPORTED.items():
        if entries.get(f"{prefix}{key}"):
            raise CheckpointError(f"{where} has {key}: {what}, which is not supported")
    start = entries.get(f"{prefix}init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{where} has init_lora_weights {start!r}: it fits a base changed in the same way; convert it to a plain "
            "LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    patterns = entries.get(f"{prefix}alpha_pattern") or {}
    return PeftConfig(
        _alpha(entries[f"{prefix}lora_alpha"], f"{prefix}lora_alpha", where),
        # PEFT's rule: a pattern matches the end of a layer's name, from a dot on.
        tuple((re.compile(rf"(.*\.)?({name})"), _alpha(alpha, name, where)) for name, alpha in patterns.items()),
        bool(entries.get(f"{prefix}use_rslora")),
    )


def _alpha(value: Any, name: str, where: str) -> float:
    try:
        alpha = float(value)
    except (TypeError, ValueError, OverflowError):
        alpha = math.nan
    if not math.isfinite(alpha):
        given = short_repr(value)
        raise CheckpointError(f"{where} has {given} as the alpha of {name}; it must be a finite number")
    return alpha
