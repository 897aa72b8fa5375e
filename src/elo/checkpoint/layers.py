"""Parse layer selections such as `first:1,last:1`, `0,1,-1` or `0-3,28-31`, and find the gaps they leave."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from elo.errors import EloError

DEFAULT_LAYERS = "first:1,last:1"
PROBE_TOKENS = 256
"""Default tokens per language of the probe behind `auto`, which takes minutes on one CPU core for 135M parameters."""
PROBE_LENGTH = 64
"""Default length of a sequence of the probe, in tokens."""

# No model has more than nine digits of layers, and int() raises for thousands of digits.
_END = re.compile(r"(first|last):([0-9]{1,9})")
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
_AUTO = re.compile(r"auto:(?:([a-z_]+):)?([0-9]{1,9})")
_INDEX = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class AutoLayers:
    """A selection that is left to a probe of the model (elo.probe): `auto:K` or `auto:CRITERION:K`."""

    criterion: str | None
    count: int

    def assumed(self, num_layers: int) -> tuple[int, ...]:
        """Return layers evenly spaced over depth, as an estimate before the probe."""
        count = min(self.count, num_layers - 1)
        return tuple(round(index * (num_layers - 1) / max(1, count - 1)) for index in range(count))


def parse_auto(selection: str | int | Sequence[int]) -> AutoLayers | None:
    """Return the parts of a selection that is left to a probe, or None if the selection names layers."""
    match = _AUTO.fullmatch(selection.strip()) if isinstance(selection, str) else None
    return AutoLayers(match[1], int(match[2])) if match else None


def assumed_layers(selection: str | int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Resolve a selection like `parse_layers`; for one that is left to a probe, return an estimate."""
    auto = parse_auto(selection)
    return auto.assumed(num_layers) if auto else parse_layers(selection, num_layers)


def parse_layers(selection: str | int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Resolve a layer selection against a model of `num_layers` decoder layers.

    Args:
        selection: terms joined by commas, or a sequence of indices. A term is `first:K`, `last:K`, an index (negative
            counts from the end) or an inclusive range `A-B`.
        num_layers: the model's number of decoder layers.

    Returns:
        Increasing 0-based layer indices without repeats; at least one, and fewer than `num_layers`.

    Raises:
        EloError: a term is invalid, names a layer that does not exist or repeats one, or all layers are selected.
    """
    if isinstance(selection, int):
        selection = [selection]
    terms = selection.split(",") if isinstance(selection, str) else [str(index) for index in selection]
    chosen: dict[int, str] = {}
    for term in (term.strip() for term in terms):
        for index in _term_indices(term, num_layers):
            if index in chosen:
                raise EloError(
                    f"layers: {_shown(selection)} selects layer {index} twice (in {chosen[index]!r} and in {term!r}); "
                    "name each layer once"
                )
            chosen[index] = term
    if not chosen:
        raise EloError(f"layers: {_shown(selection)} selects no layer; write for example {DEFAULT_LAYERS!r}")
    if len(chosen) == num_layers:
        raise EloError(
            f"layers: {_shown(selection)} selects all {num_layers} layers, so nothing would be detached; "
            "select fewer, or train the whole model with method: full"
        )
    return tuple(sorted(chosen))


def _term_indices(term: str, num_layers: int) -> range:
    def existing(index: int) -> int:
        resolved = index + num_layers if index < 0 else index
        if not 0 <= resolved < num_layers:
            raise EloError(
                f"layers: {term!r} names layer {index}, but the model has {num_layers} decoder layers; "
                f"write 0 to {num_layers - 1}, or -{num_layers} to -1"
            )
        return resolved

    if match := _END.fullmatch(term):
        count = int(match[2])
        if not 1 <= count <= num_layers:
            raise EloError(
                f"layers: {term!r} asks for {count} layers, but the model has {num_layers}; "
                f"write a number from 1 to {num_layers - 1}"
            )
        return range(count) if match[1] == "first" else range(num_layers - count, num_layers)
    if match := _RANGE.fullmatch(term):
        first, last = existing(int(match[1])), existing(int(match[2]))
        if first > last:
            raise EloError(f"layers: the range {term!r} runs backwards; write {last}-{first}")
        return range(first, last + 1)
    if _INDEX.fullmatch(term):
        index = existing(int(term))
        return range(index, index + 1)
    raise EloError(
        f"layers: cannot read {term[:60]!r}; write first:K, last:K, an index such as 0 or -1, or a range such as 0-3"
        + (", or auto:K alone" if term.startswith("auto") else "")
    )


def _shown(selection: str | Sequence[int]) -> str:
    return repr(selection) if isinstance(selection, str) else repr(list(selection))


class Gap(NamedTuple):
    """A run of base layers [start, stop) that are not kept.

    `stop` is the index of the layer after the gap in the base, `position` its index in the detached model. Past the
    last layer, both refer to the final norm.
    """

    position: int
    start: int
    stop: int


def gaps_between(layers: Sequence[int], num_layers: int) -> list[Gap]:
    """Return the runs of layers that `layers` (ascending, 0-based) leaves out of a base with `num_layers` layers."""
    ends = [*layers, num_layers]
    starts = [0, *(layer + 1 for layer in layers)]
    return [
        Gap(position, start, stop)
        for position, (start, stop) in enumerate(zip(starts, ends, strict=True))
        if start < stop
    ]
