"""Mix sequences of several languages by share of tokens. Every prefix keeps the shares; access is random.

Mixing happens when sequences are read, and token shards do not depend on it. Another replay ratio, weight or seed
therefore needs no new tokenisation.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from elo.data.packing import PackedStream, PaddedStream, shuffled
from elo.data.shards import PreparedData, TokenCorpus
from elo.errors import EloError

Stream = PackedStream | PaddedStream
Languages = str | Sequence[str] | Mapping[str, float]
"""A language, several in proportion to their training tokens, or several with their relative shares."""
RESOLUTION = 1 << 40
"""Shares and phases are multiples of 1/RESOLUTION, so that counting sequences is exact integer arithmetic."""


@dataclass(frozen=True)
class MixtureSource:
    """A stream with its language, its share of the mixture's tokens, in [0, 1], and the role of its language."""

    language: str
    share: float
    stream: Stream
    role: str = "target"


@dataclass(frozen=True)
class _Split:
    """Two-way split: of the first n sequences, floor(n * share + phase) go to `first` (phase < 1), others to `rest`.

    `first` therefore deviates from its share by less than one sequence, for every n.
    """

    share: int
    phase: int
    first: "_Split | int"
    rest: "_Split | int"

    def find(self, index: int) -> tuple[int, int]:
        """Return (source, index in that source) of sequence `index`."""
        before = (index * self.share + self.phase) // RESOLUTION
        after = ((index + 1) * self.share + self.phase) // RESOLUTION
        side, inside = (self.first, before) if after > before else (self.rest, index - before)
        return (side, inside) if isinstance(side, int) else side.find(inside)


_Group = tuple[Fraction, "_Split | int"]
"""Share of a group of sources, and how it is split among them."""


def _join(groups: Sequence[_Group], seed: int, depth: int) -> _Group:
    """Join groups by a chain of two-way splits. The shares need not sum to 1."""
    (share, first), *rest = groups
    total = sum((weight for weight, _ in groups), Fraction(0))
    if not rest:
        return total, first
    part = share / total if total else Fraction(0)
    phase = int(np.argsort(shuffled(1 << 10, seed, depth))[0]) * (RESOLUTION >> 10)
    return total, _Split(round(part * RESOLUTION), phase, first, _join(rest, seed, depth + 1)[1])


class Mixture:
    """An endless series of sequences, each in one language, drawn from `sources` by their shares of tokens.

    In every prefix a role deviates from its share by less than one sequence, a language within it by about one more,
    and a corpus within that by about one more.
    """

    def __init__(
        self,
        sources: Sequence["MixtureSource | tuple[str, float, Stream]"],
        seed: int = 0,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.origin = dict(origin or {})
        """Everything that determines the content of every sequence, as JSON."""
        self.sources = [item if isinstance(item, MixtureSource) else MixtureSource(*item) for item in sources]
        self.seed = seed
        total = sum(source.share for source in self.sources)
        if not self.sources or any(source.share < 0 for source in self.sources) or abs(total - 1) > 1e-6:
            raise EloError(f"mixture: shares must be at least 0 and sum to 1, got {[s.share for s in self.sources]}")
        lengths = {source.stream.sequence_length for source in self.sources}
        if len(lengths) != 1:
            raise EloError(f"mixture: all streams must have the same sequence length, got {sorted(lengths)}")
        self.sequence_length = lengths.pop()
        by_language: dict[tuple[str, str], list[_Group]] = {}
        for index, source in enumerate(self.sources):
            by_language.setdefault((source.role, source.language), []).append((Fraction(source.share), index))
        by_role: dict[str, list[_Group]] = {}
        for number, ((role, _), members) in enumerate(by_language.items(), 1):
            by_role.setdefault(role, []).append(_join(members, seed, 1000 * number))
        roles = [_join(members, seed, 100 * number) for number, members in enumerate(by_role.values(), 1)]
        self._root = _join(roles, seed, 0)[1]

    def find(self, index: int) -> tuple[int, int]:
        """Return the source of sequence `index`, and its index in that source's stream."""
        if index < 0:
            raise IndexError(f"sequence {index}")
        return (self._root, index) if isinstance(self._root, int) else self._root.find(index)

    def sequence(self, index: int) -> dict[str, np.ndarray]:
        """Return sequence `index`: `input_ids`, `shift_labels`, `position_ids`; unpacked, also `attention_mask`."""
        which, inside = self.find(index)
        sequence = self.sources[which].stream.sequence(inside)
        return {name: value for name, value in sequence._asdict().items() if value is not None}

    def sequences(self, start: int, stop: int) -> "MixtureSequences":
        """Return sequences [start, stop) as a map-style dataset."""
        return MixtureSequences(self, start, stop)

    def sequences_by_language(self, start: int, count: int) -> dict[str, list[dict[str, np.ndarray]]]:
        """Return the first `count` sequences of each language, searching 1000 x `count` sequences from `start`.

        Languages without a sequence there are omitted.
        """
        languages = {source.language for source in self.sources if source.share > 0}
        found: dict[str, list[dict[str, np.ndarray]]] = {}
        sequences = self.sequences(start, start + 1000 * count)
        for index in range(len(sequences)):
            language = sequences.language(index)
            if len(found.setdefault(language, [])) < count:
                found[language].append(sequences[index])
            if len(found) == len(languages) and all(len(each) == count for each in found.values()):
                break
        return dict(sorted(found.items()))

    def epoch_sequences(self, *languages: str) -> int:
        """Return the number of sequences that contain as much text of `languages` as their corpora have together.

        With equal weights this is one pass over their text. Otherwise corpora and languages with a higher weight are
        read more than once within it, and the others less than once.

        Raises:
            EloError: `languages` have no share in the mixture.
        """
        taken = [source for source in self.sources if source.language in languages and source.share > 0]
        if not taken:
            names = ", ".join(map(repr, languages))
            raise EloError(f"mixture: {names} has no share, so its sequences cannot be counted")
        return int(sum(source.stream.sequences_per_epoch for source in taken) / sum(source.share for source in taken))


class Schedule(Mixture):
    """Mixtures that are used one after another, each for its share of `total` sequences.

    A corpus in several mixtures continues where the previous one stopped reading it. Within each mixture shares are
    as exact as in `Mixture`; those in `sources` are means over the schedule. After `total` sequences, all sources
    continue with their mean shares.
    """

    def __init__(self, parts: Sequence[tuple[float, Mixture]], total: int) -> None:
        self._parts = list(parts)
        lengths = [Fraction(length) for length, _ in parts]
        mixtures = [mixture for _, mixture in parts]
        self._starts = [round(total * sum(lengths[:part]) / sum(lengths)) for part in range(len(parts) + 1)]
        self.seed, self.sequence_length = mixtures[0].seed, mixtures[0].sequence_length
        self.origin = {
            "schedule": [[start, each.origin] for start, each in zip(self._starts[:-1], mixtures, strict=True)]
        }
        places: dict[tuple[str, str], int] = {}
        self.sources, self._places = [], []
        read: dict[int, int] = {}
        for number, mixture in enumerate(mixtures):
            places_here = []
            for source in mixture.sources:
                share = source.share * float(lengths[number] / sum(lengths))
                place = places.setdefault((source.language, source.stream.corpus.name), len(places))
                if place == len(self.sources):
                    self.sources.append(replace(source, share=share))
                else:
                    self.sources[place] = replace(source, share=self.sources[place].share + share)
                places_here.append((place, read.get(place, 0)))
            self._places.append(places_here)
            counts = _count(mixture._root, self._starts[number + 1] - self._starts[number])
            for which, (place, before) in enumerate(places_here):
                read[place] = before + counts.get(which, 0)
        self._mixtures = [*mixtures, Mixture(self.sources, self.seed)]
        self._places.append([(place, read[place]) for place in range(len(self.sources))])

    def over(self, total: int) -> "Schedule":
        """Return the same schedule for another number of sequences."""
        return Schedule(self._parts, total)

    def find(self, index: int) -> tuple[int, int]:
        part = max(bisect_right(self._starts, index) - 1, 0)
        which, inside = self._mixtures[part].find(index - self._starts[part])
        place, before = self._places[part][which]
        return place, before + inside


def _count(split: "_Split | int", count: int) -> dict[int, int]:
    """Return how many of the first `count` sequences each source has."""
    if isinstance(split, int):
        return {split: count}
    first = (count * split.share + split.phase) // RESOLUTION
    return {**_count(split.first, first), **_count(split.rest, count - first)}


class MixtureSequences:
    """Sequences [start, stop) of a mixture, as a map-style dataset of torch: dicts of int64 arrays [T]."""

    def __init__(self, mixture: Mixture, start: int, stop: int) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"sequences [{start}, {stop})")
        self.mixture, self.start, self.stop = mixture, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self.mixture.sequence(self.start + index)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the content of these sequences, as JSON."""
        return {"mixture": self.mixture.origin, "rows": [self.start, self.stop]}

    def language(self, index: int) -> str:
        """Return the language of sequence `index`."""
        return self.mixture.sources[self.mixture.find(self.start + index)[0]].language


def build_mixture(
    prepared: PreparedData,
    target: Languages,
    source: Languages = (),
    replay_ratio: float = 0.1,
    sequence_length: int = 1024,
    seed: int = 0,
    packing: bool = True,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    order: Sequence[str] = (),
) -> Mixture:
    """Mix the target languages with `replay_ratio` (share of tokens) of the source languages.

    `weights` ({language: {corpus name: weight}}) overrides the manifest's. Within a language, a corpus' share is
    proportional to its tokens times its weight, so weights are relative numbers of epochs. `order` lists all languages
    of a schedule, so that its parts read each corpus in the same order; by default those of this mixture.

    Raises:
        EloError: a language is not prepared, or a ratio, weight or length is out of range.
    """
    if not 0 <= replay_ratio <= 1:
        raise EloError(
            f"replay_ratio must be between 0 and 1 (share of tokens in the source languages), got {replay_ratio}"
        )
    if replay_ratio > 0 and not names_of(source):
        raise EloError(f"replay_ratio {replay_ratio} needs a source language; name one, or set replay_ratio to 0")
    both = set(names_of(target)) & set(names_of(source))
    if replay_ratio > 0 and both:
        raise EloError(
            f"{min(both)!r} is both a target and a source language; name another source language, or set replay_ratio "
            "to 0"
        )
    shares = language_shares(prepared, target, source, replay_ratio)
    sources: list[MixtureSource] = []
    numbers = {language: number for number, language in enumerate(order or shares)}
    for language, share in shares.items():
        role = "target" if language in names_of(target) else "source"
        corpora = prepared.train(language)
        factors = corpus_weights(corpora, language, (weights or {}).get(language, {}))
        tokens = [corpus.num_tokens * factor for corpus, factor in zip(corpora, factors, strict=True)]
        if not sum(tokens):
            raise EloError(
                f"{prepared.path}: no training text for {language!r} has a weight above 0; raise a weight or add text"
            )
        for index, (corpus, part) in enumerate(zip(corpora, tokens, strict=True)):
            if not part:
                continue
            stream_seed = seed + 1_000_003 * (1000 * numbers[language] + index)
            kind = PackedStream if packing else PaddedStream
            stream = kind(corpus, sequence_length, stream_seed)
            sources.append(MixtureSource(language, share * part / sum(tokens), stream, role))
    origin = {
        "data": prepared.fingerprint,
        "target": [[language, shares[language]] for language in names_of(target) if language in shares],
        "source": [[language, shares[language]] for language in names_of(source) if language in shares],
        "sequence_length": sequence_length,
        "packing": packing,
        "seed": seed,
        "weights": {language: dict(each) for language, each in (weights or {}).items()},
    }
    return Mixture(sources, seed, origin)


def names_of(languages: Languages) -> tuple[str, ...]:
    """Return the names of languages."""
    return (languages,) if isinstance(languages, str) else tuple(languages)


def language_shares(
    prepared: PreparedData, target: Languages, source: Languages, replay_ratio: float
) -> dict[str, float]:
    """Return the share of training tokens of each language that is trained on, target languages first.

    Raises:
        EloError: a language is not prepared.
    """
    shares: dict[str, float] = {}
    for languages, together in ((target, 1 - replay_ratio), (source, replay_ratio)):
        names = names_of(languages) if together else ()
        given = languages if isinstance(languages, Mapping) else None
        parts = [given[name] if given else sum(corpus.num_tokens for corpus in prepared.train(name)) for name in names]
        shares |= {name: together * (part / (sum(parts) or 1)) for name, part in zip(names, parts, strict=True)}
    return shares


def corpus_weights(corpora: Sequence[TokenCorpus], language: str, overrides: Mapping[str, float]) -> list[float]:
    """Return the weight of each corpus of a language.

    Raises:
        EloError: an override names no corpus, or a weight is negative or not a number.
    """
    names = [corpus.name for corpus in corpora]
    for name in overrides:
        if name not in names:
            raise EloError(f"weight of {language!r} corpus {name!r}: no such corpus; choose among {', '.join(names)}")
    weights = [float(overrides.get(corpus.name, corpus.weight)) for corpus in corpora]
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise EloError(f"weight of {language!r} corpus {name!r} must be a number of at least 0, got {weight}")
    return weights
