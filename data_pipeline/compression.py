"""Files as streams of bytes: plain ones, and gzip and zstd ones decompressed while they are read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data_pipeline.errors import DataError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A block of 4 bytes can become 128 KiB, so a chunk becomes at most 32 MiB.
_CHUNK = 1 << 10


class Stream(NamedTuple):
    """Decompressed bytes, and the position in the file on disk."""

    file: BinaryIO
    position: Callable[[], int]


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """The content of a file, decompressed if its first bytes are those of gzip or zstd.

    Raises DataError, while it is read, for compressed data that are truncated or corrupt.
    """
    with path.open("rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        try:
            if head.startswith(GZIP):
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield Stream(cast(BinaryIO, io.BufferedReader(cast(Any, unzipped), 1 << 16)), raw.tell)
            elif head == ZSTD:
                yield Stream(cast(BinaryIO, io.BufferedReader(_Zstd(raw), 1 << 16)), raw.tell)
            else:
                yield Stream(raw, raw.tell)
        except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
            kind = "gzip" if head.startswith(GZIP) else "zstd"
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{path}: {kind} data that are truncated or corrupt: {reason}; copy the file again"
            ) from None


class _Zstd(io.RawIOBase):
    """Frames of zstd one after the other. Raises EOFError where the last one is cut off."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._buffer = memoryview(b"")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._buffer:
            chunk = self._pending or self._raw.read(_CHUNK)
            self._pending = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._new()
            self._buffer = memoryview(self._frame.decompress(chunk))
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        count = min(len(target), len(self._buffer))
        target[:count] = self._buffer[:count]
        self._buffer = self._buffer[count:]
        return count


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
