"""Bits per byte of a token corpus under a causal LM: the measure that survives a change of tokenizer.

Shapes: B rows, T positions.
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
    """How many bits a model spends on each byte of text: lower is better, 8 is guessing every byte blindly.

        bits_per_byte = summed nats of the text tokens / (ln 2 x UTF-8 bytes of the text)

    Every text token of the corpus is predicted exactly once, from the prefix token and the text tokens before it in
    its own document, as far back as the sequence length reaches: a document of more than `sequence_length` text tokens
    is cut into pieces of that many predictions, and a piece sees nothing before it but the token it starts from. The
    prefix is never predicted, and the end-of-text token after the document is not counted, so that the sum belongs
    to the bytes it is divided by. The value therefore depends on the model, the text and the sequence length alone,
    not on batch size, document order or packing. Compare it across tokenizers, never across languages: a Korean
    syllable is three bytes, an English letter is one.
    """

    nats: float
    """Summed negative log-likelihood of the text tokens, natural logarithm."""
    text_tokens: int
    """Tokens predicted."""
    bytes: int
    """UTF-8 bytes of the text they spell."""
    documents: int
    """Documents evaluated."""
    document_nats: tuple[float, ...]
    """`nats` by document, in the order of the corpus: for statistics over documents."""
    document_bytes: tuple[int, ...]
    """`bytes` by document."""

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
    """Measure `model` on `corpus`; see `BitsPerByte` for what is measured.

    Documents share rows where the model keeps packed documents apart (asked of the model itself, by running it);
    other models, such as recurrent ones, get one document a row. Where the longest sequence of a batch decides about
    the others (`rope_regime`), it decides the same for all of them. The value is the same.

    Args:
        model: any causal LM, in any mode and dtype; left as it was.
        corpus: documents as token ids, on disk or in memory (`TokenCorpus.from_documents`); all of it is evaluated
            (`elo.data.heldout.cut_corpus` takes the part of a larger one).
        sequence_length: positions a row; at most what the model was made for.
        batch_size: rows of `sequence_length` a forward pass; by default as many as keep fp32 logits within 1 GiB.
        device: where to run; by default where the model is.
        autocast_dtype: compute dtype, for models kept in another one.
        progress: a label shows progress under it; None shows nothing.

    Raises:
        EloError: the corpus holds no text, a token id is beyond the embedding, or `sequence_length` is beyond the
            model's positions.
    """
    limit = longest_sequence(model)
    if sequence_length < 1 or (limit is not None and sequence_length > limit):
        raise EloError(
            f"sequence_length: got {sequence_length}, but the model takes 1 to {limit or 'any number of'} positions; "
            "choose a sequence_length within"
        )
    pieces = _pieces(corpus, sequence_length)
    text_tokens, num_bytes, count = corpus.num_text_tokens, corpus.num_bytes, corpus.num_documents
    if not pieces or not num_bytes:
        raise EloError(f"the corpus to evaluate holds no text ({count} documents, {num_bytes} bytes)")
    tokens_per_batch = batch_size * sequence_length if batch_size else batch_tokens(model)
    document_nats = np.zeros(count)
    with evaluating(model, device, autocast_dtype) as place, Progress(text_tokens, progress, "tokens") as bar:
        packed = not rope_regime(model.config, sequence_length)
        packed = packed and isolates_documents(model, place)
        rows = _packed_rows(pieces, sequence_length) if packed else [[piece] for piece in pieces]
        for batch in _batches(rows, tokens_per_batch, partial(rope_regime, model.config)):
            arrays = _collate(corpus, batch)
            check_ids(int(arrays["input_ids"].max()), model, "the corpus to evaluate")
            tensors = {name: torch.from_numpy(array).to(place) for name, array in arrays.items()}
            labels_BT = tensors.pop("labels")
            tensors.pop("attention_mask" if packed else "position_ids")
            nats_BT = token_nats(forward_logits(model, **tensors), labels_BT).numpy()
            for row, nats_T in zip(batch, nats_BT, strict=True):
                at = 0
                for piece in row:
                    document_nats[piece.document] += nats_T[at : at + piece.length].sum()
                    at += piece.length
            bar.advance(int((arrays["labels"] != IGNORE_INDEX).sum()))
    by_document = tuple(document_nats.tolist())
    sizes = tuple(corpus.document_sizes.tolist())
    return BitsPerByte(sum(by_document), text_tokens, num_bytes, count, by_document, sizes)


def isolates_documents(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether packed documents, told apart by `position_ids` that restart at 0, leave each other's logits alone.

    Found by running two rows that differ in their first document only, and their second document by itself. Recurrent
    layers carry state over the boundary, and some attention kernels see it only in batches of one row. Layers that pool
    windows longer than these documents would show nothing, so the kind of layers is asked first.
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
    # The two rows run through the same kernels, so that rounding excuses little; a wrong no costs only speed.
    leak = float((second_BTV[0] - second_BTV[1]).abs().max())
    shift = float((second_BTV - alone_BTV).abs().max())
    return leak <= 2 * rounding * scale and shift <= 32 * rounding * scale


def _pieces(corpus: TokenCorpus, sequence_length: int) -> list[_Piece]:
    """Pieces of at most `sequence_length` predictions, longest first."""
    pieces: list[_Piece] = []
    for index in range(corpus.num_documents):
        length = len(corpus.document(index)) - SPECIALS_PER_DOCUMENT
        pieces += [
            _Piece(index, start, min(start + sequence_length, length)) for start in range(0, length, sequence_length)
        ]
    pieces.sort(key=lambda piece: (-piece.length, piece.document, piece.start))
    return pieces


def _packed_rows(pieces: list[_Piece], sequence_length: int) -> list[list[_Piece]]:
    """Put each piece, longest first, into the fullest row that still has room for it."""
    rows: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted; full rows are left out
    for piece in pieces:
        at = bisect_left(room, (piece.length, 0))
        free, row = room.pop(at) if at < len(room) else (sequence_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if free > piece.length:
            insort(room, (free - piece.length, row))
    return rows


def _batches(
    rows: list[list[_Piece]], tokens_per_batch: int, regime: Callable[[int], int]
) -> Iterator[list[list[_Piece]]]:
    """Rows of like width and one regime together, the widest first, so that memory runs out at once or never."""
    width = {id(row): sum(piece.length for piece in row) for row in rows}
    rows = sorted(rows, key=lambda row: -width[id(row)])
    start = 0
    while start < len(rows):
        widest = width[id(rows[start])]
        batch = rows[start : start + max(1, tokens_per_batch // widest)]
        batch = list(takewhile(lambda row: regime(width[id(row)]) == regime(widest), batch))  # noqa: B023  # used here
        yield batch
        start += len(batch)


def _collate(corpus: TokenCorpus, rows: list[list[_Piece]]) -> dict[str, np.ndarray]:
    """int64 [B, T] arrays: input_ids, position_ids (restarting with each piece), labels, attention_mask.

    Padding at the end of a row is a document of its own to `position_ids`.
    """
    width = max(sum(piece.length for piece in row) for row in rows)
    input_ids, positions, attended = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
    for index, row in enumerate(rows):
        at = 0
        for piece in row:
            ids, end = corpus.document(piece.document), at + piece.length
            input_ids[index, at:end] = ids[piece.start : piece.stop]
            labels[index, at:end] = ids[piece.start + 1 : piece.stop + 1]
            positions[index, at:end] = np.arange(piece.length)
            attended[index, at:end] = 1
            at = end
        positions[index, at:] = np.arange(width - at)
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels, "attention_mask": attended}
