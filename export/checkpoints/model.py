"""The classes of an opened checkpoint: one component per role, with weights named as today's libraries name them."""

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
    """Return the roles whose weights the named networks use."""
    return frozenset().union(*(NETWORK_ROLES[network] for network in networks))


class LoadWeights(Protocol):
    """Reads or generates weights: all of them, or only the named ones."""

    def __call__(self, names: Iterable[str] | None = None) -> StateDict: ...


@dataclass(frozen=True)
class Component:
    """The weights of one role, read on demand.

    `name` is their file or folder, or says that they are random; `config` is the dictionary that the role's class is
    built from; `sha256` identifies config and weights by content. `load()` reads or generates the weights, or only
    those of the given names (stored dtype, CPU, a new dictionary each call), under these names:

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
    """The parts of a base model; `tokenizer` is a folder, None if the base has none."""

    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Path | None


@dataclass(frozen=True)
class Checkpoint:
    """Everything a bundle is exported from.

    `unet`, `vae` and `text_encoder` always have their configs, which the geometry needs, and have weights if their role
    is in `roles`. The other three are None if their role is not in `roles`. A tokenizer folder of None stands for the
    synthetic tokenizer.
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
