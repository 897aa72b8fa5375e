"""Choose layers by their scores, for `layers: auto:K` and `auto:CRITERION:K`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elo.checkpoint.architecture import LayerModule
from elo.checkpoint.layers import AutoLayers
from elo.errors import EloError
from elo.probe.base import Scores
from elo.probe.criteria import CRITERIA

TO_TRAIN = "adaptability"
"""Criterion of `auto:K` when it chooses layers to train."""
TO_KEEP = "skipping"
"""Criterion of `auto:K` when it chooses the layers of a smaller model."""


@dataclass(frozen=True)
class Choice:
    """Chosen layers in ascending order, and the reason for the choice."""

    layers: tuple[int, ...]
    reason: str


def check_auto(auto: AutoLayers, num_layers: int, *, has_parallel: bool, where: str) -> None:
    """Raise EloError if the criterion is unknown, lacks parallel text, or would choose no layer or every layer."""
    if auto.criterion is not None and auto.criterion not in CRITERIA:
        raise EloError(
            f"layers: {where}: there is no criterion {auto.criterion!r}; choose one of {', '.join(CRITERIA)}"
        )
    if auto.criterion is not None and CRITERIA[auto.criterion].needs_parallel and not has_parallel:
        raise EloError(
            f"layers: {where}: criterion {auto.criterion} needs parallel text; set probe.parallel, or give --probe"
        )
    if not 0 < auto.count < num_layers:
        raise EloError(f"layers: {where}: the model has {num_layers} decoder layers; choose 1 to {num_layers - 1}")


def mean_scores(scores: Scores, module: LayerModule, languages: Sequence[str]) -> list[float]:
    """Return each layer's mean score over `languages`, or over all languages if none of these has scores."""
    by_language = scores[module]
    chosen = [by_language[language] for language in languages if language in by_language] or list(by_language.values())
    return [float(value) for value in np.mean(chosen, axis=0)]


def choose(scores: Scores, criterion: str, count: int, module: LayerModule, languages: Sequence[str]) -> Choice:
    """Choose the `count` layers with the highest mean scores. Ties go to the lower layer."""
    means = mean_scores(scores, module, languages)
    ranked = sorted(range(len(means)), key=lambda index: -means[index])
    known = [language for language in languages if language in scores[module]] or list(scores[module])
    shown = ", ".join(f"{index} ({means[index]:.3g})" for index in ranked[:count])
    reason = (
        f"highest {criterion} of the {module}, {CRITERIA[criterion].label}, mean over {', '.join(known)}: {shown}; "
        f"next {ranked[count]} ({means[ranked[count]]:.3g})"
    )
    return Choice(tuple(sorted(ranked[:count])), reason)
