"""The build's progress: a bar on a terminal, one line per network elsewhere."""

import sys
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_ENDS = ("kept", "built", "refitted")


class Progress:
    """Shows which network is at which stage, and how many of the networks and engines are finished."""

    def __init__(self, total: int, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._bar = tqdm(
            total=total,
            file=stream,
            disable=not stream.isatty(),
            bar_format="{desc:<36}|{bar:24}| {n_fmt}/{total_fmt}, {elapsed}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def report(self, network: str, state: str) -> None:
        """Show the stage that a network enters; stages that begin with "kept", "built" or "refitted" are its last."""
        if state.startswith((*_ENDS, "kernels", "dropped", "note")):
            tqdm.write(f"{network:<18} {state}", file=self._stream)
        if state.startswith(_ENDS):
            self._bar.update()
        # Last, because it always redraws the bar, while `update` right after another drawing does not.
        self._bar.set_description_str(f"{network}: {state}")
