"""Trains the scorers on renders of held-in subjects, and writes them as ONNX."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.quality.scorers.cutouts import Picture, cutout
from benchmarks.quality.scorers.networks import Embedder, Reader
from benchmarks.quality.scorers.samples import Samples
from benchmarks.quality.scorers.scorer import MATERIALS
from benchmarks.quality.scorers.softening import Softener, hue_turned
from export.onnx_export import drop_metadata

_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2
_WARM_UP = 0.1
_READER_BATCH, _EMBEDDER_BATCH = 32, 36
# So many of a batch appear again in other colours, as subjects of their own: shape alone must not decide.
_RECOLOURED = 12
# In so many batches everything is gray: colour alone must not decide.
_GRAY_SHARE = 0.15
_TEMPERATURE = 0.07
_OPSET = 18


@dataclass(frozen=True)
class Plan:
    """How long to train: steps of 32 pictures for the reader, of 36 pairs for the embedder."""

    reader_steps: int = 700
    embedder_steps: int = 600
    seed: int = 0


def train_reader(samples: Samples, plan: Plan) -> Reader:
    """Train the reader on softened pictures."""
    torch.manual_seed(plan.seed)
    reader, soften = Reader().train(), Softener(plan.seed)
    pictures = samples.pictures_nkhwc.reshape(-1, *samples.pictures_nkhwc.shape[2:])
    masks = samples.masks_nkhw.reshape(-1, *samples.masks_nkhw.shape[2:])
    grounds, materials = (torch.from_numpy(a.reshape(-1)) for a in (samples.grounds_nk, samples.materials_nk))
    draws = np.random.default_rng(plan.seed)
    for step in _steps(reader, plan.reader_steps, "reader"):
        chosen = draws.choice(len(pictures), min(_READER_BATCH, len(pictures)), replace=False)
        softened, mask = soften(_planes(pictures[chosen]), torch.from_numpy(masks[chosen]).float())
        assert mask is not None
        ground, material, found = reader(softened.permute(0, 2, 3, 1))
        wanted = functional.avg_pool2d(mask[:, None], 4)[:, 0]
        loss = functional.cross_entropy(ground, grounds[chosen], label_smoothing=0.05)
        loss = loss + functional.cross_entropy(material, materials[chosen], label_smoothing=0.05)
        step.minimize(loss + 2 * functional.binary_cross_entropy_with_logits(found, wanted))
    return reader.eval()


def train_embedder(samples: Samples, reader: Reader, plan: Plan) -> Embedder:
    """Train the embedder: a photo is closest to the pictures of its own subject.

    The pictures' subjects are cut out as in the evaluation, with the reader's mask.
    """
    torch.manual_seed(plan.seed)
    embedder, soften = Embedder().train(), Softener(plan.seed + 1)
    pictures_nk = _cut_out(samples, reader, plan.seed)
    plain = samples.materials_nk == MATERIALS.index("none")
    draws = np.random.default_rng(plan.seed + 1)
    for step in _steps(embedder, plan.embedder_steps, "embedder"):
        chosen = draws.choice(len(plain), min(_EMBEDDER_BATCH, len(plain)), replace=False)
        which = [draws.choice(np.flatnonzero(plain[index])) for index in chosen]
        photos = _planes(samples.photos_nhwc[chosen])
        pictures = _planes(pictures_nk[chosen, which])
        photos, pictures = _recoloured(photos, pictures, draws)
        if draws.random() < _GRAY_SHARE:
            photos, pictures = (part.mean(1, keepdim=True).expand_as(part) for part in (photos, pictures))
        if draws.random() < 0.5:
            photos, pictures = photos.flip(3), pictures.flip(3)
        softened = [soften(part)[0].permute(0, 2, 3, 1) for part in (photos, pictures)]
        found = embedder(torch.cat(softened))
        one, other = found.chunk(2)
        similarity, own = one @ other.T / _TEMPERATURE, torch.arange(len(one))
        step.minimize(functional.cross_entropy(similarity, own) + functional.cross_entropy(similarity.T, own))
    return embedder.eval()


class _ReaderToExport(nn.Module):
    """The reader, with probabilities of the mask at the picture's size."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, picture_nhwc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ground, material, mask = self.reader(picture_nhwc)
        enlarged = functional.interpolate(mask[:, None], scale_factor=4.0, mode="bilinear", align_corners=False)
        return ground, material, torch.sigmoid(enlarged)[:, 0]


def reader_onnx(reader: Reader) -> bytes:
    """Return the reader as ONNX: picture_nhwc uint8 to ground, material, mask."""
    example = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
    return _onnx(_ReaderToExport(reader), example, "picture_nhwc", ["ground", "material", "mask"])


def embedder_onnx(embedder: Embedder) -> bytes:
    """Return the embedder as ONNX: cutout_nhwc uint8 to embedding."""
    return _onnx(embedder, torch.zeros(2, 64, 64, 3, dtype=torch.uint8), "cutout_nhwc", ["embedding"])


@dataclass(frozen=True)
class _Step:
    optimizer: torch.optim.Optimizer
    bar: "tqdm[int]"

    def minimize(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _steps(network: nn.Module, count: int, title: str) -> Iterator[_Step]:
    """Yield each training step; the learning rate rises for a tenth of them and then falls to zero."""
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    bar = tqdm(range(count), title, disable=None)
    for number in bar:
        done = (number + 1) / count
        rate = min(done / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - _WARM_UP) / (1 - _WARM_UP)))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        yield _Step(optimizer, bar)


def _cut_out(samples: Samples, reader: Reader, seed: int) -> Picture:
    """Soften all pictures and cut their subjects out, uint8 [N, K, 64, 64, RGB]."""
    soften, export = Softener(seed + 2), _ReaderToExport(reader)
    made = []
    for pictures in tqdm(samples.pictures_nkhwc, "cut out", disable=None):
        with torch.no_grad():
            softened = soften(_planes(pictures))[0].permute(0, 2, 3, 1).to(torch.uint8)
            masks = export(softened)[2]
        pairs = zip(softened.numpy(), masks.numpy(), strict=True)
        made.append(np.stack([cutout(picture, mask) for picture, mask in pairs]))
    return np.stack(made)


def _recoloured(photos: Tensor, pictures: Tensor, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Append the most colourful pairs once more, in other colours."""
    chroma = (photos - photos.mean(1, keepdim=True)).abs().mean((1, 2, 3))
    most = chroma.argsort(descending=True)[:_RECOLOURED]
    angles = torch.from_numpy(draws.uniform(math.pi / 3, 5 * math.pi / 3, len(most))).float()
    changed = [torch.cat([part, hue_turned(part[most], angles)]) for part in (photos, pictures)]
    return changed[0], changed[1]


def _planes(pictures_nhwc: Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures_nhwc)).permute(0, 3, 1, 2).float()


def _onnx(network: nn.Module, example: Tensor, name: str, outputs: list[str]) -> bytes:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        network.eval(),
        (example,),
        input_names=[name],
        output_names=outputs,
        opset_version=_OPSET,
        dynamic_shapes=({0: batch},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    drop_metadata(program.model)
    return _halved(program.model_proto).SerializeToString(deterministic=True)


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the weights in half precision, cast back to single where they are used."""
    graph = model.graph
    casts = []
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < 64:
            continue
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_half")
        casts.append(onnx.helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
        graph.initializer[index].CopyFrom(half)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
