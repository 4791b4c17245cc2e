"""Files read in parts: at a position, or as a stream that leaves parts out."""

import bisect
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

# Bytes, or the start and end of a range of a file.
Part = bytes | tuple[int, int]


@dataclass(frozen=True)
class SourceFile:
    """A file and its size."""

    stream: BinaryIO
    size: int

    def at(self, position: int, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the file."""
        self.stream.seek(min(position, self.size))
        return self.stream.read(count)

    def unpack(self, layout: str, position: int) -> tuple[int, ...]:
        return struct.unpack(layout, self.at(position, struct.calcsize(layout)))


class SplicedFile(io.RawIOBase):
    """Read-only view of parts of a file, one after the other."""

    def __init__(self, stream: BinaryIO, parts: Sequence[Part]) -> None:
        self._stream, self._parts, self._position = stream, parts, 0
        self._ends: list[int] = []
        for part in parts:
            length = len(part) if isinstance(part, bytes) else part[1] - part[0]
            self._ends.append((self._ends[-1] if self._ends else 0) + length)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1] if self._ends else 0}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        index = bisect.bisect_right(self._ends, self._position)
        if index == len(self._ends):
            return 0
        part, left = self._parts[index], self._ends[index] - self._position
        count = min(left, len(buffer))
        if isinstance(part, bytes):
            data = part[len(part) - left :][:count]
        else:
            self._stream.seek(part[1] - left)
            data = self._stream.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
