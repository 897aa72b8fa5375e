"""Paired differences in benchmark values: two models answered the same items.

An interval counts items and seeds, as for bits per byte: the mean over items has Student's t distribution, and so has
the mean over seeds. With one seed and right-or-wrong items, the p-value is that of McNemar's exact test.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from elo.evaluate.base import MeasureValue
from elo.report.schema import Measured, MeasureDifference, Results
from elo.report.statistics import Floats, estimate_items, holm, mcnemar

BASE = "base"
"""Name of the base model among contestants."""


def whole_values(measured: Measured) -> dict[tuple[str, str], MeasureValue]:
    """Values of whole benchmarks by measure and language."""
    return {(value.measure, value.language): value for value in measured.measures if value.name == "all"}


def compare_measures(results: Results, budget: str, pairs: Sequence[tuple[str, str]]) -> tuple[MeasureDifference, ...]:
    """Differences of (contestant, reference) in every benchmark, with Holm's correction over all of them.

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
    adjusted = holm([each.p_value for each in found])
    return tuple(
        each.model_copy(update={"adjusted_p_value": value}) for each, value in zip(found, adjusted, strict=True)
    )


def _paired_items(
    results: Results, budget: str, contestant: str, reference: str, key: tuple[str, str]
) -> tuple[Floats, Floats] | None:
    """Values of the items [seeds, items] of both; None if they cannot be paired."""
    ours = {trial.seed: trial.measured for trial in results.finished(contestant, budget)}
    theirs = {trial.seed: trial.measured for trial in results.finished(reference, budget)}
    if reference == BASE:
        theirs = dict.fromkeys(ours, results.base_of(contestant))
    seeds = sorted(ours.keys() & theirs.keys())
    both = [[whole_values(measured[seed]).get(key) for seed in seeds] for measured in (ours, theirs)]
    items = [[each.per_item if each else () for each in values] for values in both]
    lengths = {len(each) for values in items for each in values}
    if len(lengths) != 1 or min(lengths) < 2:
        return None
    first, second = np.array(items, np.float64)
    return first, second
