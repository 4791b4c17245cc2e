"""Seeded random weights for any component, so that every path can be run without a download.

A tensor's values depend only on (generator version, role, tensor name, shape, seed): not on the libraries' own
initialization, the order of creation or the number of threads.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable

import numpy as np
import torch

from export.checkpoints.adapters import CONTEXT_TOKENS, EMBEDDING_WIDTH, AdapterGeometry
from export.checkpoints.adapters import expected_shapes as adapter_shapes
from export.checkpoints.architectures import Config, Shapes, expected_shapes
from export.checkpoints.matching import class_prefix
from export.checkpoints.model import ADAPTERS, VAE, Component, StateDict
from export.checkpoints.presets import Preset

# Part of every hash: raise it when the values change.
_GENERATOR_VERSION = 2


def random_component(role: str, config: Config, seed: int, model: str = "") -> Component:
    """Return a UNet, VAE, text encoder, language model or vision encoder of random weights, generated on load.

    The weights depend on the role, the config, the seed and, if given, `model`.
    """
    return _random(role, dict(config), {}, f"{seed} of {model}" if model else str(seed))


def random_adapters(unet_config: Config, language_width: int, preset: Preset, seed: int) -> Component:
    """Return random adapters for a UNet and a language width; `preset` gives the mapping's inner width."""
    geometry = AdapterGeometry(
        CONTEXT_TOKENS, unet_config["cross_attention_dim"], EMBEDDING_WIDTH, language_width, preset.mapping_width
    )
    return _random(ADAPTERS, geometry.to_config(), adapter_shapes(unet_config, geometry), str(seed))


def _random(role: str, config: Config, known_shapes: Shapes, seed: str) -> Component:
    identity = [_GENERATOR_VERSION, role, config, sorted(known_shapes.items()), seed]
    sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @functools.cache
    def all_shapes() -> Shapes:
        return known_shapes or expected_shapes(role, config, f"the {role} preset")

    def load(names: Iterable[str] | None = None) -> StateDict:
        shapes = all_shapes()
        prefix = class_prefix(shapes)
        dtype = torch.float16 if config.get("torch_dtype") == "float16" else torch.float32
        wanted = shapes if names is None else names
        return {n: _tensor(role, n.removeprefix(prefix), shapes, prefix, seed).to(dtype) for n in wanted}

    return Component(role, f"random weights, seed {seed}", config, sha256, load)


def _tensor(role: str, name: str, shapes: Shapes, prefix: str, seed: str) -> torch.Tensor:
    """Generate a tensor: layers and embeddings keep variance 1, norms are 1 and 0, attention is far from uniform."""
    shape = shapes[prefix + name]
    weight = shapes.get(prefix + name.removesuffix("bias") + "weight", shape) if name.endswith("bias") else shape
    if name.endswith("scale_learnable") or (len(shape) == 1 and name.endswith("weight")):
        return torch.ones(shape)
    if name.endswith("bias") and len(weight) == 1:
        return torch.zeros(shape)
    is_embedding = ("embed" in name.split(".")[-2] and len(shape) == 2) or name.endswith("class_embedding")
    inputs = 1 if is_embedding else math.prod(weight[1:])
    bound = _gain(role, name) * math.sqrt(3 / inputs)
    digest = hashlib.sha256(f"{role}/{name}/{seed}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(np.frombuffer(digest, np.uint32)))
    values = torch.from_numpy(generator.random(shape, np.float32))
    return values.mul_(2 * bound).sub_(bound)


def _gain(role: str, name: str) -> float:
    if name.endswith("bias"):
        return 0.5
    if name.endswith((".to_q.weight", ".to_k.weight", ".q_proj.weight", ".k_proj.weight")):
        # Almost uniform attention would hide a wrong prompt, mask or reference from every test.
        return 1.5
    # This gives pictures of moderate contrast: after the last norm, the output's scale depends on this layer only.
    return 0.5 if role == VAE and name.startswith("decoder.conv_out.") else 1.0
