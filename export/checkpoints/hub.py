"""Download from huggingface.co with the huggingface_hub library, into its cache."""

from pathlib import Path

from export.bases import VAE_FILES, Base
from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line


def download_base(base: Base, roles: frozenset[str], vae: Path | None) -> tuple[Path, Path | None]:
    """Download a base's needed files; return their folder and its VAE: `vae` if given, else the one the base names.

    Files in the hub's cache are not downloaded again and need no network.

    Raises:
        CheckpointError: no network, or the hub lacks a file; the message says how to download by hand.
    """
    try:
        folder = _download(base.repository, base.files(roles))
        if vae is None and base.vae is not None and "vae" in roles:
            vae = _download(base.vae, VAE_FILES)
    except CheckpointError as error:
        raise CheckpointError(f"{base.name} is not here and {error}; {base.download_hint(roles)}") from None
    return folder, vae


def _download(repository: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:
        # The library, its HTTP client and the file system raise errors of many types.
        raise CheckpointError(f"could not be downloaded from {repository} ({first_line(error)})") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"{repository} lacks {', '.join(missing)}")
    return folder
