"""Fetch the icon sets from npm and render them: `python -m examples.mini_moma data` begins with this."""

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from examples.mini_moma.icons import ICON_SIDE, Icon
from moma_rt.errors import InputError
from moma_rt.files import atomic_write
from moma_rt.outputs import writing

_CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
# Icons that are no single object: skies, maps, signs, papers, crosses and the like; and some that nobody wants to see.
_NO_OBJECT = re.compile(
    r"oclock|thirty|moon|chart|clock|calendar|map|sun|cloud|star|fog|rain|milky|wave|cityscape|bridge|rainbow|envelope"
    r"|page|memo|newspaper|bookmark|label|ticket|banknote|card|button|mail|tray|file|folder|clip|chains|spider-web"
    r"|comet|sparkle|fireworks|snowflake|cyclone|tornado|globe|desert|park|mount|volcano|beach|camping|night|window"
    r"|door|elevator|mirror|framed|hole|droplet|water-|wind|fire$|dvd|disk|barrier|stop|light-rail|medal|credit|scroll"
    r"|identif|paw|bouquet-|kaaba|mosque|synagogue|temple|shinto|church|place-of|prayer|menorah|amulet|coffin|funeral"
    r"|headstone|cigarette|syringe|blood|bomb|dagger|pistol|crossed|gun|pill|wireless|antenna|musical|muted|speaker-"
    r"|volume|latin|bell-with|low-battery|off$|arrow|linked|ballot|receipt|pencil|straight-ruler|triangular|flag"
)
_LEAST_PIXELS = 1500


@dataclass(frozen=True)
class IconSet:
    """A package of the npm registry; `integrity` is npm's SHA-512 of its archive."""

    style: str
    package: str
    version: str
    integrity: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NOTO = IconSet(
    "noto",
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
FLUENT = IconSet(
    "fluent",
    "@iconify-json/fluent-emoji",
    "1.2.7",
    "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
)


def render_icons(folder: Path) -> tuple[Icon, ...]:
    """Fetch both icon sets into `folder`, render what shows a single object, and write `folder`/icons.npz.

    Raises:
        InputError: resvg_py or npm is not installed, npm cannot fetch a package, or an archive has another hash.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise InputError("the package resvg_py is not installed; run: pip install resvg_py")
    sets = {icon_set: _icons_of(_fetched(icon_set, folder)) for icon_set in (NOTO, FLUENT)}
    # Only Noto's metadata has categories; the names are the same in both.
    categories = sets[NOTO]["metadata.json"]["categories"]
    names = sorted({name for category in _CATEGORIES for name in categories[category] if not _NO_OBJECT.search(name)})
    icons = tuple(
        icon
        for icon_set, files in sets.items()
        for icon in _rendered(icon_set.style, files["icons.json"], tqdm(names, f"render {icon_set.style}"))
    )
    path = folder / "icons.npz"
    with writing(path), atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            names=np.array([icon.name for icon in icons]),
            styles=np.array([icon.style for icon in icons]),
            rgba_nhwc=np.stack([icon.rgba_hwc for icon in icons]),
        )
    return icons


def _fetched(icon_set: IconSet, folder: Path) -> Path:
    path = folder / icon_set.archive
    if not path.exists():
        _fetch(icon_set, path)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != icon_set.integrity:
        raise InputError(f"{path} has hash {digest}, not {icon_set.integrity}; delete it and run this again")
    return path


def _fetch(icon_set: IconSet, path: Path) -> None:
    npm = shutil.which("npm")
    wanted = f"{icon_set.package}@{icon_set.version}"
    if npm is None:
        raise InputError(f"npm is not installed; install it, or put the npm package {wanted} at {path}")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = [npm, "pack", "--silent", wanted]
        result = subprocess.run(command, cwd=temporary, check=False, capture_output=True, text=True)
        if result.returncode != 0:
            raise InputError(f"npm cannot fetch {wanted} ({result.stderr.strip()[-200:]}); or put it at {path}")
        (Path(temporary) / icon_set.archive).replace(path)


def _icons_of(archive: Path) -> dict[str, Any]:
    """Read the JSON files of an archive, by name."""
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: member for member in tar if member.name.count("/") == 1}
        files = {}
        for name in ("icons.json", "metadata.json"):
            if name in members and (file := tar.extractfile(members[name])) is not None:
                files[name] = json.load(file)
    return files


def _rendered(style: str, icons: dict[str, Any], names: "tqdm[str]") -> Iterator[Icon]:
    # Installed only for this.
    from resvg_py import svg_to_bytes

    default_width, default_height = icons.get("width", 32), icons.get("height", 32)
    for name in names:
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        view = f"0 0 {icon.get('width', default_width)} {icon.get('height', default_height)}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{ICON_SIDE}" height="{ICON_SIDE}" viewBox="{view}">{icon["body"]}</svg>'
        )
        rgba_hwc = _cropped(Image.open(BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA"))
        if rgba_hwc is not None:
            yield Icon(name.replace("-", " "), style, rgba_hwc)


def _cropped(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Crop to what is visible, scaled to fill a square; None if that is too little."""
    visible = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0)
    if visible.histogram()[255] < _LEAST_PIXELS:
        return None
    image = image.crop(visible.getbbox())
    scale = ICON_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBA", (ICON_SIDE, ICON_SIDE))
    square.paste(
        image.resize((width, height), Image.Resampling.LANCZOS), ((ICON_SIDE - width) // 2, (ICON_SIDE - height) // 2)
    )
    return np.asarray(square)
