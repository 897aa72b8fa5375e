"""Bits per byte of a token corpus under a causal LM, which can be compared across tokenizers.

Shapes: B sequences, T positions.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import is_recurrent
from elo.data.packing import IGNORE_INDEX
from elo.data.shards import SPECIALS_PER_DOCUMENT, TokenCorpus
from elo.errors import EloError
from elo.evaluate.scoring import (
    batch_tokens,
    check_ids,
    evaluating,
    forward_logits,
    longest_sequence,
    rope_regime,
    takes_position_ids,
    token_nats,
    vocabulary_size,
)
from elo.log import Progress


@dataclass(frozen=True)
class BitsPerByte:
    """The bits that a model needs per byte of text. Lower is better; guessing each byte at random gives 8.

        bits_per_byte = summed nats of the text tokens / (ln 2 x UTF-8 bytes of the text)

    Every text token is predicted exactly once, from the prefix token and the preceding text tokens of its document. A
    document of more than `sequence_length` text tokens is cut into pieces of that many predictions. A piece sees
    nothing of the pieces before it, except the last token. The prefix token and the end-of-text token are not
    predicted, so the sum covers exactly the bytes that it is divided by.

    The value depends on the model, the text and the sequence length, but not on batch size, document order or packing.
    Compare it across tokenizers, never across languages: a Korean syllable takes three bytes, an English letter one.
    """

    nats: float
    """Summed negative log-likelihood of the text tokens, in nats."""
    text_tokens: int
    """Number of text tokens, each predicted once."""
    bytes: int
    """Size of the text in UTF-8, in bytes."""
    documents: int
    """Number of documents."""
    document_nats: tuple[float, ...]
    """`nats` of each document, in the order of the corpus."""
    document_bytes: tuple[int, ...]
    """`bytes` of each document."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


class _Piece(NamedTuple):
    """Predictions [start, stop) of a document: inputs are its ids [start, stop), labels its ids [start+1, stop+1)."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def bits_per_byte(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    *,
    sequence_length: int,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: str | None = None,
) -> BitsPerByte:
    """Measure the bits per byte of `corpus`; see `BitsPerByte` for the definition.

    If the model keeps packed documents apart, which is tested by running it, several documents share a sequence. Other
    models, such as recurrent ones, get one document per sequence. Sequences share a batch only if the longest one does
    not change how the others are computed (`rope_regime`). None of this affects the value.

    Args:
        model: any causal LM, in any mode and dtype. Mode and dtype are restored.
        corpus: documents as token ids, on disk or in memory (`TokenCorpus.from_documents`). All of them are measured;
            `elo.data.heldout.cut_corpus` takes a part of a larger corpus.
        sequence_length: length of a sequence in tokens, at most the model's number of positions.
        batch_size: sequences of `sequence_length` per forward pass; by default as many as keep fp32 logits within
            1 GiB.
        device: device to move the model to; by default the one that it is on.
        autocast_dtype: compute dtype, for models with weights in another dtype.
        progress: label of the progress bar; None shows none.

    Raises:
        EloError: the corpus has no text, a token id has no row in the embedding, or `sequence_length` is beyond the
            model's positions.
    """
    limit = longest_sequence(model)
    if sequence_length < 1 or (limit is not None and sequence_length > limit):
        allowed = f"the model has {limit} positions; write a number from 1 to {limit}" if limit else "write at least 1"
        raise EloError(f"sequence_length: got {sequence_length}; {allowed}")
    pieces = _pieces(corpus, sequence_length)
    text_tokens, num_bytes, count = corpus.num_text_tokens, corpus.num_bytes, corpus.num_documents
    if not pieces or not num_bytes:
        raise EloError(f"the corpus to evaluate has no text ({count} documents, {num_bytes} bytes); give another one")
    tokens_per_batch = batch_size * sequence_length if batch_size else batch_tokens(model)
    document_nats = np.zeros(count)
    with evaluating(model, device, autocast_dtype) as place, Progress(text_tokens, progress, "tokens") as bar:
        packed = not rope_regime(model.config, sequence_length)
        packed = packed and isolates_documents(model, place)
        sequences = _pack(pieces, sequence_length) if packed else [[piece] for piece in pieces]
        for batch in _batches(sequences, tokens_per_batch, partial(rope_regime, model.config)):
            arrays = _collate(corpus, batch)
            check_ids(int(arrays["input_ids"].max()), model, "the corpus to evaluate")
            tensors = {name: torch.from_numpy(array).to(place) for name, array in arrays.items()}
            labels_BT = tensors.pop("labels")
            tensors.pop("attention_mask" if packed else "position_ids")
            nats_BT = token_nats(forward_logits(model, **tensors), labels_BT).numpy()
            for sequence, nats_T in zip(batch, nats_BT, strict=True):
                at = 0
                for piece in sequence:
                    document_nats[piece.document] += nats_T[at : at + piece.length].sum()
                    at += piece.length
            bar.advance(int((arrays["labels"] != IGNORE_INDEX).sum()))
    by_document = tuple(document_nats.tolist())
    sizes = tuple(corpus.document_sizes.tolist())
    return BitsPerByte(sum(by_document), text_tokens, num_bytes, count, by_document, sizes)


def isolates_documents(model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether packed documents, separated by `position_ids` that restart at 0, leave each other's logits alone.

    The test runs two sequences that differ only in their first document, and their second document alone. Recurrent
    layers carry state across the boundary, and some attention kernels find it only in batches of one sequence. Layers
    that pool windows longer than these documents would pass, so recurrent models are excluded by their type first.
    """
    if is_recurrent(model) or not takes_position_ids(model):
        return False
    ids = torch.arange(24, device=device).mul(7).add(3).remainder(vocabulary_size(model)).view(3, 8)
    packed_BT = torch.stack([torch.cat([ids[0], ids[2]]), torch.cat([ids[1], ids[2]])])
    positions_BT = torch.arange(8, device=device).repeat(2, 2)
    second_BTV = forward_logits(model, input_ids=packed_BT, position_ids=positions_BT)[:, 8:].float()
    alone_BTV = forward_logits(model, input_ids=ids[2:], position_ids=positions_BT[:1, :8]).float()
    scale = float(alone_BTV.abs().max())
    computed_in = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    rounding = max(torch.finfo(computed_in).eps, 5e-6)
    # Both sequences run through the same kernels, so the tolerance is small; a false negative costs only speed.
    leak = float((second_BTV[0] - second_BTV[1]).abs().max())
    shift = float((second_BTV - alone_BTV).abs().max())
    return leak <= 2 * rounding * scale and shift <= 32 * rounding * scale


def _pieces(corpus: TokenCorpus, sequence_length: int) -> list[_Piece]:
    """Return pieces of at most `sequence_length` predictions, longest first."""
    pieces: list[_Piece] = []
    for index in range(corpus.num_documents):
        length = len(corpus.document(index)) - SPECIALS_PER_DOCUMENT
        pieces += [
            _Piece(index, start, min(start + sequence_length, length)) for start in range(0, length, sequence_length)
        ]
    pieces.sort(key=lambda piece: (-piece.length, piece.document, piece.start))
    return pieces


def _pack(pieces: list[_Piece], sequence_length: int) -> list[list[_Piece]]:
    """Put each piece, longest first, into the fullest sequence that has room for it."""
    sequences: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (free positions, index of the sequence), sorted, without full sequences
    for piece in pieces:
        at = bisect_left(room, (piece.length, 0))
        free, index = room.pop(at) if at < len(room) else (sequence_length, len(sequences))
        if index == len(sequences):
            sequences.append([])
        sequences[index].append(piece)
        if free > piece.length:
            insort(room, (free - piece.length, index))
    return sequences


def _batches(
    sequences: list[list[_Piece]], tokens_per_batch: int, regime: Callable[[int], int]
) -> Iterator[list[list[_Piece]]]:
    """Yield batches of one regime, longest sequences first: if the first batch fits into memory, all do."""
    lengths = sorted(((sum(piece.length for piece in each), each) for each in sequences), key=lambda pair: -pair[0])
    start = 0
    while start < len(lengths):
        longest = lengths[start][0]
        batch = lengths[start : start + max(1, tokens_per_batch // longest)]
        batch = list(takewhile(lambda pair: regime(pair[0]) == regime(longest), batch))  # noqa: B023  # used here
        yield [sequence for _, sequence in batch]
        start += len(batch)


def _collate(corpus: TokenCorpus, sequences: list[list[_Piece]]) -> dict[str, np.ndarray]:
    """Return int64 [B, T] arrays: input_ids, position_ids (restarting with each piece), labels, attention_mask.

    In `position_ids`, padding at the end of a sequence is a document of its own.
    """
    width = max(sum(piece.length for piece in each) for each in sequences)
    input_ids, positions, attended = (np.zeros((len(sequences), width), np.int64) for _ in range(3))
    labels = np.full((len(sequences), width), IGNORE_INDEX, np.int64)
    for index, sequence in enumerate(sequences):
        at = 0
        for piece in sequence:
            ids, end = corpus.document(piece.document), at + piece.length
            input_ids[index, at:end] = ids[piece.start : piece.stop]
            labels[index, at:end] = ids[piece.start + 1 : piece.stop + 1]
            positions[index, at:end] = np.arange(piece.length)
            attended[index, at:end] = 1
            at = end
        positions[index, at:] = np.arange(width - at)
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels, "attention_mask": attended}
