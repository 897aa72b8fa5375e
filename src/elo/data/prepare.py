"""`elo prepare`: tokenise corpora of several languages into token shards, once.

Mixing, weighting and packing happen when the shards are read, so changing them needs no new tokenisation. The folder
is complete once it has a manifest. Until then the same command resumes after the last finished shard.
"""

import fcntl
import os
import re
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from elo.data.corpora import CorpusTask, DocumentReader, Preparation, find_repeated, text_hash
from elo.data.filters import Filters
from elo.data.manifest import is_whole, judge_lost_text, make_manifest, reopen, reweigh, tell_totals
from elo.data.parallel import Parallel
from elo.data.ray_tasks import connected, tokenize_on_ray
from elo.data.shard_writer import Position
from elo.data.shards import MANIFEST, SPLITS, PreparedData
from elo.data.sources import list_inputs
from elo.data.tokenizer import TextTokenizer, load_tokenizer
from elo.errors import EloError
from elo.log import Progress, short
from elo.store.files import TEMPORARY_PREFIX, remove, sha256_json, write_json

LANGUAGE = re.compile(r"[\w-]+")
MARKER = "prepare.json"
"""Written first to mark the folder as prepare's, so that other folders are never changed."""
MIN_VALIDATION_DOCUMENTS = 30
BYTES_PER_WORKER = 4 << 20
"""Bytes of input on disk that justify starting one more process."""
CORES_OF_ONE_PROCESS = 8
"""Largest number of cores on which one process with threads tokenises. With more, each core gets a process
(see `elo.data.tokenizing.TokenizerPool`)."""


@dataclass(frozen=True)
class CorpusSource:
    """A corpus: a file (.jsonl, .txt, both also .gz or .zst; .parquet), folder, glob or Hugging Face dataset id."""

    path: str
    weight: float = 1.0
    """Number of passes over this corpus, relative to the other corpora of its language."""
    text_column: str = "text"
    name: str | None = None
    """Name of the corpus; None uses the name of the file or folder."""
    parallel: Parallel | None = None
    """How rows become documents, if they are sentences with their translations."""


def prepare(
    tokenizer: str | Path | TextTokenizer,
    corpora: Mapping[str, Sequence[CorpusSource | str] | CorpusSource | str],
    output: str | Path,
    *,
    heldout: Mapping[str, CorpusSource | str] | None = None,
    heldout_share: float = 0.005,
    validation_share: float = 0.0,
    workers: int | None = None,
    on_error: str = "stop",
    shard_tokens: int = 1 << 26,
    vocab_size: int | None = None,
    progress: bool = True,
    ray: str | None = None,
    overwrite: bool = False,
    split_special_tokens: bool = True,
    allow_lost_text: bool = False,
    filters: Filters | None = None,
    trust_remote_code: bool = False,
) -> PreparedData:
    """Tokenise `corpora` ({language: corpora}) into `output`.

    Args:
        tokenizer: checkpoint folder, hub id, or a loaded `TextTokenizer`.
        heldout: evaluation text by language. For other languages, `heldout_share` of the documents is held out, at
            least one document. Documents are chosen by a hash of their text, so copies of a document stay together.
        validation_share: share of each language's training documents to cut out as validation text, for choices such
            as learning rates. At least one in a hundred documents is cut out, up to 30. 0 cuts out none.
        workers: number of tokenising processes. Default: one process with threads on up to 8 cores, else one per core.
        on_error: "stop" at the first document that cannot be read, or "skip" and count such documents.
        shard_tokens: tokens per shard, which is the most work that a killed run has to repeat.
        vocab_size: rows of the model's embedding. Token ids outside it raise an error.
        ray: address of a Ray cluster whose nodes tokenise: `auto`, or host:port. The shards are the same. Each unit
            (256 MiB of files, or one larger file) is a task that takes `workers` CPUs, by default one.
        overwrite: replace finished data made from other inputs or settings.
        split_special_tokens: tokenise special tokens that occur in a document as text, not as special tokens.
        allow_lost_text: accept text even if the tokenizer loses more than 5 % of it. The loss is measured on the first
            documents, then on one in 16, and on all held-out text.
        filters: training documents to drop, which are counted in the manifest with examples. Default: none.

    Raises:
        EloError: bad input, named by file and line; or `output` holds other files.
    """
    if on_error not in ("stop", "skip"):
        raise EloError(f"on_error must be stop or skip, got {on_error!r}")
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise EloError(f"shard_tokens and workers must be at least 1, got {shard_tokens} and {workers}")
    if not 0 <= heldout_share < 1:
        raise EloError(f"heldout_share must be at least 0 and below 1 (share of documents), got {heldout_share}")
    if not 0 <= validation_share < 1:
        raise EloError(f"validation_share must be at least 0 and below 1 (share of documents), got {validation_share}")
    output = Path(output)
    tasks = _list_tasks(corpora, heldout or {})
    _check_output(output)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code)
    tokenizer = replace(tokenizer, split_special_tokens=split_special_tokens)
    if vocab_size is not None:
        tokenizer.check_embedding(vocab_size)
    with connected(ray) if ray is not None else nullcontext():
        tell = Progress(None, "prepare" if progress else None, "B").say
        known = _hashes_of_heldout(tasks, on_error)
        filters = filters or Filters()
        filters.check(corpora)
        tasks = _with_thresholds(tasks, heldout_share, validation_share, known, on_error, filters)
        repeated = find_repeated(tasks, on_error, filters)
        job = Preparation(
            output, tokenizer, shard_tokens, on_error, vocab_size, known, tell, allow_lost_text, filters, repeated
        )
        return _prepare(job, tasks, workers, show=progress, on_ray=ray is not None, overwrite=overwrite)


def _prepare(
    job: Preparation, tasks: list[CorpusTask], workers: int | None, *, show: bool, on_ray: bool, overwrite: bool
) -> PreparedData:
    output, existed = job.root, job.root.is_dir()
    plan = sha256_json([[task.folder, job.plan(task)] for task in tasks])
    with _locked(output):
        if (output / MANIFEST).is_file():
            finished = reopen(output, plan, job.on_error)
            if finished is not None:
                judge_lost_text(job, tasks, finished.manifest)
                return reweigh(finished, tasks)
            if not overwrite and is_whole(output):
                raise EloError(
                    f"{output}: holds finished data made from other inputs or settings; "
                    "choose another output, remove this one, or pass overwrite"
                )
            remove(output / MANIFEST)
        _sweep(output, tasks)
        for task in tasks:
            job.claim(task)
        try:
            _tokenize(job, tasks, workers, show, on_ray)
            manifest = make_manifest(job, tasks, plan)
            warnings = judge_lost_text(job, tasks, manifest)
            write_json(output / MANIFEST, manifest)
        except EloError:
            _remove_if_nothing_finished(output, existed)
            raise
        tell_totals(manifest, job.tell)
        for warning in warnings:
            job.tell(warning)
    return PreparedData.open(output)


def _list_tasks(
    corpora: Mapping[str, Sequence[CorpusSource | str] | CorpusSource | str], heldout: Mapping[str, CorpusSource | str]
) -> list[CorpusTask]:
    """List every corpus with its files, held-out text first, so that missing inputs are reported before any work."""
    if not corpora:
        raise EloError("no corpora; give at least one corpus for one language")
    tasks: list[CorpusTask] = []
    for split, given in (("heldout", heldout), ("train", corpora)):
        for language, sources in given.items():
            if not LANGUAGE.fullmatch(language):
                raise EloError(f"language name {language!r}: use only letters, digits, - and _")
            listed = [sources] if isinstance(sources, CorpusSource | str) else list(sources)
            if not listed:
                raise EloError(f"language {language!r}: has no corpus; give one or remove the language")
            names: set[str] = set()
            for index, item in enumerate(listed):
                source = CorpusSource(item) if isinstance(item, str) else item
                if not 0 <= source.weight < float("inf"):
                    raise EloError(f"{source.path}: weight must be a number of at least 0, got {source.weight}")
                name = _unique(source.name or _name_of(source.path), names)
                files = tuple(list_inputs(str(source.path)))
                if source.parallel and (text := [file for file in files if ".txt" in Path(file.location).suffixes]):
                    raise EloError(f"{text[0].location}: is plain text without columns; give .jsonl or .parquet")
                task = CorpusTask(language, split, index, name, source.weight, source.text_column, files)
                tasks.append(replace(task, parallel=source.parallel))
    return tasks


def _name_of(path: str) -> str:
    return re.sub(r"(\.jsonl|\.txt)?(\.gz|\.zst)?$|\.parquet$", "", Path(path).name) or str(path)


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def _check_output(output: Path) -> None:
    """Raise EloError unless `output` is new, empty, or was made by prepare."""
    if output.exists() and not output.is_dir():
        raise EloError(f"{output}: is a file; give a folder for the token shards")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise EloError(
            f"{output}: the folder is not empty and was not made by elo prepare; choose another output, or remove it"
        )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Create `output` and lock it for this process."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise EloError(f"{output}: cannot be written ({error.strerror}); choose another output") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EloError(
                f"{output}: another elo prepare is writing to it; wait for it, or choose another output"
            ) from None
        try:
            if not (output / MARKER).exists():
                write_json(output / MARKER, {"made_by": "elo prepare"})
        except OSError as error:
            raise EloError(f"{output}: cannot be written ({error.strerror}); choose another output") from None
        yield
    finally:
        os.close(descriptor)


def _hashes_of_heldout(tasks: list[CorpusTask], on_error: str) -> frozenset[bytes]:
    """Return the hashes of all documents given as held-out text, to find them in training text."""
    return frozenset(text_hash(text) for task in tasks if task.split == "heldout" for text in _texts(task, on_error))


def _texts(task: CorpusTask, on_error: str, filters: Filters | None = None) -> Iterator[bytes]:
    """Yield the documents of a corpus."""
    # Skipped documents are reported later, when the text is tokenised.
    reader = DocumentReader(task, list(task.files), on_error, frozenset(), lambda line: None, filters)
    for batch in reader.batches(Position()):
        yield from batch.texts


def _with_thresholds(
    tasks: list[CorpusTask],
    heldout_share: float,
    validation_share: float,
    known: frozenset[bytes],
    on_error: str,
    filters: Filters,
) -> list[CorpusTask]:
    """Set the thresholds that choose held-out documents (in languages without held-out text) and validation text."""
    given = {task.language for task in tasks if task.split == "heldout"}
    thresholds: dict[str, tuple[int, int]] = {}
    for language in sorted({task.language for task in tasks if task.split == "train"}):
        share = 0.0 if language in given else heldout_share
        if share or validation_share:
            own = [task for task in tasks if task.language == language and _can_be_cut(task)]
            if not own and share:
                raise EloError(f"{language!r} has only parallel corpora, which are never held out; give heldout text")
            if own:
                thresholds[language] = _thresholds(language, own, share, validation_share, known, on_error, filters)

    def threshold(task: CorpusTask, which: int) -> int:
        return thresholds.get(task.language, (0, 0))[which] if _can_be_cut(task) else 0

    return [replace(task, threshold=threshold(task, 0), validation_threshold=threshold(task, 1)) for task in tasks]


def _can_be_cut(task: CorpusTask) -> bool:
    """Return whether documents can be held out from a corpus; half of a parallel document is in another language."""
    return task.split == "train" and task.parallel is None


def _thresholds(
    language: str,
    tasks: list[CorpusTask],
    heldout_share: float,
    validation_share: float,
    known: frozenset[bytes],
    on_error: str,
    filters: Filters,
) -> tuple[int, int]:
    """Return the hash below which documents are held out, and the one below which further ones are validation text.

    Each range covers its share of all hashes. It is enlarged if it would contain too few documents: one held-out
    document, and one in a hundred as validation text (at least one, at most `MIN_VALIDATION_DOCUMENTS`). Enlarging
    never takes the last training document. Reading stops as soon as the thresholds are certain, so a large corpus adds
    hardly any time.
    """
    bound, span = int(heldout_share * 2**64), int(validation_share * 2**64)
    lowest, first, documents, several = 2**64, None, 0, False
    above: list[int] = []  # lowest hashes from `bound` up: one held-out, validation, and one training document
    for task in tasks:
        for text in _texts(task, on_error, filters):
            digest = text_hash(text)
            value = int.from_bytes(digest, "big")
            first = value if first is None else first
            documents, several = documents + 1, several or value != first
            lowest = min(lowest, value)
            new = value >= bound and digest not in known and value not in above
            if new and (len(above) < MIN_VALIDATION_DOCUMENTS + 2 or value < above[-1]):
                insort(above, value)
                del above[MIN_VALIDATION_DOCUMENTS + 2 :]
            held = not heldout_share or lowest < bound
            chosen = len(above) > MIN_VALIDATION_DOCUMENTS and above[MIN_VALIDATION_DOCUMENTS - 1] < bound + span
            if held and several and (chosen or not span):
                return bound, bound + span
    if not documents:
        raise EloError(
            f"{_paths(tasks)}: no document with text for {language!r}; check the files, text_column and filters"
        )
    if heldout_share and not several:
        raise EloError(
            f"{_paths(tasks)}: only one document for {language!r}, so none can be held out; "
            "give held-out text (heldout), or split the text into more documents"
        )
    if heldout_share and lowest >= bound:
        bound = lowest + 1
        above = [value for value in above if value >= bound]
    wanted = min(max(1, min(MIN_VALIDATION_DOCUMENTS, documents // 100)), len(above) - 1)
    if not span or wanted < 1:
        return bound, bound
    return bound, max(bound + span, above[wanted - 1] + 1)


def _paths(tasks: list[CorpusTask]) -> str:
    return ", ".join(dict.fromkeys(task.files[0].location for task in tasks))


def _shard_folders(output: Path) -> list[Path]:
    """Return the folders of all corpora, such as ko/train/0; the user may have put other files beside them."""
    return [folder for split in SPLITS for folder in output.glob(f"*/{split}/*") if folder.name.isdecimal()]


def _remove_shards(folders: Sequence[Path]) -> None:
    """Remove folders of shards, and the folders of their splits and languages if nothing is left in them."""
    for folder in folders:
        remove(folder)
    splits = {folder.parent for folder in folders}
    for parent in [*splits, *{split.parent for split in splits}]:
        if not any(parent.iterdir()):
            parent.rmdir()


def _sweep(output: Path, tasks: list[CorpusTask]) -> None:
    """Remove corpora that are no longer requested, and temporary files of killed runs."""
    wanted = {output / folder for task in tasks for folder in task.own_folders}
    _remove_shards([folder for folder in _shard_folders(output) if folder not in wanted])
    for leftover in output.rglob(f"{TEMPORARY_PREFIX}*"):
        remove(leftover)


def _tokenize(job: Preparation, tasks: list[CorpusTask], workers: int | None, show: bool, on_ray: bool) -> None:
    """Tokenise the missing parts of every corpus."""
    unknown = any(file.is_hub for task in tasks for file in task.files)
    total = sum(file.size for task in tasks for file in task.files)
    pending = [unit for task in tasks for unit in task.units if not job.state(unit).finished]
    if not pending:
        return
    done = total - sum(unit.size for unit in pending)
    progress = Progress(None if unknown else total, "prepare" if show else None, "B", done)
    if on_ray:
        try:
            with progress:
                tokenize_on_ray(job, pending, job.root / MARKER, workers or 1, progress)
        finally:
            _sweep(job.root, tasks)  # what lost nodes left
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = workers or (1 if cores <= CORES_OF_ONE_PROCESS else cores)
    if not unknown:
        processes = max(1, min(processes, (total - done) // BYTES_PER_WORKER))
    with progress, job.pool(processes) as pool:
        tokens = 0
        for unit in pending:
            for read, new_tokens in job.run_unit(unit, pool):
                tokens += new_tokens
                progress.update(done + read, f"{short(tokens)} tokens")
            done += unit.size


def _remove_if_nothing_finished(output: Path, existed: bool) -> None:
    """Remove what a run wrote that failed before its first shard was complete, and nothing else."""
    if any(output.glob("*/*/*/?????-?????.json")):
        return
    _remove_shards(_shard_folders(output))
    if [item.name for item in output.iterdir()] == [MARKER]:
        remove(output / MARKER)
        if not existed:
            output.rmdir()
