"""Runs the trained scorers with ONNX Runtime: what is the context, the material, and where is which subject?"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from benchmarks.quality.scorers.cutouts import Picture
from examples.mini_moma.backgrounds import CONTEXTS, SIDE, STUDIO
from examples.mini_moma.scenes import TEXTURES
from moma_rt.errors import InputError

Floats = npt.NDArray[np.float32]

FOLDER = Path(__file__).parent
READER, EMBEDDER, CARD = "reader.onnx", "embedder.onnx", "scorers.json"
# What the reader tells apart: a plain ground is none of the contexts, and most subjects are of no material.
GROUNDS = (*CONTEXTS, STUDIO)
MATERIALS = (*TEXTURES, "none")
EMBEDDING_WIDTH = 64
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Reading:
    """What the reader sees in N pictures.

    Attributes:
        grounds, materials: one of `GROUNDS`, and one of `MATERIALS`, for each picture.
        masks_nhw: probability that a pixel belongs to the subject, float32 [N, 128, 128].
    """

    grounds: tuple[str, ...]
    materials: tuple[str, ...]
    masks_nhw: Floats


class Scorers:
    """The two networks of a folder, by default the ones of this repository.

    Raises:
        InputError: the folder lacks one.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        missing = [name for name in (READER, EMBEDDER, CARD) if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} has no {', '.join(missing)}; train: python -m benchmarks.quality.scorers")
        self.card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        contents = [(folder / name).read_bytes() for name in (READER, EMBEDDER)]
        # Scores of other networks are not comparable.
        self.digest = hashlib.sha256(b"".join(contents)).hexdigest()[:16]
        self._reader, self._embedder = (_session(content) for content in contents)

    def read(self, pictures_nhwc: Picture) -> Reading:
        """Read pictures, uint8 [N, S, S, RGB]; other sizes than 128 are resized."""
        outputs = [self._reader.run(None, {"picture_nhwc": batch}) for batch in _batches(at_side(pictures_nhwc))]
        grounds, materials, masks = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return Reading(
            tuple(GROUNDS[index] for index in grounds.argmax(1)),
            tuple(MATERIALS[index] for index in materials.argmax(1)),
            masks,
        )

    def embed(self, cutouts_nhwc: Picture) -> Floats:
        """Embed cut-outs, uint8 [N, 64, 64, RGB], as unit vectors, float32 [N, 64]."""
        outputs = [self._embedder.run(None, {"cutout_nhwc": batch})[0] for batch in _batches(cutouts_nhwc)]
        return np.concatenate(outputs)


def _session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _batches(arrays: Picture) -> Iterator[Picture]:
    for start in range(0, len(arrays), _BATCH):
        yield arrays[start : start + _BATCH]


def at_side(pictures_nhwc: Picture) -> Picture:
    """Resize pictures, uint8 [N, S, S, RGB], to the reader's 128 pixels a side."""
    if pictures_nhwc.shape[1:3] == (SIDE, SIDE):
        return pictures_nhwc
    resized = (Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX) for picture in pictures_nhwc)
    return np.stack([np.asarray(image) for image in resized])
