"""Decompress gzip and Zstandard files, and explain why a file cannot be read."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import zstandard

BUFFER = 1 << 20
ZSTD_PIECE = 1 << 11
"""Bytes of Zstandard data that are unpacked at once. Four bytes can hold 128 KiB, so this is at most 64 MiB."""
LINE_LIMIT = 1 << 28
"""Bytes at which a line is too long to be a JSON document."""
MAX_WINDOW = 1 << 31
"""Largest accepted Zstandard window, in bytes (`zstd --long=31`). A reader keeps one window in memory."""

_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the data; fetch the data: git lfs pull",
    b"<!doctype html": "a web page instead of the data, such as a server's error page; fetch the file again",
    b"<html": "a web page instead of the data, such as a server's error page; fetch the file again",
    b"<?xml": "an XML page instead of the data, such as a server's error message; fetch the file again",
    b"\x1f\x8b": "compressed with gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; add .zst to its name",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; decompress it",
    b"\xfd7zXZ\x00": "compressed with xz; decompress it",
    b"\x04\x22\x4d\x18": "compressed with LZ4; decompress it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"ARROW1\0\0": "an Arrow file; write it as parquet",
    b"\xff\xfe\0\0": "not UTF-8 but UTF-32; convert it: iconv -f UTF-32 -t UTF-8 FILE",
    b"\0\0\xfe\xff": "not UTF-8 but UTF-32; convert it: iconv -f UTF-32 -t UTF-8 FILE",
    b"\xff\xfe": "not UTF-8 but UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE",
    b"\xfe\xff": "not UTF-8 but UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE",
}
_SKIPPABLE = tuple(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))  # frames without data
_EXPECTED = {".gz": (b"\x1f\x8b",), ".zst": (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), ".parquet": (b"PAR1", b"PARE")}
_FORMATS = {".gz": "compressed with gzip", ".zst": "compressed with Zstandard", ".parquet": "a parquet file"}


def wrong_kind(beginning: bytes, name: str) -> str | None:
    """Return what a file is and what to do if its first bytes contradict its name, else None."""
    if beginning.startswith(_EXPECTED.get(Path(name).suffix, ())):
        return None
    for start, kind in _BEGINNINGS.items():
        if beginning.startswith(start) or (start.startswith(b"<") and beginning.lower().lstrip().startswith(start)):
            if start.startswith((b"<", b"BZh", b"PAR1")) and ".txt" in name:  # plain text may begin with these
                continue
            return f"the file is {kind}"
    suffix = Path(name).suffix
    if suffix in _EXPECTED:
        return f"the file is not {_FORMATS[suffix]}; if it holds text, remove {suffix} from its name"
    if (beginning[:1] == b"\0") != (beginning[1:2] == b"\0"):  # ASCII in two bytes
        order = "BE" if beginning[:1] == b"\0" else "LE"
        return f"the file is not UTF-8 but UTF-16; convert it: iconv -f UTF-16{order} -t UTF-8 FILE"
    return None


def decompressed(raw: BinaryIO, name: str) -> Any:
    """Return the bytes of a file, decompressed if its name ends in .gz or .zst."""
    if name.endswith(".gz"):
        return io.BufferedReader(_GzipFile(raw), BUFFER)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(raw), BUFFER)
    return raw


def file_problem(error: Exception) -> str:
    """Explain why the rest of a file cannot be read and what to do. Only a damaged file is called damaged."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, MemoryError) or "not enough memory" in reason:
        return (
            "there is not enough memory to decompress the file; compress it again with a smaller window or row groups"
        )
    if "requires too much memory" in reason:
        return (
            f"the file is compressed with a window of more than {MAX_WINDOW >> 20:,} MiB, the supported maximum; "
            "decompress it on a machine with enough memory and compress it again with a smaller window"
        )
    if isinstance(error, zstandard.ZstdError) and "ictionary" in reason:
        return "the file is compressed with a Zstandard dictionary; decompress it with that dictionary (zstd -D)"
    if isinstance(error, pyarrow.ArrowNotImplementedError):
        return f"pyarrow cannot read this parquet file ({reason}); write it again with zstd or snappy compression"
    if "encrypt" in reason or "decrypt" in reason:
        return f"the parquet file is encrypted ({reason}); provide a decrypted copy"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the file cannot be read ({error.strerror}); check its permissions and the disk, then run again"
    if "Not a gzipped file" in reason or "Unknown frame descriptor" in reason:  # not at the start
        return "the compressed data ends here, but other bytes follow; fetch the file again, or cut them off"
    if isinstance(error, EOFError):
        return f"the file is damaged from here on: it is truncated ({reason}); fetch it again"
    return f"the file is damaged from here on ({reason}); replace it"


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of one or more frames. A truncated file raises EOFError."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            chunk = chunk or self._raw.read(ZSTD_PIECE)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            if self._frame is None or self._frame.eof:
                chunk = chunk.lstrip(b"\0")  # padding between and after frames
                self._frame = None
                if not chunk:
                    continue
                self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _GzipFile(io.RawIOBase):
    """Decompressed bytes of a gzip file, read piece by piece so that the data before a damaged part can be used."""

    def __init__(self, raw: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._file.read1(len(target))
        target[: len(data)] = data
        return len(data)
