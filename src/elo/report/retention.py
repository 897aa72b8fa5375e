"""What became of what the base model could do besides the target languages: kept, lost, or undecided."""

from collections.abc import Sequence

from elo.format import listed
from elo.report.paired import BASE, compare_measures, whole_values
from elo.report.schema import Difference, Results, Retained, Retention

RULE = (
    "Retention compares each contestant with the base model in everything but the target languages. It is called "
    "improved if the 95 % interval of the change holds gains only, kept if the interval stays within the limit, lost "
    "if it holds losses only, and undecided otherwise. These intervals are not corrected for their number."
)


def retention(results: Results, budget: str, contestant: str, in_bpb: Sequence[Difference]) -> Retention | None:
    """Retention of a contestant; None if nothing can be compared.

    Args:
        in_bpb: its differences from the base model in bits per byte, one for each source language.
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
    """What an interval of a change means, where higher is better."""
    if low > 0:
        return "improved"
    if low >= -limit:
        return "kept"
    return "lost" if high < 0 else "undecided"


def sentence(title: str, kept: Retention) -> str:
    """The verdict of a contestant in words."""
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
    return f"{title}, retention: {verdict}. {parts[:1].upper()}{parts[1:]}."
