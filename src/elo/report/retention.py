"""Retention: whether the base model's abilities outside the target languages were kept or lost."""

from collections.abc import Sequence

from elo.format import listed
from elo.report.paired import BASE, compare_measures, whole_values
from elo.report.schema import MIN_SEEDS, Difference, Results, Retained, Retention

RULE = (
    "Retention compares each contestant with the base model in everything but the target languages. A measure is "
    "improved if the 95 % interval of its change contains only gains, kept if the interval stays within the limit, "
    "lost if it contains only losses, and otherwise undecided. These intervals are not corrected for multiple "
    "comparisons. With one seed, interval and outcome cover documents or items alone."
)


def retention(results: Results, budget: str, contestant: str, in_bpb: Sequence[Difference]) -> Retention | None:
    """Return the retention of a contestant; None if nothing can be compared.

    Args:
        in_bpb: differences from the base model in bits per byte, one for each source language.
    """
    limits = results.endpoint
    found = [
        Retained(
            measure="bits per byte",
            language=each.languages[0],
            unit="number",
            before=results.base_of(contestant).bpb[each.languages[0]],
            change=each.value,
            low=each.low,
            high=each.high,
            limit=limits.source_limit_bpb,
            outcome=_outcome(-each.high, -each.low, limits.source_limit_bpb),
        )
        for each in in_bpb
        if each.languages[0] in results.base.bpb
    ]
    before = whole_values(results.base_of(contestant))
    found += [
        Retained(
            measure=each.measure,
            language=each.language,
            unit=each.unit,
            before=before[each.measure, each.language].value,
            change=each.value,
            low=each.low,
            high=each.high,
            limit=limits.source_limit_share,
            outcome=_outcome(each.low, each.high, limits.source_limit_share),
        )
        for each in compare_measures(results, budget, [(contestant, BASE)])
        if each.language not in results.languages.targets and each.unit == "share"
    ]
    return Retention(contestant=contestant, parts=tuple(found)) if found else None


def _outcome(low: float, high: float, limit: float) -> str:
    """Return the outcome for the interval of a change, where higher is better."""
    if low > 0:
        return "improved"
    if low >= -limit:
        return "kept"
    return "lost" if high < 0 else "undecided"


def sentence(title: str, kept: Retention, seeds: int) -> str:
    """Return the retention of a contestant in words."""
    names = {
        outcome: [
            f"{part.measure.replace('_', ' ')} {part.language}".strip()
            for part in kept.parts
            if part.outcome == outcome
        ]
        for outcome in ("lost", "undecided", "kept", "improved")
    }
    verdict = "something was lost" if names["lost"] else "undecided" if names["undecided"] else "nothing was lost"
    parts = "; ".join(f"{outcome}: {listed(of_outcome)}" for outcome, of_outcome in names.items() if of_outcome)
    over = "retention over one seed" if seeds < MIN_SEEDS else "retention"
    return f"{title}, {over}: {verdict}. {parts[:1].upper()}{parts[1:]}."
