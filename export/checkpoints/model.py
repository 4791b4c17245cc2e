"""What a checkpoint is once read: one component a role, weights under the names today's libraries use."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

StateDict = dict[str, torch.Tensor]

UNET = "unet"
VAE = "vae"
TEXT_ENCODER = "text_encoder"
ADAPTERS = "adapters"
LANGUAGE = "language"
VISION = "vision"
ROLES = (UNET, VAE, TEXT_ENCODER, ADAPTERS, LANGUAGE, VISION)

NETWORK_ROLES = MappingProxyType(
    {
        "text_encoder": frozenset({TEXT_ENCODER}),
        "vae_encoder": frozenset({VAE}),
        "vae_decoder": frozenset({VAE}),
        "subject_encoder": frozenset({UNET, ADAPTERS}),
        "denoiser": frozenset({UNET, ADAPTERS}),
        "vision_encoder": frozenset({VISION, LANGUAGE}),
        "language_model": frozenset({LANGUAGE, ADAPTERS}),
        "context_projector": frozenset({ADAPTERS}),
    }
)


def roles_for(networks: Iterable[str]) -> frozenset[str]:
    """The roles whose weights the named networks are made of."""
    return frozenset().union(*(NETWORK_ROLES[network] for network in networks))


class LoadWeights(Protocol):
    """Reads or makes weights: all of them, or those of some names."""

    def __call__(self, names: Iterable[str] | None = None) -> StateDict: ...


@dataclass(frozen=True)
class Component:
    """The weights that play one role, not yet read.

    `name` is the file or folder they came from, or says that they are random; `config` is the dictionary its class is
    built from; `sha256` identifies config and weights by content. `load()` reads or makes the weights (stored dtype,
    CPU, a new dictionary each call; of the given names alone, if any are given), under these names:

    - unet, vae: diffusers' `UNet2DConditionModel` and `AutoencoderKL`
    - text_encoder, vision: transformers' `CLIPTextModel` and `CLIPVisionModel`, as the installed version names them
    - language: transformers' `LlamaModel`, and `mm_projector.{0,2}.{weight,bias}`
    - adapters: `projectors.{proj,norm}.{weight,bias}`; `attention.<path>.{to_k_ip,to_v_ip}.weight` for each attention
      of the UNet, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1`, and for each `attn1`
      `attention.<path>.scale_learnable` [1]; `mapping.{gate,up,down}_proj.weight`
    """

    role: str
    name: str
    config: dict[str, Any]
    sha256: str
    load: LoadWeights = dataclasses.field(repr=False, compare=False)


@dataclass(frozen=True)
class BaseParts:
    """The parts of a base model; `tokenizer` is a folder, None where the base brings none."""

    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Path | None


@dataclass(frozen=True)
class Checkpoint:
    """Everything a bundle is exported from.

    `unet`, `vae` and `text_encoder` always have their configs, since the geometry needs them; their weights are there
    if their role is in `roles`. The other three are None unless their role is. A tokenizer folder that is None stands
    for the synthetic tokenizer.
    """

    base: str
    image_size: int
    unet: Component
    vae: Component
    text_encoder: Component
    adapters: Component | None
    language: Component | None
    vision: Component | None
    text_tokenizer: Path | None
    language_tokenizer: Path | None
    roles: frozenset[str]

    @property
    def components(self) -> tuple[Component, ...]:
        """The components of the requested roles: those whose weights the bundle holds, in the order of `ROLES`."""
        found = (self.unet, self.vae, self.text_encoder, self.adapters, self.language, self.vision)
        return tuple(c for c in found if c is not None and c.role in self.roles)
