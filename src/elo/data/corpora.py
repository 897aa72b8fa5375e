"""Turn the files of one corpus into token shards: read, cut out held-out documents, tokenise, write."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elo.data.filters import FILTERS, Filters
from elo.data.parallel import Parallel
from elo.data.shard_writer import READER_COUNTS, Position, UnitState, UnitWriter
from elo.data.shards import SCHEMA, SPLITS
from elo.data.sources import FileReader, InputFile, Record
from elo.data.text_loss import judge_loss
from elo.data.tokenizer import TextTokenizer
from elo.data.tokenizing import TextCounts, TokenizerPool, WorkerDied
from elo.errors import EloError
from elo.store.files import read_json, remove, sha256_json, write_json

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1 << 13
UNIT_BYTES = 1 << 28
"""Bytes on disk up to which small files share a unit; each larger file is one unit."""
SHOWN_PROBLEMS = 10
EXAMPLES, EXAMPLE_BYTES = 3, 200
"""Number of examples of what each filter dropped, and bytes kept of each."""
EXAMPLES_WITHIN = 1 << 26
"""Bytes of kept text after which the search for examples at the start of a corpus ends."""
FIRST_CHECKED, CHECKED_EVERY = 256, 16
"""Documents that are decoded again to measure lost text: the first ones of each unit, then one in `CHECKED_EVERY`."""
JUDGED_FROM = 1 << 20
"""Decoded bytes after which a corpus may be rejected before all of it is tokenised."""
PLAN = "plan.json"


def text_hash(text: bytes) -> bytes:
    """Return the 8-byte hash by which held-out documents are chosen and found in training text."""
    return hashlib.blake2b(text, digest_size=8).digest()


Repeated = dict[tuple[str, int], dict[tuple[int, int], None]]
"""Documents that repeat an earlier one: {(`CorpusTask.folder`, unit): {(file in the unit, record): None}}."""


@dataclass(frozen=True)
class CorpusTask:
    """One corpus to tokenise: its files, and which documents are cut out for evaluation."""

    language: str
    split: str
    """`train` or `heldout`."""
    index: int
    name: str
    weight: float
    text_column: str
    files: tuple[InputFile, ...]
    threshold: int = 0
    """Training documents whose hash (a big-endian integer) is below this are held out."""
    validation_threshold: int = 0
    """Documents whose hash is in [`threshold`, this) are validation text, unless they are also in held-out text."""
    parallel: Parallel | None = None
    """How rows become documents, if they are sentences with their translations."""

    @property
    def folder(self) -> str:
        """Folder of its shards, relative to the prepared folder."""
        return f"{self.language}/{self.split}/{self.index}"

    @property
    def cut_splits(self) -> list[str]:
        """Splits that receive documents cut out of this corpus."""
        return [
            split
            for split, below, up_to in (
                ("heldout", 0, self.threshold),
                ("validation", self.threshold, self.validation_threshold),
            )
            if below < up_to
        ]

    @property
    def folders(self) -> tuple[str, ...]:
        """`folder`, then the folders of the documents cut out of this corpus, in the order of `SPLITS`."""
        return (self.folder, *(f"{self.language}/{split}/{self.index}" for split in SPLITS[1:]))

    @property
    def own_folders(self) -> list[str]:
        """The subset of `folders` that this corpus writes to."""
        return [self.folder, *(f"{self.language}/{split}/{self.index}" for split in self.cut_splits)]

    @property
    def units(self) -> "list[Unit]":
        """The files, grouped into units that can be tokenised independently."""
        units: list[list[InputFile]] = []
        size = UNIT_BYTES
        for file in self.files:
            if not units or size + file.size > UNIT_BYTES or file.is_hub:
                units.append([])
                size = 0
            units[-1].append(file)
            size += file.size
        return [Unit(self, number, files) for number, files in enumerate(units)]

    def plan(
        self,
        tokenizer: TextTokenizer,
        shard_tokens: int,
        known_heldout: frozenset[bytes],
        filters: Filters,
        repeated: Repeated,
    ) -> dict[str, Any]:
        """Return everything that determines the shards' content. Finished shards are kept while it is unchanged."""
        own = {place: list(positions) for place, positions in repeated.items() if place[0] == self.folder}
        kept = {"filters": filters.plan(), "repeated": sha256_json(sorted(map(list, own.items())))}
        return {
            "schema": SCHEMA,
            "tokenizer": [tokenizer.sha256, tokenizer.prefix_token_id, tokenizer.eos_token_id],
            "split_special_tokens": tokenizer.split_special_tokens,
            "files": [file.fingerprint() for file in self.files],
            "text_column": self.text_column,
            "shard_tokens": shard_tokens,
            "threshold": self.threshold,
            "validation_threshold": self.validation_threshold,
            "heldout": sha256_json(sorted(item.hex() for item in known_heldout)) if self.split == "train" else "",
            **(kept if self.split == "train" and filters.plan() else {}),
            **({"parallel": self.parallel.identity()} if self.parallel else {}),
        }


@dataclass(frozen=True)
class Unit:
    """Files of a corpus that are tokenised independently of the others."""

    task: CorpusTask
    number: int
    files: list[InputFile]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        """The files, for messages."""
        others = len(self.files) - 1
        return self.files[0].location + (f" and {others} more file{'s' if others > 1 else ''}" if others else "")


@dataclass
class Batch:
    """A batch of documents for the tokenizer. `positions` and `counts` hold the state after each document."""

    texts: list[bytes] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    """Split of each document, as an index into `SPLITS`."""
    checked: list[bool] = field(default_factory=list)
    """Whether each document is decoded again. Depends only on its place in the files, so a resumed run agrees."""
    positions: list[Position] = field(default_factory=list)
    counts: list[tuple[int, ...]] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    size: int = 0


class DocumentReader:
    """Reads a unit's documents in batches of bounded size and counts what is skipped."""

    def __init__(
        self,
        task: CorpusTask,
        files: list[InputFile],
        on_error: str,
        known_heldout: frozenset[bytes],
        tell: Callable[[str], None],
        filters: Filters | None = None,
        repeated: Collection[tuple[int, int]] = (),
        dropped: Callable[[str, str, bytes], None] = lambda *_: None,
    ) -> None:
        self._filters = filters or Filters()
        self._repeated, self._dropped = repeated, dropped
        self._task, self._files, self._on_error, self._known = task, files, on_error, known_heldout
        self._report = tell
        self._num_reported = 0
        self._reader: FileReader | None = None
        self._before = 0
        self.counts: tuple[int, ...] = (0,) * len(READER_COUNTS)

    @property
    def bytes_read(self) -> int:
        """Bytes of this unit read from disk so far."""
        return self._before + (self._reader.bytes_read if self._reader is not None else 0)

    def _count(self, name: str) -> None:
        which = READER_COUNTS.index(name)
        self.counts = tuple(count + (i == which) for i, count in enumerate(self.counts))

    def batches(self, start: Position) -> Iterator[Batch]:
        """Yield batches of documents, beginning at `start`.

        Raises:
            EloError: a document cannot be read (unless `on_error` is "skip"). The message names file and line.
        """
        batch = Batch()
        hashed = self._task.split == "train" and (bool(self._task.cut_splits) or bool(self._known))
        for number, file in enumerate(self._files):
            if number < start.file:
                self._before += file.size
                continue
            parallel = self._task.parallel
            self._reader = FileReader(file, *(parallel.columns if parallel else (self._task.text_column,)))
            records = self._reader.records(start.record if number == start.file else 0)
            for record in parallel.documents(records) if parallel else records:
                if record.problem is not None:
                    self._handle(record)
                    continue
                text = record.text
                if not text or text.isspace():
                    self._count("empty")
                    continue
                if self._is_dropped(file, number, record):
                    continue
                side = 0
                if hashed:
                    digest = text_hash(text)
                    side = self._side(digest)
                    if digest in self._known:
                        self._count("overlapping")
                batch.texts.append(text)
                batch.sides.append(side)
                batch.checked.append(
                    "heldout" in (self._task.split, SPLITS[side])
                    or (number == 0 and record.number < FIRST_CHECKED)
                    or (number + record.number) % CHECKED_EVERY == 0
                )
                batch.positions.append(Position(number, record.number + 1))
                batch.counts.append(self.counts)
                batch.places.append((file.location, record.line))
                batch.size += len(text)
                if batch.size >= BATCH_BYTES or len(batch.texts) >= BATCH_DOCUMENTS:
                    yield batch
                    batch = Batch()
            self._before += file.size
            self._reader = None
        if batch.texts:
            yield batch

    def _is_dropped(self, file: InputFile, number: int, record: Record) -> bool:
        """Return whether a filter drops a training document, and count it."""
        if self._task.split != "train":
            return False
        # Half of a parallel document is in another language.
        reason = self._filters.reason(record.text, None if self._task.parallel else self._task.language)
        if reason is None and (number, record.number) in self._repeated:
            reason = "duplicate"
        if reason is not None:
            self._count(reason)
            self._dropped(reason, f"{file.location}:{record.line}", record.text)
        return reason is not None

    def _side(self, digest: bytes) -> int:
        value = int.from_bytes(digest, "big")
        if value < self._task.threshold:
            return SPLITS.index("heldout")
        chosen = value < self._task.validation_threshold and digest not in self._known
        return SPLITS.index("validation" if chosen else "train")

    def _handle(self, record: Record) -> None:
        problem = record.problem
        assert problem is not None
        if self._on_error != "skip":
            raise EloError(problem if record.ends_file else f"{problem} (set on_error: skip to skip such documents)")
        if record.ends_file:
            if record.loses_file:
                raise EloError(f"{problem} (on_error: skip applies to documents, not to whole files)")
            self._count("cut_files")
            self._report(f"warning: {problem}")
            return
        self._count("skipped")
        self._num_reported += 1
        if self._num_reported <= SHOWN_PROBLEMS:
            self._report(f"skipped: {problem}")
        if self._num_reported == SHOWN_PROBLEMS:
            self._report("further skipped documents are counted but not listed")


@dataclass(frozen=True)
class Preparation:
    """Settings that all corpora of one `prepare` share."""

    root: Path
    tokenizer: TextTokenizer
    shard_tokens: int
    on_error: str
    embedding_rows: int | None
    known_heldout: frozenset[bytes]
    tell: Callable[[str], None]
    allow_lost_text: bool = False
    filters: Filters = field(default_factory=Filters)
    repeated: Repeated = field(default_factory=dict)

    def writer(self, unit: Unit) -> UnitWriter:
        """Return the writer for a unit."""
        return UnitWriter(self.root, unit.task.folders, unit.number, self.tokenizer.dtype, self.shard_tokens)

    def plan(self, task: CorpusTask) -> dict[str, Any]:
        """Return everything that determines the shards of a corpus."""
        return task.plan(self.tokenizer, self.shard_tokens, self.known_heldout, self.filters, self.repeated)

    def pool(self, workers: int) -> TokenizerPool:
        """Return a pool of `workers` tokenising processes."""
        own = self.tokenizer
        return TokenizerPool(own.encoder, own.prefix_token_id, own.eos_token_id, own.dtype, workers, own.checker)

    def claim(self, task: CorpusTask) -> None:
        """Create the corpus' folder; report and remove data made from other inputs or settings."""
        folder = self.root / task.folder
        plan = self.plan(task)
        if (folder / PLAN).is_file():
            before = read_json(folder / PLAN)
            if before == plan:
                return
            changed = [key for key in plan if not isinstance(before, dict) or before.get(key) != plan[key]]
            self.tell(f"{folder}: made with a different {', '.join(changed)}; starting over")
        for own in task.own_folders:
            remove(self.root / own)
        folder.mkdir(parents=True)
        write_json(folder / PLAN, plan)

    def state(self, unit: Unit, *, look: bool = False) -> UnitState:
        """Return the state of a unit on disk.

        Records of segments that do not count are removed, unless `look` is set: their files may not be visible yet.
        """
        return self.writer(unit).resume(self.on_error != "skip", look=look)

    def run_unit(self, unit: Unit, pool: TokenizerPool) -> Iterator[tuple[int, int]]:
        """Tokenise the missing part of one unit; yield (bytes read from disk so far, tokens just written).

        Raises:
            EloError: bad input, a token id outside the embedding, a full disk, or a worker that died.
        """
        task, writer = unit.task, self.writer(unit)
        if writer.resume(self.on_error != "skip").finished:
            return
        known = self.known_heldout if task.split == "train" else frozenset()
        repeated = self.repeated.get((task.folder, unit.number), {})
        reader = DocumentReader(task, unit.files, self.on_error, known, self.tell, self.filters, repeated)
        found = np.zeros(len(TextCounts._fields), np.int64)
        batches = pool.map(reader.batches(writer.position), lambda batch: batch.texts, lambda batch: batch.checked)
        try:
            for batch, (tokens, lengths, text_counts) in batches:
                self._check_ids(tokens, lengths, batch)
                totals = (found + np.cumsum(text_counts, axis=0)).tolist()
                counts = [(*read, *total) for read, total in zip(batch.counts, totals, strict=True)]
                writer.append(tokens, lengths, batch.texts, np.array(batch.sides), batch.positions, counts)
                found = np.array(totals[-1])
                counted = TextCounts(*totals[-1])
                if counted.checked_bytes >= JUDGED_FROM:
                    self.judge(task, counted)
                yield reader.bytes_read, len(tokens)
            writer.finish((*reader.counts, *found.tolist()))
        except WorkerDied as error:
            raise EloError(
                f"{error}; it probably ran out of memory: use fewer workers and run the same command again, it resumes"
            ) from None
        except OSError as error:
            raise EloError(
                f"{self.root / task.folder}: cannot be written ({error.strerror or error}); "
                "free disk space and run the same command again, finished shards are kept"
            ) from None
        finally:
            writer.discard()

    def judge(self, task: CorpusTask, counts: TextCounts) -> str | None:
        """Return a warning if the tokenizer loses much of a corpus, else None.

        Raises:
            EloError: the tokenizer loses too much.
        """
        where = f"{task.files[0].location}{' and more files' if len(task.files) > 1 else ''} ({task.language})"
        return judge_loss(
            where,
            self.tokenizer.name,
            counts.lost_bytes,
            counts.checked_bytes,
            allowed=self.allow_lost_text,
            key="data.allow_lost_text: true",
        )

    def _check_ids(self, tokens: np.ndarray, lengths: np.ndarray, batch: Batch) -> None:
        rows = self.embedding_rows
        if rows is None or int(tokens.max()) < rows:
            return
        where = int(np.argmax(tokens >= rows))
        document = int(np.searchsorted(np.cumsum(lengths), where, side="right"))
        file, line = batch.places[document]
        raise EloError(
            f"{file}:{line}: tokenizer {self.tokenizer.name} gives token id {int(tokens[where])}, but the model has "
            f"{rows} embedding rows; give the tokenizer that belongs to the model"
        )


def find_repeated(tasks: list[CorpusTask], on_error: str, filters: Filters) -> Repeated:
    """Find the training documents that are equal to an earlier one of their language, in the order of `tasks`.

    This reads all text one additional time, so that the result depends neither on workers nor on where a run resumes.
    It takes about 100 bytes of memory per document.
    """
    repeated: Repeated = {}
    seen: dict[str, set[bytes]] = {}
    for task in tasks if filters.exact_duplicates else ():
        hashes = seen.setdefault(task.language, set())
        for unit in task.units if task.split == "train" else ():
            reader = DocumentReader(task, unit.files, on_error, frozenset(), lambda line: None, filters)
            for batch in reader.batches(Position()):
                for text, after in zip(batch.texts, batch.positions, strict=True):
                    digest = text_hash(text)
                    if digest in hashes:
                        repeated.setdefault((task.folder, unit.number), {})[after.file, after.record - 1] = None
                    hashes.add(digest)
    return repeated


def dropped_examples(job: Preparation, task: CorpusTask, counts: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """Return the first documents of a corpus that each filter drops: their places and first bytes, by filter."""
    wanted = {name: min(counts[name], EXAMPLES) for name in FILTERS if counts.get(name)}
    found: dict[str, list[dict[str, str]]] = {name: [] for name in wanted}

    def keep(name: str, place: str, text: bytes) -> None:
        if len(found[name]) < EXAMPLES:
            found[name].append({"place": place, "text": text[:EXAMPLE_BYTES].decode(errors="ignore")})

    size = 0
    for unit in task.units if wanted else ():
        repeated = job.repeated.get((task.folder, unit.number), {})
        reader = DocumentReader(
            task, unit.files, job.on_error, frozenset(), lambda line: None, job.filters, repeated, dropped=keep
        )
        for batch in reader.batches(Position()):
            size += batch.size
            if size > EXAMPLES_WITHIN or all(len(found[name]) >= number for name, number in wanted.items()):
                return found
    return found
