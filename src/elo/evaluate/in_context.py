"""In-context ability: how well a model uses its context, measured without data on random vocabulary pieces.

Perplexity can stay low while in-context learning collapses in continual pretraining (arXiv 2506.00288), so it is
measured directly. No such sequence was seen in training, so every right prediction comes from the context.

- copying: a random sequence of pieces is repeated; each piece of the repetition but the first is predicted.
- recall: lines `key: value` with random pieces, then some keys again; their values are predicted.
- pattern: lines `x y z: answer`, where the answer is always the first, always the second or always the third piece;
  the answers in the last quarter of the lines are predicted.

Shapes: B sequences, T positions, N scored positions, V vocabulary entries.
"""

import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, mean_error, register, share_error, weighted
from elo.evaluate.scoring import (
    batch_tokens,
    check_ids,
    evaluating,
    forward_logits,
    longest_sequence,
    token_nats,
    vocabulary_size,
)
from elo.log import Progress

KINDS = ("copying", "recall", "pattern")
_WORD_STARTS = ("Ġ", "▁")
_MIN_WORDS = 1000
_MIN_CONTEXT = 16


@register
class InContext(Measure):
    """Measure copying, key-value recall and pattern completion on random pieces of the vocabulary, without data."""

    name: ClassVar[str] = "in_context"
    short_form: ClassVar[str] = "`true`, `false` or section"

    lengths: tuple[int, ...] = (64, 256, 1024)
    """Context lengths, in tokens; those beyond the model's positions are left out."""
    tokens: int = Field(1024, ge=_MIN_CONTEXT, le=1 << 24)
    """Tokens per kind and length. If they are few, each kind still has one sequence, and `pattern` three."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the random pieces."""

    @field_validator("lengths")
    @classmethod
    def _long_enough(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < _MIN_CONTEXT or len(set(value)) < len(value):
            raise ValueError(f"must hold different lengths, each at least {_MIN_CONTEXT} tokens")
        return tuple(sorted(value))

    @classmethod
    def from_short(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def measure(self, subject: Subject) -> Outcome:
        model, tokenizer = subject.model, subject.text_tokenizer
        limit = longest_sequence(model)
        lengths = [length for length in self.lengths if limit is None or length <= limit]
        pieces = ordinary_pieces(tokenizer, vocabulary_size(model))
        cells = [
            (kind, length, sequences)
            for length in lengths or [limit or self.lengths[0]]
            for kind in KINDS
            if (sequences := self._sequences(kind, length, tokenizer, pieces))
        ]
        if not cells:
            raise EloError(
                f"in_context: {tokenizer.name}: {len(pieces)} ordinary pieces in the vocabulary and "
                f"{limit or 'any number of'} positions are too few for a context of {min(self.lengths)} tokens; "
                "leave in_context out"
            )
        label = "in context" if subject.progress else None
        values = []
        with evaluating(model) as place, Progress(len(cells), label, "cells") as bar:
            for kind, length, sequences in cells:
                nats, hits = _score(subject, sequences, place)
                values += _values(f"{kind} {length}", nats, hits, 1 / len(pieces))
                bar.advance(1)
        # Only the mean keeps the values of items, so that they are stored once.
        return Outcome([*_means(values), *(value.model_copy(update={"per_item": ()}) for value in values)])

    def _sequences(self, kind: str, length: int, tokenizer: TextTokenizer, pieces: list[int]) -> "list[_Sequence]":
        """Return sequences of one kind and length; none if the vocabulary has too few pieces to draw distinct ones."""
        draw = random.Random(f"{self.seed} {kind} {length}")
        start, colon, line_end = tokenizer.prefix_token_id, tokenizer.encode(":"), tokenizer.encode("\n")
        count = max(1, self.tokens // length)
        if kind == "copying":
            made = [_copying(draw, start, pieces, length) for _ in range(count)]
        elif kind == "recall":
            made = [_recall(draw, start, pieces, length, colon, line_end) for _ in range(count)]
        else:  # the same number of sequences for each rule
            rules = [0, 1, 2] * max(1, count // 3)
            made = [_pattern(draw, start, pieces, length, colon, line_end, rule) for rule in rules]
        return [sequence for sequence in made if sequence is not None]


@dataclass(frozen=True)
class _Sequence:
    """Token ids, and the positions of those that are predicted."""

    ids: list[int]
    scored: list[int]


def ordinary_pieces(tokenizer: TextTokenizer, rows: int) -> list[int]:
    """Return ids below `rows` of pieces of letters or digits, only those that begin a word if there are enough."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    ids = sorted(index for index in vocabulary.values() if index < rows)
    spellings = {index: piece for piece, index in vocabulary.items()}
    special = {tokenizer.backend.token_to_id(spelling) for spelling in tokenizer.special_tokens}
    texts = tokenizer.backend.decode_batch([[index] for index in ids], skip_special_tokens=False)
    ordinary = [
        index
        for index, text in zip(ids, texts, strict=True)
        if index not in special and text.strip().isalnum() and text.isprintable()
    ]
    words = [index for index in ordinary if spellings[index].startswith(_WORD_STARTS)]
    return words if len(words) >= _MIN_WORDS else ordinary


def _copying(draw: random.Random, start: int, pieces: list[int], length: int) -> _Sequence | None:
    half = (length - 1) // 2
    if half > len(pieces):
        return None
    drawn = draw.sample(pieces, half)
    return _Sequence([start, *drawn, *drawn], list(range(half + 2, 2 * half + 1)))


def _recall(
    draw: random.Random, start: int, pieces: list[int], length: int, colon: list[int], line_end: list[int]
) -> _Sequence | None:
    lines = (length - 1) // (2 + len(colon) + len(line_end))
    asked = max(1, lines // 4)
    pairs = lines - asked
    if pairs < 2 or 2 * pairs > len(pieces):
        return None
    drawn = draw.sample(pieces, 2 * pairs)
    table = list(zip(drawn[:pairs], drawn[pairs:], strict=True))
    ids, scored = [start], []
    for index, (key, value) in enumerate([*table, *draw.sample(table, min(asked, pairs))]):
        ids += [key, *colon]
        if index >= pairs:
            scored.append(len(ids))
        ids += [value, *line_end]
    return _Sequence(ids, scored)


def _pattern(
    draw: random.Random, start: int, pieces: list[int], length: int, colon: list[int], line_end: list[int], rule: int
) -> _Sequence | None:
    lines = (length - 1) // (4 + len(colon) + len(line_end))
    if lines < 2 or len(pieces) < 3:
        return None
    ids, scored = [start], []
    for line in range(lines):
        drawn = draw.sample(pieces, 3)
        ids += [*drawn, *colon]
        if line >= lines - max(1, lines // 4):
            scored.append(len(ids))
        ids += [drawn[rule], *line_end]
    return _Sequence(ids, scored)


def _score(subject: Subject, sequences: list[_Sequence], place: torch.device) -> tuple[list[float], list[bool]]:
    """Return the nats of each scored token, and whether it is the most likely one.

    Args:
        sequences: sequences with the same scored positions.
    """
    model = subject.model
    at_N = torch.tensor(sequences[0].scored)
    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    nats: list[float] = []
    hits: list[bool] = []
    for batch in _batches(subject, sequences):
        ids_BT = torch.tensor([sequence.ids for sequence in batch])
        check_ids(int(ids_BT.max()), model, "in_context")
        inputs = {"input_ids": ids_BT[:, :-1].to(place)}
        if keeps:  # compute the LM head at the scored positions only
            logits_BNV = forward_logits(model, **inputs, logits_to_keep=(at_N - 1).to(place))
        else:
            logits_BNV = forward_logits(model, **inputs)[:, (at_N - 1).to(place)]
        labels_BN = ids_BT[:, at_N].to(place)
        nats += token_nats(logits_BNV, labels_BN).flatten().tolist()
        hits += (logits_BNV.argmax(2) == labels_BN).flatten().tolist()
    return nats, hits


def _batches(subject: Subject, sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
    size = subject.batch_size or max(1, batch_tokens(subject.model) // len(sequences[0].ids))
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size]


def _values(name: str, nats: list[float], hits: list[bool], chance: float) -> list[MeasureValue]:
    share, items = fmean(hits), len(hits)
    return [
        MeasureValue(
            measure="in_context",
            name=name,
            value=share,
            standard_error=share_error(share, items),
            items=items,
            chance=chance,
            per_item=tuple(map(float, hits)),
        ),
        MeasureValue(
            measure="in_context_nats",
            name=name,
            value=fmean(nats),
            unit="number",
            higher_is_better=False,
            standard_error=mean_error(nats),
            items=items,
        ),
    ]


def _means(values: list[MeasureValue]) -> list[MeasureValue]:
    """Return the mean over kinds and lengths, each with the same weight."""
    found = []
    for measure in dict.fromkeys(value.measure for value in values):
        cells = [value for value in values if value.measure == measure]
        errors = [value.standard_error or 0.0 for value in cells]
        found.append(
            cells[0].model_copy(
                update={
                    "name": "all",
                    "value": fmean(value.value for value in cells),
                    "standard_error": sum(error**2 for error in errors) ** 0.5 / len(cells),
                    "items": sum(value.items or 0 for value in cells),
                    "per_item": weighted([value.per_item for value in cells], fmean(value.value for value in cells)),
                }
            )
        )
    return found
