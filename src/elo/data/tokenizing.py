"""Tokenise text at the full speed of the tokenizer, on one core or many.

This file also runs as a script: each worker is a process that reads batches of text from standard input and writes
token ids to standard output. Unlike multiprocessing's processes, such children need no `if __name__ == "__main__"` in
the caller, inherit no locks or threads, and end when the parent is killed. The file imports nothing from elo, so that
a worker starts in a fraction of a second.
"""

import contextlib
import json
import os
import queue
import re
import signal
import struct
import subprocess
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders

LONG_TEXT = 1 << 19
"""Characters from which a text is tokenised in pieces, because the tokenizer needs about 200 bytes per character."""
WINDOW = 1024
"""Characters on each side of a cut that are tokenised to verify it."""
FEEDING_THREADS = 2
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20
_PLACES_TO_CUT = [
    (re.compile(r"\n(?=\w)"), 0),
    (re.compile(r"\w(?= \w)"), 0),
    (re.compile(r"\w(?= \w)"), 1),
    (re.compile(r"."), 0),
]
"""Patterns that end where a piece may end, and the number of characters to drop there."""

CHECKED_CHARACTERS = 1 << 16
"""Characters at the start of a document that are decoded again to find lost text."""

Batch = TypeVar("Batch")


class TextCounts(NamedTuple):
    """Counts of a text, taken while it is tokenised."""

    special_tokens: int
    """Number of special tokens that occur in the text."""
    checked_bytes: int
    """UTF-8 bytes that were decoded again."""
    lost_bytes: int
    """Bytes among `checked_bytes` that decoding does not restore."""


class TextChecker:
    """Counts special tokens that occur in text, and text that is lost by encoding and decoding.

    Args:
        backend: the tokenizer as loaded.
        special_tokens: strings to search for.
    """

    def __init__(self, backend: Tokenizer, special_tokens: Sequence[str]) -> None:
        self.special_tokens = list(special_tokens)
        self.backend = backend
        state = json.loads(backend.to_str())
        unknown = state["model"].get("unk_id")
        if (token := state["model"].get("unk_token")) is not None:
            unknown = backend.token_to_id(token)
        self._unknown = -1 if unknown is None else int(unknown)
        if state["decoder"] is None and (decoder := _missing_decoder(state)) is not None:
            self.backend = Tokenizer.from_str(backend.to_str())
            self.backend.decoder = decoder
        kind = "Joined" if self.backend.decoder is None else (state["decoder"] or {}).get("type")
        self._ignores_space = kind in ("Joined", "WordPiece")
        # Special tokens by their first two characters: texts without any of these are quickly excluded.
        self._by_start: dict[str, tuple[set[str], list[int]]] = {}
        for start in {token[:2] for token in special_tokens if token}:
            tokens = {token for token in special_tokens if token.startswith(start)}
            self._by_start[start] = tokens, sorted({len(token) for token in tokens}, reverse=True)
        self._start = re.compile("|".join(re.escape(start) for start in sorted(self._by_start, key=len, reverse=True)))

    def count(
        self, encoder: Tokenizer, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray, checked: np.ndarray
    ) -> np.ndarray:
        """Return the `TextCounts` of each text, int64 [texts, 3]; only `checked` texts (bool [texts]) are decoded.

        `tokens` and `lengths` are the result of `encode_documents` for these texts and `encoder`.
        """
        counts = np.zeros((len(texts), 3), np.int64)
        ends = np.cumsum(lengths)
        parts, decodable = [], []
        for index, text in enumerate(texts):
            counts[index, 0] = self._count_special_tokens(text)
            if checked[index]:
                ids = tokens[ends[index] - lengths[index] + 1 : ends[index] - 1]
                if len(text) > CHECKED_CHARACTERS:
                    text = text[:CHECKED_CHARACTERS]
                    ids = np.array(encoder.encode(text, add_special_tokens=False).ids)
                parts.append((index, text))
                decodable.append(ids[ids != self._unknown].tolist())
        decoded = self.backend.decode_batch(decodable, skip_special_tokens=False)
        for (index, text), back in zip(parts, decoded, strict=True):
            counts[index, 1] = len(text.encode())
            counts[index, 2] = lost_bytes(text, back, ignore_space=self._ignores_space)
        return counts

    def _count_special_tokens(self, text: str) -> int:
        if not any(start in text for start in self._by_start):
            return 0
        count, position = 0, 0
        while found := self._start.search(text, position):
            tokens, sizes = self._by_start[found.group()]
            size = next((size for size in sizes if text[found.start() : found.start() + size] in tokens), 0)
            count += size > 0
            position = found.start() + (size or 1)
        return count


def lost_bytes(text: str, decoded: str, *, ignore_space: bool = False) -> int:
    """Count the UTF-8 bytes of `text` that are missing in `decoded`, character by character.

    Neither canonical composition (NFC) nor white space added by the decoder counts as a loss.
    """
    if text == decoded:
        return 0
    ours, theirs = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", decoded)
    missing = Counter(ours) - Counter(theirs)
    lost = sum(
        times * len(character.encode())
        for character, times in missing.items()
        if not (ignore_space and character.isspace())
    )
    return round(lost * len(text.encode()) / len(ours.encode()))


def _missing_decoder(state: dict) -> decoders.Decoder | None:
    """Return the decoder that fits a tokenizer whose file has none; None if its tokens are words."""
    before = json.dumps([state["pre_tokenizer"], state["normalizer"]], ensure_ascii=False)
    if '"ByteLevel"' in before:
        return decoders.ByteLevel()
    if '"Metaspace"' in before or "\N{LOWER ONE EIGHTH BLOCK}" in before:
        space = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        return decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    return None


def encode_documents(
    backend: Tokenizer, texts: list[str], prefix: int, eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise `texts` into one array of ``[prefix] text [eos]`` documents; return it and their lengths (int64)."""
    encodings = backend.encode_batch_fast(
        [text if len(text) < LONG_TEXT else "" for text in texts], add_special_tokens=False
    )
    pieces = [
        encoding.ids if len(text) < LONG_TEXT else encode_long(backend, text)
        for text, encoding in zip(texts, encodings, strict=True)
    ]
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 2
    tokens = np.empty(int(lengths.sum()), dtype)
    position = 0
    for ids in pieces:
        end = position + 1 + len(ids)
        tokens[position] = prefix
        tokens[position + 1 : end] = ids
        tokens[end] = eos
        position = end + 1
    return tokens, lengths


def encode_long(backend: Tokenizer, text: str, piece: int = LONG_TEXT // 2) -> np.ndarray:
    """Tokenise a text of any length in pieces of about `piece` characters; return its token ids.

    A cut is valid if tokenising a window across it gives the same tokens as tokenising both sides separately. Cuts are
    tried at line ends, before a space, at a space (dropped, for tokenizers that add one at the start of a text), and
    between any two characters. If none of those tried is valid, the text is cut anyway: memory stays bounded, and only
    the tokens next to the cut may differ.
    """
    ids: list[np.ndarray] = []
    start = 0
    while start < len(text):
        stop, after = _find_cut(backend, text, start + piece)
        encoding = backend.encode_batch_fast([text[start:stop]], add_special_tokens=False)[0]
        ids.append(np.array(encoding.ids, dtype=np.uint32))
        start = after
    return np.concatenate(ids) if ids else np.zeros(0, np.uint32)


def _find_cut(backend: Tokenizer, text: str, at: int, tries: int = 8) -> tuple[int, int]:
    """Return where the piece ends, at or after `at`, and where the next begins (one further if a space is dropped)."""
    if at >= len(text):
        return len(text), len(text)
    furthest = min(len(text), at + LONG_TEXT // 4)
    for pattern, dropped in _PLACES_TO_CUT:
        for number, found in enumerate(pattern.finditer(text, at, furthest)):
            if number == tries:
                break
            stop, after = found.end(), found.end() + dropped
            left, right = text[max(stop - WINDOW, 0) : stop], text[after : after + WINDOW]
            across = text[max(stop - WINDOW, 0) : after + WINDOW]
            both, one, two = backend.encode_batch_fast([across, left, right], add_special_tokens=False)
            if both.ids == one.ids + two.ids:
                return stop, after
    return at, at


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in batches of 256 texts or about a million characters, so that tokenising takes little memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_ids(backend: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return the token ids of each text, without special tokens. Long texts are tokenised in pieces."""
    tokens, lengths = encode_documents(backend, texts, 0, 0, np.dtype(np.uint32))
    return [framed[1:-1] for framed in np.split(tokens, np.cumsum(lengths)[:-1])]


def write_frame(file: IO[bytes], *parts: bytes | memoryview) -> None:
    """Write byte strings, preceded by a header with their number and sizes."""
    file.write(struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)))
    for part in parts:
        file.write(part)
    file.flush()


def read_frame(file: IO[bytes]) -> list[bytes]:
    """Read a frame that `write_frame` wrote; return an empty list if the stream ends before the frame does."""
    header = file.read(8)
    if len(header) < 8:
        return []
    count = struct.unpack("<q", header)[0]
    packed = file.read(8 * count)
    if len(packed) < 8 * count:
        return []
    sizes = struct.unpack(f"<{count}q", packed)
    parts = [file.read(size) for size in sizes]
    return parts if tuple(map(len, parts)) == sizes else []


def serve() -> None:
    """Run a worker: read the tokenizer from the first frame, then answer every frame of text with its token ids."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    serialized, header, dtype_name, as_loaded, special_tokens = read_frame(source)
    backend = Tokenizer.from_str(serialized.decode())
    checker = TextChecker(Tokenizer.from_str(as_loaded.decode()), json.loads(special_tokens))
    prefix, eos = struct.unpack("<2q", header)
    dtype = np.dtype(dtype_name.decode())
    while frame := read_frame(source):
        text = frame[1]
        ends = np.cumsum(np.frombuffer(frame[0], np.int64)).tolist()
        texts = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        tokens, lengths = encode_documents(backend, texts, prefix, eos, dtype)
        counts = checker.count(backend, texts, tokens, lengths, np.frombuffer(frame[2], np.bool_))
        write_frame(sink, *(array.data.cast("B") for array in (tokens, lengths, counts)))


class Tokenized(NamedTuple):
    """Concatenated token ids of a batch of documents, their lengths (int64), and their `TextCounts` (int64)."""

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


class TokenizerPool:
    """Tokenises batches of UTF-8 texts in order, and collects the counts of `checker`.

    With one worker, this process tokenises: the library's threads use all cores, and two threads of the pool keep them
    busy while ids become arrays. On two cores this took 15 % less CPU time than two processes. On many cores the
    library's threads slow each other down, so that `workers` processes with one thread each are faster.
    """

    def __init__(
        self, backend: Tokenizer, prefix: int, eos: int, dtype: np.dtype, workers: int, checker: TextChecker
    ) -> None:
        self._backend, self._prefix, self._eos, self._dtype = backend, prefix, eos, dtype
        self._checker = checker
        self.workers = workers
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers if workers > 1 else FEEDING_THREADS)

    def __enter__(self) -> "TokenizerPool":
        if self.workers > 1:
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
            serialized = self._backend.to_str().encode()
            for _ in range(self.workers):
                process = subprocess.Popen(
                    [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
                self._processes.append(process)
            for process in self._processes:
                assert process.stdin is not None
                header = struct.pack("<2q", self._prefix, self._eos)
                check = (self._checker.backend.to_str().encode(), json.dumps(self._checker.special_tokens).encode())
                write_frame(process.stdin, serialized, header, self._dtype.str.encode(), *check)
                self._idle.put(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # unwritten data is dropped with the process
                        pipe.close()
        self._processes = []

    def map(
        self,
        batches: Iterable[Batch],
        texts: Callable[[Batch], list[bytes]],
        checked: Callable[[Batch], list[bool]] | None = None,
    ) -> Iterator[tuple[Batch, Tokenized]]:
        """Yield each batch with its tokens, in the order of `batches`. Several batches are processed at once.

        Args:
            texts: returns the documents of a batch.
            checked: returns which of them are decoded again; None decodes all.
        """
        encode = self._remote if self.workers > 1 else self._local
        waiting: deque[tuple[Batch, Future[Tokenized]]] = deque()
        for batch in batches:
            documents = texts(batch)
            which = np.ones(len(documents), np.bool_) if checked is None else np.array(checked(batch), np.bool_)
            waiting.append((batch, self._threads.submit(encode, documents, which)))
            if len(waiting) > 2 * max(self.workers, FEEDING_THREADS):
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()

    def _local(self, texts: list[bytes], checked: np.ndarray) -> Tokenized:
        decoded = [text.decode() for text in texts]
        tokens, lengths = encode_documents(self._backend, decoded, self._prefix, self._eos, self._dtype)
        return Tokenized(tokens, lengths, self._checker.count(self._backend, decoded, tokens, lengths, checked))

    def _remote(self, texts: list[bytes], checked: np.ndarray) -> Tokenized:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            sizes = np.fromiter(map(len, texts), np.int64, len(texts))
            write_frame(process.stdin, sizes.data.cast("B"), b"".join(texts), checked.data.cast("B"))
            reply = read_frame(process.stdout)
        except (OSError, ValueError):  # a broken pipe, or one that was closed
            reply = []
        finally:
            self._idle.put(process)  # even if dead, so that the next caller fails instead of waiting forever
        if not reply:
            raise WorkerDied(f"a tokenizing process ended with status {process.wait()}")
        counts = np.frombuffer(reply[2], np.int64).reshape(-1, len(TextCounts._fields))
        return Tokenized(np.frombuffer(reply[0], self._dtype), np.frombuffer(reply[1], np.int64), counts)


class WorkerDied(RuntimeError):
    """A tokenizing process ended: it was killed, or ran out of memory."""


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        serve()
