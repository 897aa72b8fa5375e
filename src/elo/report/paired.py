"""Paired differences in benchmark values of two models on the same items.

Intervals cover items and seeds, as for bits per byte: the errors of the mean over items and of the mean over seeds have
Student's t distribution. With one seed and right-or-wrong items, the p-value is that of McNemar's exact test.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np

from elo.evaluate.base import MeasureValue
from elo.report.schema import EvaluationPoint, Measured, MeasureDifference, PairedDifference, Results
from elo.report.statistics import Floats, estimate_items, holm, mcnemar

Paired = TypeVar("Paired", bound=PairedDifference)
BASE = "base"
"""Name of the base model among contestants."""


def whole_values(measured: Measured | EvaluationPoint) -> dict[tuple[str, str], MeasureValue]:
    """Return the values of whole benchmarks by measure and language."""
    return {(value.measure, value.language): value for value in measured.measures if value.name == "all"}


def compare_measures(results: Results, budget: str, pairs: Sequence[tuple[str, str]]) -> tuple[MeasureDifference, ...]:
    """Return the differences of (contestant, reference) in every benchmark, with Holm's correction over all of them.

    Benchmarks without values of items, and pairs without a common seed, are left out.
    """
    found: list[MeasureDifference] = []
    for key, value in whole_values(results.base).items():
        for contestant, reference in pairs:
            paired = _paired_items(results, budget, contestant, reference, key)
            if paired is None:
                continue
            ours_SN, theirs_SN = paired
            known = estimate_items(ours_SN - theirs_SN)
            exact = len(ours_SN) == 1 and set(np.unique(paired)) <= {0.0, 1.0}
            p_value = mcnemar(ours_SN[0], theirs_SN[0]) if exact else known.p_value
            found.append(
                MeasureDifference(
                    contestant=contestant,
                    reference=reference,
                    measure=key[0],
                    language=key[1],
                    unit=value.unit,
                    higher_is_better=value.higher_is_better,
                    **asdict(known) | {"p_value": p_value},
                    adjusted_p_value=p_value,
                    test="McNemar" if exact else "t",
                    seeds=len(ours_SN),
                    items=ours_SN.shape[1],
                )
            )
    return corrected(found)


def corrected(found: Sequence[Paired]) -> tuple[Paired, ...]:
    """Return the differences with p-values adjusted by Holm's method over all of them."""
    adjusted = holm([each.p_value for each in found])
    return tuple(
        each.model_copy(update={"adjusted_p_value": value}) for each, value in zip(found, adjusted, strict=True)
    )


def measured_pairs(results: Results, budget: str, contestant: str, reference: str) -> list[tuple[Measured, Measured]]:
    """Return what was measured of a contestant and of its reference, for each seed that both have."""
    ours = {trial.seed: trial.measured for trial in results.finished(contestant, budget)}
    theirs = {trial.seed: trial.measured for trial in results.finished(reference, budget)}
    if reference == BASE:
        theirs = dict.fromkeys(ours, results.base_of(contestant))
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _paired_items(
    results: Results, budget: str, contestant: str, reference: str, key: tuple[str, str]
) -> tuple[Floats, Floats] | None:
    """Return the values of the items [seeds, items] of both; None if they cannot be paired."""
    pairs = measured_pairs(results, budget, contestant, reference)
    items = [[value.per_item if (value := whole_values(each).get(key)) else () for each in pair] for pair in pairs]
    lengths = {len(each) for pair in items for each in pair}
    if len(lengths) != 1 or min(lengths) < 2:
        return None
    items_S2N = np.array(items, np.float64)
    return items_S2N[:, 0], items_S2N[:, 1]
