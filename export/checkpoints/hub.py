"""Downloading from huggingface.co, with its own library and into its own cache."""

from pathlib import Path

from export.bases import VAE_FILES, Base
from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line


def download_base(base: Base, roles: frozenset[str], vae: Path | None) -> tuple[Path, Path | None]:
    """The folder of a base's needed files, and its VAE: `vae` if given, else the folder of the one the base names.

    Files that are in the hub's cache are not downloaded again, and are found there without a network.

    Raises:
        CheckpointError: no network, or the hub lacks something; the message says what to put where by hand.
    """
    try:
        folder = _download(base.repository, base.files(roles))
        if vae is None and base.vae is not None and "vae" in roles:
            vae = _download(base.vae, VAE_FILES)
    except CheckpointError as error:
        raise CheckpointError(f"{base.name} is not here and {error}; {base.by_hand(roles)}") from None
    return folder, vae


def _download(repository: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:
        # The library, its HTTP client and the file system fail with errors of many types; none is a fault in here.
        raise CheckpointError(f"could not be downloaded from {repository} ({first_line(error)})") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"{repository} lacks {', '.join(missing)}")
    return folder
