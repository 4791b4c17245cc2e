"""The subjects: icons rendered by the data stage, and the names that training never sees."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moma_rt.errors import InputError

ICON_SIDE = 160
_HELDOUT = Path(__file__).with_name("heldout.txt")


@dataclass(frozen=True, eq=False)
class Icon:
    """A subject.

    Attributes:
        name: as in a prompt, such as "teddy bear".
        style: the icon set, "fluent" or "noto". Two styles of one name are different subjects.
        rgba_hwc: uint8 [160, 160, 4], cropped to the subject and centered.
    """

    name: str
    style: str
    rgba_hwc: npt.NDArray[np.uint8]


def heldout_names() -> frozenset[str]:
    """Return the names that training never sees, in either style (heldout.txt, fixed before the first training)."""
    lines = _HELDOUT.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def load_icons(folder: Path) -> tuple[Icon, ...]:
    """Read all icons, held-out ones too, from the folder that `python -m examples.mini_moma data` wrote.

    Raises:
        InputError: the folder has no icons.
    """
    try:
        with np.load(folder / "icons.npz", allow_pickle=False) as file:
            names, styles, rgba_nhwc = file["names"], file["styles"], file["rgba_nhwc"]
    except FileNotFoundError:
        raise InputError(f"{folder} has no icons.npz; first run: python -m examples.mini_moma data") from None
    return tuple(Icon(str(name), str(style), rgba) for name, style, rgba in zip(names, styles, rgba_nhwc, strict=True))
