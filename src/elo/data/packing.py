"""Cut a corpus into sequences of `sequence_length` tokens: no token lost, seeded order, random access.

Sequence `i` is a pure function of (corpus, sequence length, seed, i). Each epoch concatenates the documents in a
shuffled order: shards are shuffled, then the documents inside each. Sequence `i` is the `i`-th run of T tokens in the
endless stream of epochs. T = sequence length.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from elo.data.shards import ShardArrays, TokenCorpus
from elo.errors import EloError

IGNORE_INDEX = -100
"""Label of a position without a target, the value that torch's cross-entropy ignores."""

CACHED_ORDERS = 4  # a sequence needs one or two shards' orders; the others serve reads slightly out of order


class PackedSequence(NamedTuple):
    """One training sequence, int64 [T] each.

    `shift_labels[t]` is the token after `input_ids[t]` in the same document, IGNORE_INDEX at a document's last token.
    `position_ids` restart at 0 at the start of every document and of the sequence. They are 0 at padding, so that the
    largest belongs to the document. Only unpacked sequences have an `attention_mask` (1 = token, 0 = padding).
    """

    input_ids: np.ndarray
    shift_labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None = None


class ShardOrder(NamedTuple):
    """Starts and lengths of a shard's documents in one epoch's order, int64 [documents]; `ends` [documents + 1]."""

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


def shuffled(count: int, *key: int) -> np.ndarray:
    """Return a permutation of range(count) determined by an integer key.

    Sort by SplitMix64 hashes instead of using numpy's generator: its permutations may change between versions, and a
    run must resume with the same sequences after an upgrade.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
        hashes = _splitmix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ state)
    return np.argsort(hashes, kind="stable")


def _splitmix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class _Stream:
    corpus: TokenCorpus
    sequence_length: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise EloError(f"sequence_length must be at least 1, got {self.sequence_length}")
        if self.corpus.num_tokens == 0:
            raise EloError(f"corpus {self.corpus.name!r}: has no documents; add text or remove the corpus")

    def _shard_order(self, epoch: int) -> np.ndarray:
        count = len(self.corpus.shards)
        return shuffled(count, self.seed, epoch) if self.shuffle else np.arange(count)

    @cached_property
    def _cached_order(self):  # type: ignore[no-untyped-def]  # a cache of this stream alone
        @lru_cache(maxsize=CACHED_ORDERS)
        def order(epoch: int, shard: int) -> ShardOrder:
            offsets = np.asarray(self.corpus.shards[shard].arrays.offsets)
            starts, lengths = offsets[:-1], np.diff(offsets)
            if self.shuffle:
                permutation = shuffled(len(starts), self.seed, epoch, shard)
                starts, lengths = starts[permutation], lengths[permutation]
            return ShardOrder(starts, lengths, np.concatenate([[0], np.cumsum(lengths)]))

        return order

    def __getstate__(self) -> dict[str, object]:
        """Return the state without caches, which cannot be pickled. The receiving process builds its own."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_cached")}


class PackedStream(_Stream):
    """An endless stream of packed sequences over one corpus.

    Sequence `i` is ``stream[i*T : (i+1)*T]``. Its labels are shifted by one token, so the target at its end is not
    lost. The last, partial sequence of an epoch is filled with the next epoch's first documents.
    """

    @property
    def sequences_per_epoch(self) -> float:
        """Number of sequences until every document has been read once."""
        return self.corpus.num_tokens / self.sequence_length

    @cached_property
    def _cached_ends(self):  # type: ignore[no-untyped-def]
        @lru_cache(maxsize=CACHED_ORDERS)
        def shard_ends(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            order = self._shard_order(epoch)
            tokens = np.array([shard.num_tokens for shard in self.corpus.shards], dtype=np.int64)[order]
            return order, np.concatenate([[0], np.cumsum(tokens)])

        return shard_ends

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` (>= 0) of the stream."""
        if index < 0:
            raise IndexError(f"sequence {index}")
        T = self.sequence_length
        sequence = PackedSequence(np.empty(T, np.int64), np.empty(T, np.int64), np.empty(T, np.int64))
        filled = 0
        epoch, position = divmod(index * T, self.corpus.num_tokens)
        while filled < T:
            order, ends = self._cached_ends(epoch)
            which = int(np.searchsorted(ends, position, side="right")) - 1
            if which == len(order):
                epoch, position = epoch + 1, 0
                continue
            shard = int(order[which])
            count = int(min(T - filled, ends[which + 1] - position))
            documents = self._cached_order(epoch, shard)
            arrays = self.corpus.shards[shard].arrays
            _fill(sequence, filled, count, arrays, documents, int(position - ends[which]))
            filled += count
            position += count
        return sequence


def _fill(sequence: PackedSequence, at: int, count: int, arrays: ShardArrays, order: ShardOrder, begin: int) -> None:
    """Copy `count` tokens of a shard to sequence[at:], beginning at token `begin` of the shard's shuffled order."""
    first = int(np.searchsorted(order.ends, begin, side="right")) - 1
    last = int(np.searchsorted(order.ends, begin + count, side="left"))
    ends = order.ends[first : last + 1] - begin
    # One entry per piece of a document: its begin in the sequence, and the distance to its tokens in the shard.
    piece_begins = np.maximum(ends[:-1], 0)
    lengths = np.minimum(ends[1:], count) - piece_begins
    inside = np.arange(count)
    source = inside + np.repeat(order.starts[first:last] - ends[:-1], lengths)
    end = at + count
    sequence.input_ids[at:end] = arrays.tokens[source]
    sequence.position_ids[at:end] = inside - np.repeat(piece_begins, lengths)
    # The target is the next token; that of the last token lies outside this run.
    sequence.shift_labels[at : end - 1] = sequence.input_ids[at + 1 : end]
    sequence.shift_labels[at + ends[1:-1] - 1] = IGNORE_INDEX
    at_document_end = ends[-1] == count
    sequence.shift_labels[end - 1] = IGNORE_INDEX if at_document_end else int(arrays.tokens[source[-1] + 1])


class PaddedStream(_Stream):
    """An endless stream of unpacked sequences: one piece of one document each, padded with the eos, attention masked.

    A document of L tokens makes ceil((L - 1) / T) sequences. Each of its tokens but the first is a target once.
    """

    @cached_property
    def _cached_counts(self) -> np.ndarray:
        """Number of sequences per shard, int64 [shards]."""
        shards = range(len(self.corpus.shards))
        return np.array([int(self._pieces(self.corpus.lengths(shard)).sum()) for shard in shards], dtype=np.int64)

    def _pieces(self, lengths: np.ndarray) -> np.ndarray:
        return np.maximum(-(-(lengths - 1) // self.sequence_length), 1)

    @property
    def sequences_per_epoch(self) -> float:
        """Number of sequences until every document has been read once."""
        return float(self._cached_counts.sum())

    @cached_property
    def _cached_piece_ends(self):  # type: ignore[no-untyped-def]
        @lru_cache(maxsize=CACHED_ORDERS)
        def piece_ends(epoch: int, shard: int) -> np.ndarray:
            return np.cumsum(self._pieces(self._cached_order(epoch, shard).lengths))

        return piece_ends

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` (>= 0) of the stream."""
        if index < 0:
            raise IndexError(f"sequence {index}")
        T = self.sequence_length
        epoch, left = divmod(index, int(self.sequences_per_epoch))
        order = self._shard_order(epoch)
        ends = np.cumsum(self._cached_counts[order])
        which = int(np.searchsorted(ends, left, side="right"))
        shard = int(order[which])
        left -= int(ends[which - 1]) if which else 0
        piece_ends = self._cached_piece_ends(epoch, shard)
        document = int(np.searchsorted(piece_ends, left, side="right"))
        piece = left - (int(piece_ends[document - 1]) if document else 0)
        documents = self._cached_order(epoch, shard)
        tokens = self.corpus.shards[shard].arrays.tokens
        start = int(documents.starts[document])
        stop = start + int(documents.lengths[document])
        begin = start + piece * T
        ids = np.asarray(tokens[begin : min(begin + T + 1, stop)], dtype=np.int64)
        sequence = PackedSequence(
            np.full(T, int(tokens[stop - 1]), np.int64),  # a document's last token is the eos
            np.full(T, IGNORE_INDEX, np.int64),
            np.zeros(T, np.int64),
            np.zeros(T, np.int64),
        )
        assert sequence.attention_mask is not None
        used = min(len(ids), T)
        sequence.position_ids[:used] = np.arange(used)
        sequence.input_ids[:used] = ids[:used]
        sequence.attention_mask[:used] = 1
        sequence.shift_labels[: len(ids) - 1] = ids[1:]
        return sequence
