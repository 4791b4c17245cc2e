"""The named base models of bases.toml: where their weights are, and how to download them by hand."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma_rt.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLE = Path(__file__).with_name("bases.toml")
_HUB = "https://huggingface.co"
_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)
_TOKENIZER = ("tokenizer/vocab.json", "tokenizer/merges.txt")
_WEIGHTS = {
    "safetensors": {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
    },
    "bin": {
        "unet": "unet/diffusion_pytorch_model.bin",
        "vae": "vae/diffusion_pytorch_model.bin",
        "text_encoder": "text_encoder/pytorch_model.bin",
    },
}
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Base:
    """A named base model: a diffusers folder on the hub, and optionally another VAE and a single file on CivitAI.

    `format` is that of the folder's weights, `safetensors` or `bin`; `note` says what is uncertain about the entry.
    """

    name: str
    title: str
    repository: str
    format: str
    licence: str
    vae: str | None = None
    civitai: str | None = None
    civitai_file: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.format not in _WEIGHTS:
            raise CheckpointError(f"{_TABLE}: {self.name} has format {self.format!r}; known are {', '.join(_WEIGHTS)}")

    def files(self, roles: frozenset[str]) -> tuple[str, ...]:
        """Return the needed files of the repository: all configs, and the weights of the roles (`unet`, `vae`, …)."""
        own = roles - {"vae"} if self.vae is not None else roles
        weights = tuple(file for role, file in _WEIGHTS[self.format].items() if role in own)
        configs = tuple(f for f in _CONFIGS if self.vae is None or not f.startswith("vae/"))
        return configs + weights + (_TOKENIZER if "text_encoder" in roles else ())

    def download_hint(self, roles: frozenset[str]) -> str:
        """Return how to download the weights by hand, as part of a sentence."""
        text = (
            f"put {', '.join(self.files(roles))} of {_HUB}/{self.repository} into a folder and give it with --weights"
        )
        if self.civitai is not None:
            text += f" (or the single file {self.civitai_file or 'of its version'} from {self.civitai})"
        if self.vae is not None and "vae" in roles:
            text += f", and {' and '.join(VAE_FILES)} of {_HUB}/{self.vae} into another for --vae"
        return text


def bases() -> dict[str, Base]:
    """Read the table of base models, keyed by name.

    Raises:
        CheckpointError: bases.toml cannot be read or parsed.
    """
    try:
        table: dict[str, dict[str, Any]] = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
        return {name: Base(name=name, **entry) for name, entry in table.items()}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{_TABLE} is not a table of bases: {error}") from None
