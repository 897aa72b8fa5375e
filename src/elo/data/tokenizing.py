"""Text to token ids at the tokenizer's own rate, on one core or many.

This file also runs as a script of its own: each worker is a process that reads batches of text from its standard input
and writes token ids to its standard output. Plain child processes (rather than multiprocessing's) need no
`if __name__ == "__main__"` of the caller, inherit no locks or threads, and end by themselves when the parent is killed.
It imports nothing of elo, so that a worker starts in a fraction of a second.
"""

import contextlib
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TypeVar

import numpy as np
from tokenizers import Tokenizer

LONG_TEXT = 1 << 19
"""Characters from which a text is tokenised in pieces: the tokenizer needs some 200 bytes a character meanwhile."""
WINDOW = 1024
FEEDING_THREADS = 2

Batch = TypeVar("Batch")


def encode_documents(
    backend: Tokenizer, texts: list[str], prefix: int, eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise `texts` into one array of ``[prefix] text [eos]`` documents; and the length of each (int64)."""
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
    """Token ids of a text of any length, tokenised in pieces of about `piece` characters.

    It is cut at line ends, and only where tokenising a window across the cut gives the same tokens as tokenising its
    two sides apart. Tokenizers that split text before they merge allow that nearly everywhere; those that do not (a
    prefix space at every start of text, say) get the text whole.
    """
    ids: list[np.ndarray] = []
    start = 0
    while start < len(text):
        cut = _find_cut(backend, text, start + piece)
        encoding = backend.encode_batch_fast([text[start:cut]], add_special_tokens=False)[0]
        ids.append(np.array(encoding.ids, dtype=np.uint32))
        start = cut
    return np.concatenate(ids) if ids else np.zeros(0, np.uint32)


def _find_cut(backend: Tokenizer, text: str, at: int, tries: int = 8) -> int:
    for _ in range(tries):
        at = text.find("\n", at) + 1
        if at == 0:
            break
        if at < len(text) and text[at].isalnum():
            left, right = text[max(at - WINDOW, 0) : at], text[at : at + WINDOW]
            both, one, two = backend.encode_batch_fast([left + right, left, right], add_special_tokens=False)
            if both.ids == one.ids + two.ids:
                return at
    return len(text)


def write_frame(file: IO[bytes], *parts: bytes | memoryview) -> None:
    """Write byte strings with a header of their count and sizes."""
    file.write(struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)))
    for part in parts:
        file.write(part)
    file.flush()


def read_frame(file: IO[bytes]) -> list[bytes]:
    """Read what `write_frame` wrote; an empty list at the end of the stream."""
    header = file.read(8)
    if len(header) < 8:
        return []
    count = struct.unpack("<q", header)[0]
    sizes = struct.unpack(f"<{count}q", file.read(8 * count))
    return [file.read(size) for size in sizes]


def serve() -> None:
    """A worker's life: a first frame with the tokenizer, then a frame of token ids for every frame of text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    serialized, header, dtype_name = read_frame(source)
    backend = Tokenizer.from_str(serialized.decode())
    prefix, eos = struct.unpack("<2q", header)
    dtype = np.dtype(dtype_name.decode())
    while frame := read_frame(source):
        text = frame[1]
        ends = np.cumsum(np.frombuffer(frame[0], np.int64)).tolist()
        texts = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        tokens, lengths = encode_documents(backend, texts, prefix, eos, dtype)
        write_frame(sink, tokens.data.cast("B"), lengths.data.cast("B"))


class TokenizerPool:
    """Tokenises batches of UTF-8 texts, in order.

    With one worker it is this process, where the library's own threads use all cores, and two threads of ours feed them
    so that turning ids into arrays does not make them wait. Measured on 2 cores this costs 15 % less CPU than two
    processes. On many cores those threads get into each other's way; then `workers` processes of one thread each.
    """

    def __init__(self, backend: Tokenizer, prefix: int, eos: int, dtype: np.dtype, workers: int) -> None:
        self._backend, self._prefix, self._eos, self._dtype = backend, prefix, eos, dtype
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
                write_frame(process.stdin, serialized, header, self._dtype.str.encode())
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
                    with contextlib.suppress(OSError):  # what was still to be written goes with the process
                        pipe.close()
        self._processes = []

    def map(
        self, batches: Iterable[Batch], texts: Callable[[Batch], list[bytes]]
    ) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Yield (batch, token ids, document lengths) in the order of `batches`; a few batches are under way at once."""
        encode = self._remote if self.workers > 1 else self._local
        waiting: deque[tuple[Batch, Future]] = deque()
        for batch in batches:
            waiting.append((batch, self._threads.submit(encode, texts(batch))))
            if len(waiting) > 2 * max(self.workers, FEEDING_THREADS):
                done, future = waiting.popleft()
                yield done, *future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, *future.result()

    def _local(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        decoded = [text.decode() for text in texts]
        return encode_documents(self._backend, decoded, self._prefix, self._eos, self._dtype)

    def _remote(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            sizes = np.fromiter(map(len, texts), np.int64, len(texts))
            write_frame(process.stdin, sizes.data.cast("B"), b"".join(texts))
            reply = read_frame(process.stdout)
        except (OSError, ValueError):  # a broken pipe, or one that was closed
            reply = []
        finally:
            self._idle.put(process)  # a dead one too: who takes it next must fail rather than wait for another
        if not reply:
            raise WorkerDied(f"a tokenizing process ended with status {process.wait()}")
        return np.frombuffer(reply[0], self._dtype), np.frombuffer(reply[1], np.int64)


class WorkerDied(RuntimeError):
    """A tokenizing process is gone: killed, or out of memory."""


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        serve()
