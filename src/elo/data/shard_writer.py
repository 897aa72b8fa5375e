"""Write token shards so that a process killed at any time loses at most the shard it was writing.

A corpus is divided into units (groups of whole input files) and each unit into segments of about `shard_tokens`
tokens. A segment's shards are written under temporary names and renamed. Its record is written last and holds the
position of the next segment.
"""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elo.data.filters import FILTERS
from elo.data.shards import SPECIALS_PER_DOCUMENT, SPLITS, shard_paths, shard_sizes
from elo.data.tokenizing import TextCounts
from elo.store.files import TEMPORARY_PREFIX, read_record, write_json

READER_COUNTS = ("skipped", "cut_files", "empty", "overlapping", *FILTERS)
"""Counts per segment besides its documents: unreadable documents, files that could not be read to the end, documents
without text, documents that are also in held-out text, and documents that each filter dropped."""
COUNTS = (*READER_COUNTS, *TextCounts._fields)
LEFT_OUT = ("skipped", "cut_files")
"""Counts that must be 0 unless unreadable input may be skipped."""


class ShardFile:
    """One shard being written, with its text if `keeps_text`. `finish` gives its files their final names."""

    def __init__(self, root: Path, name: str, dtype: np.dtype, *, keeps_text: bool) -> None:
        self.name = name
        self.num_tokens = 0
        self._dtype = dtype
        self._paths = shard_paths(root / name, has_text=keeps_text)
        # Unique, because a node that the cluster considers lost may still be writing the same shard.
        prefix = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-"
        self._temporary = [path.with_name(prefix + path.name) for path in self._paths]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._file, self._hash = self._temporary[0].open("wb"), hashlib.sha256()
        self._text_file, self._text_hash = self._temporary[3].open("wb") if keeps_text else None, hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []

    def append(self, tokens: np.ndarray, lengths: np.ndarray, texts: list[bytes]) -> None:
        """Add documents: their concatenated tokens, the number of tokens of each, and the text of each."""
        data = np.ascontiguousarray(tokens, self._dtype).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(lengths)
        self._sizes.append(np.fromiter(map(len, texts), np.int64, len(texts)))
        if self._text_file is not None:
            joined = b"".join(texts)
            self._text_file.write(joined)
            self._text_hash.update(joined)
        self.num_tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Rename the shard's files to their final names and return its manifest entry."""
        lengths, sizes = np.concatenate(self._lengths), np.concatenate(self._sizes)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tobytes()
        byte_lengths = sizes.astype("<i8").tobytes()
        _close(self._file)
        if self._text_file is not None:
            _close(self._text_file)
        for path, data in zip(self._temporary[1:3], (offsets, byte_lengths), strict=True):
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)
        return {
            "name": self.name,
            "documents": len(lengths),
            "tokens": self.num_tokens,
            "text_tokens": self.num_tokens - SPECIALS_PER_DOCUMENT * len(lengths),
            "bytes": int(sizes.sum()),
            "sha256": {
                "tokens": self._hash.hexdigest(),
                "offsets": hashlib.sha256(offsets).hexdigest(),
                "bytes": hashlib.sha256(byte_lengths).hexdigest(),
            }
            | ({"text": self._text_hash.hexdigest()} if self._text_file is not None else {}),
        }

    def discard(self) -> None:
        """Remove the temporary files."""
        self._file.close()
        if self._text_file is not None:
            self._text_file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)


def _left_out(record: dict[str, Any]) -> int:
    return sum(record["counts"][name] for name in LEFT_OUT)


def _close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@dataclass(frozen=True)
class Position:
    """Position at which reading resumes: a file of the unit and a record in it."""

    file: int = 0
    record: int = 0


@dataclass(frozen=True)
class UnitState:
    """State of a unit on disk: its finished segments, and whether the unit is complete."""

    segments: list[dict[str, Any]]
    finished: bool

    @property
    def position(self) -> Position:
        """Position at which the next segment begins."""
        return Position(*self.segments[-1]["next"]) if self.segments else Position()


class UnitWriter:
    """Writes one unit of a corpus, one segment after another.

    `folders` are relative to `root`, one for each of `SPLITS`: the corpus' own, such as "ko/train/0", then those of the
    documents cut out of it. Records are in the first folder. A corpus of held-out text writes only to its own folder,
    such as "ko/heldout/0", which then comes first.
    """

    def __init__(self, root: Path, folders: tuple[str, ...], unit: int, dtype: np.dtype, shard_tokens: int) -> None:
        self._root, self._unit, self._dtype, self._shard_tokens = root, unit, dtype, shard_tokens
        self._folders = folders
        self._keep_text = [folder.split("/")[1] != SPLITS[0] for folder in folders]
        self._records = root / folders[0]
        self._files: list[ShardFile | None] = [None] * len(SPLITS)
        self._counted = (0,) * len(COUNTS)
        self._segment = 0
        self.position = Position()
        self._latest = (self.position, self._counted)

    def resume(self, strict: bool, *, look: bool = False) -> UnitState:
        """Find the finished segments and continue after them; return the state of the unit.

        Args:
            strict: ignore segments that skipped unreadable input.
            look: change nothing on disk. Otherwise the records of segments that do not count are removed.
        """
        segments: list[dict[str, Any]] = []
        while (record := read_record(self._record_path(len(segments)), "counts")) is not None:
            if (strict and _left_out(record)) or not self._intact(record):
                break
            segments.append(record)
        end = read_record(self._end_path(), "counts")
        finished = end is not None and end.get("segments") == len(segments)
        finished = finished and not (strict and end is not None and _left_out(end))
        if not finished and not look:
            self._end_path().unlink(missing_ok=True)
            number = len(segments)
            while self._record_path(number).exists():
                self._record_path(number).unlink()
                number += 1
        state = UnitState([*segments, end] if finished and end is not None else segments, finished)
        self._segment = len(segments)
        self.position = state.position if not finished else Position()
        return state

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        texts: list[bytes],
        sides: np.ndarray,
        positions: list[Position],
        counts: list[tuple[int, ...]],
    ) -> None:
        """Add a batch of documents.

        Args:
            sides: index into `SPLITS` of each document.
            positions: position at which reading resumes after each document.
            counts: totals of the unit after each document.
        """
        self._latest = (positions[-1], counts[-1])
        begin, offsets = 0, np.concatenate([[0], np.cumsum(lengths)])
        while begin < len(lengths):
            held = sum(file.num_tokens for file in self._files if file is not None)
            # The segment ends with the first document that fills it.
            end = int(np.searchsorted(offsets, offsets[begin] + max(self._shard_tokens - held, 0), side="left"))
            full = end <= len(lengths)
            end = min(max(end, begin + 1), len(lengths))
            part = slice(begin, end)
            self._write(tokens[offsets[begin] : offsets[end]], lengths[part], texts[part], sides[part])
            if full:
                self._close_segment(positions[end - 1], counts[end - 1])
            begin = end

    def _write(self, tokens: np.ndarray, lengths: np.ndarray, texts: list[bytes], sides: np.ndarray) -> None:
        for side, folder in enumerate(self._folders):
            chosen = sides == side
            if not chosen.any():
                continue
            file = self._files[side]
            if file is None:
                name = f"{folder}/{self._unit:05d}-{self._segment:05d}"
                file = ShardFile(self._root, name, self._dtype, keeps_text=self._keep_text[side])
                self._files[side] = file
            if chosen.all():
                file.append(tokens, lengths, texts)
            else:
                kept = [texts[index] for index in np.flatnonzero(chosen)]
                file.append(tokens[np.repeat(chosen, lengths)], lengths[chosen], kept)

    def finish(self, counts: tuple[int, ...]) -> None:
        """Close the last segment and mark the unit as complete."""
        if any(self._files):
            self._close_segment(*self._latest)
        write_json(self._end_path(), {"segments": self._segment, "counts": self._new_counts(counts)})

    def discard(self) -> None:
        """Discard the segment being written."""
        for file in self._files:
            if file is not None:
                file.discard()
        self._files = [None] * len(SPLITS)

    def _close_segment(self, position: Position, counts: tuple[int, ...]) -> None:
        entries = [file.finish() if file is not None else None for file in self._files]
        self._files = [None] * len(SPLITS)
        self.position = position
        record = {
            "next": [position.file, position.record],
            "counts": self._new_counts(counts),
            **dict(zip(SPLITS, entries, strict=True)),
        }
        write_json(self._record_path(self._segment), record)
        self._segment += 1

    def _new_counts(self, counts: tuple[int, ...]) -> dict[str, int]:
        new = {name: now - before for name, now, before in zip(COUNTS, counts, self._counted, strict=True)}
        self._counted = counts
        return new

    def _record_path(self, segment: int) -> Path:
        return self._records / f"{self._unit:05d}-{segment:05d}.json"

    def _end_path(self) -> Path:
        return self._records / f"{self._unit:05d}.json"

    def _intact(self, record: dict[str, Any]) -> bool:
        for side in SPLITS:
            entry = record[side]
            if entry is None:
                continue
            sizes = shard_sizes(entry["tokens"], entry["documents"], entry["bytes"], self._dtype.itemsize)
            paths = shard_paths(self._root / entry["name"], has_text="text" in entry["sha256"])
            for path, size in zip(paths, sizes, strict=False):
                if not path.is_file() or path.stat().st_size != size:
                    return False
        return True
