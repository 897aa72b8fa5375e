"""What the statistics support, budget by budget, and what a reader should be warned of."""

from collections.abc import Sequence

import numpy as np

from elo.format import count, duration, learning_rate, listed, signed
from elo.report.schema import (
    Budget,
    BudgetVerdict,
    Contestant,
    Difference,
    Measured,
    Results,
    Trial,
    Verdict,
    mean,
    mean_bpb,
)
from elo.report.statistics import Estimate, Floats, bits_per_byte, estimate, holm, resampled_documents

BASE = "base"
Pair = tuple[str, str, tuple[str, ...]]
"""Contestant, reference, languages."""
FEW_DOCUMENTS = 30
OFF_BUDGET = 0.1
"""Relative distance from a budget above which a trial is reported."""
RULE = (
    "Differences are paired by seed and document. Intervals cover 95 %: documents are resampled 10,000 times, and the "
    "error over seeds is drawn from Student's t distribution. p-values are two-sided and corrected by Holm's method "
    "over contestants and languages, budget by budget. Bold: significant at 5 % after correction."
)


def judge(results: Results) -> Verdict:
    """Apply the rule to every budget."""
    return Verdict(
        rule=RULE, budgets=tuple(_judge(results, budget) for budget in results.budgets), warnings=warnings(results)
    )


def reference_of(results: Results) -> str:
    """What contestants are compared with: full CPT, else the first contestant; the base model if there is but one."""
    if len(results.contestants) == 1:
        return BASE
    return next((each.name for each in results.contestants if each.method == "full"), results.contestants[0].name)


def title_of(results: Results, name: str) -> str:
    """A contestant's name for people, in quotes where a comma in it would break a list."""
    title = next((each.title for each in results.contestants if each.name == name), "the base model")
    return f"“{title}”" if "," in title else title


def holds_source(results: Results, trials: Sequence[Trial]) -> bool:
    """Whether the trials' mean stays within the limit in every source language that was measured."""
    for language in results.languages.sources:
        after = mean([trial.measured.bpb[language] for trial in trials if language in trial.measured.bpb])
        before = results.base.bpb.get(language)
        if after is not None and before is not None and after - before > results.endpoint.source_limit_bpb:
            return False
    return bool(trials)


def _judge(results: Results, budget: Budget) -> BudgetVerdict:
    reference = reference_of(results)
    finished = {each.name: results.finished(each.name, budget.name) for each in results.contestants}
    pairs = [
        (name, reference, (language,)) for language in results.languages.all for name in finished if name != reference
    ]
    differences = compare(results, budget.name, pairs)
    able = [
        name
        for name, trials in finished.items()
        if holds_source(results, trials) and len(trials) == len(results.reported(name, budget.name))
    ]
    ranked = sorted(able, key=lambda name: mean([results.target_bpb(t.measured) or 0.0 for t in finished[name]]) or 0.0)
    best = ranked[0] if ranked else None
    against = compare(results, budget.name, [(ranked[0], name, results.languages.targets) for name in ranked[1:]])
    supported = bool(against) and len(against) == len(ranked) - 1
    supported &= all(each.is_supported and each.value < 0 for each in against)
    verdict = BudgetVerdict(
        budget=budget.name,
        reference=reference,
        differences=differences,
        holds_source=tuple(able),
        best=best,
        best_against=against,
        best_is_supported=supported,
    )
    return verdict.model_copy(update={"sentences": tuple(_sentences(results, verdict, finished))})


def compare(results: Results, budget: str, pairs: Sequence[Pair]) -> tuple[Difference, ...]:
    """Paired differences of (contestant, reference, languages), with Holm's correction over all of them.

    Pairs without per-document values, or without a common seed, are left out.
    """
    paired: dict[Pair, list[tuple[Floats, Floats]]] = {}
    for pair in pairs:
        parts = [_paired_nats(results, budget, pair[0], pair[1], language) for language in pair[2]]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            paired[pair] = known
    drawn = _resampled([part for texts in paired.values() for part in texts])
    found: list[tuple[Pair, Estimate, int, int]] = []
    for pair, texts in paired.items():
        per_seed = np.mean([bits_per_byte(nats, sizes) for nats, sizes in texts], axis=0)
        value = estimate(per_seed.tolist(), np.mean([drawn.pop(0) for _ in texts], axis=0))
        found.append((pair, value, per_seed.size, sum(sizes.size for _, sizes in texts)))
    adjusted = holm([each.p_value for _, each, _, _ in found])
    return tuple(
        Difference(
            contestant=contestant,
            reference=reference,
            languages=languages,
            value=value.value,
            low=value.low,
            high=value.high,
            p_value=value.p_value,
            adjusted_p_value=p_value,
            seeds=seeds,
            documents=documents,
        )
        for ((contestant, reference, languages), value, seeds, documents), p_value in zip(found, adjusted, strict=True)
    )


def _resampled(parts: Sequence[tuple[Floats, Floats]]) -> list[Floats]:
    """Each part's mean over seeds on resampled documents; parts with the same documents share the resamples."""
    drawn: list[Floats] = [np.empty(0)] * len(parts)
    groups: dict[bytes, list[int]] = {}
    for index, (_, sizes) in enumerate(parts):
        groups.setdefault(sizes.tobytes(), []).append(index)
    for indices in groups.values():
        means = np.stack([parts[index][0].mean(axis=0) for index in indices])
        for index, row in zip(indices, resampled_documents(means, parts[indices[0]][1]), strict=True):
            drawn[index] = row
    return drawn


def _paired_nats(
    results: Results, budget: str, contestant: str, reference: str, language: str
) -> tuple[Floats, Floats] | None:
    """Differences of nats [seeds, documents] and bytes [documents]; None if the two cannot be paired."""
    ours = {trial.seed: trial.measured for trial in results.finished(contestant, budget)}
    if reference == BASE:
        theirs = dict.fromkeys(ours, results.base)
    else:
        theirs = {trial.seed: trial.measured for trial in results.finished(reference, budget)}
    seeds = sorted(ours.keys() & theirs.keys())
    both: list[tuple[Measured, Measured]] = [(ours[seed], theirs[seed]) for seed in seeds]
    if not both or any(not each.document_nats.get(language) for pair in both for each in pair):
        return None
    sizes = both[0][0].document_bytes[language]
    if any(each.document_bytes[language] != sizes for pair in both for each in pair):
        return None
    nats = np.array([[one.document_nats[language], other.document_nats[language]] for one, other in both], np.float64)
    return nats[:, 0] - nats[:, 1], np.array(sizes, np.float64)


def _sentences(results: Results, verdict: BudgetVerdict, finished: dict[str, list[Trial]]) -> list[str]:
    """At most three sentences."""
    if not any(finished.values()):
        failed = any(results.reported(each.name, verdict.budget) for each in results.contestants)
        return ["Every trial failed." if failed else "No trial has finished yet."]
    if len(results.contestants) == 1:
        return _against_base(results, verdict, finished[results.contestants[0].name])
    found = []
    targets, limit = listed(results.languages.targets), results.endpoint.source_limit_bpb
    condition = (
        f" with {listed(results.languages.sources)} held to base + {limit:g}" if results.languages.sources else ""
    )
    if verdict.best is None:
        return [f"No contestant finished every seed{condition}."]
    name = title_of(results, verdict.best)
    value = mean([results.target_bpb(trial.measured) or 0.0 for trial in finished[verdict.best]]) or 0.0
    lead = f"{targets}{condition}: the lowest is {name} with {value:.3f} bits per byte"
    others = [each for each in verdict.holds_source if each != verdict.best]
    if not others:
        found.append(f"{lead}, and no other contestant meets the condition.")
    elif verdict.best_is_supported:
        found.append(f"{lead}, significantly below {_all(results, others)}.")
    elif len(verdict.best_against) < len(others):
        found.append(f"{lead}. Without values per document and seed it cannot be tested against the others.")
    else:
        alike = [each.reference for each in verdict.best_against if not (each.is_supported and each.value < 0)]
        found.append(f"{lead}. The data do not separate it from {_all(results, alike)}.")
    out = [name for name, trials in finished.items() if trials and name not in verdict.holds_source]
    if out:
        found.append(f"Not ranked, for the source language or a failed seed: {_all(results, out)}.")
    if len(results.seeds) < 2:
        found.append("One seed: intervals and tests cover the choice of documents alone, not the seed.")
    return found


def _against_base(results: Results, verdict: BudgetVerdict, trials: Sequence[Trial]) -> list[str]:
    """What a single contestant did to each language."""
    contestant, found = results.contestants[0], []
    for language in results.languages.all[:2]:
        before = results.base.bpb.get(language)
        after = mean([trial.measured.bpb[language] for trial in trials if language in trial.measured.bpb])
        if before is None or after is None:
            continue
        moved = f"{language}: {before:.3f} to {after:.3f} bits per byte ({signed(after - before)}"
        for each in verdict.differences:
            if each.languages == (language,):
                moved += f", 95 % interval {signed(each.low)} to {signed(each.high)}"
        found.append(f"{contestant.title}, {moved}).")
    if len({trial.seed for trial in trials}) == 1 and verdict.differences:
        found.append("One seed: the intervals cover the choice of documents alone, not the seed.")
    return found


def _all(results: Results, names: Sequence[str]) -> str:
    return listed([title_of(results, name) for name in names])


def warnings(results: Results) -> tuple[str, ...]:
    """What a reader has to know before using the results."""
    found = [*_heldout_warnings(results)]
    for budget in results.budgets:
        at = f" ({budget.name})" if len(results.budgets) > 1 else ""
        for contestant in results.contestants:
            title = title_of(results, contestant.name)
            found += [f"{title}{at}: {message}." for message in contestant_warnings(results, contestant, budget)]
    planned = len(results.contestants) * len(results.budgets) * len(results.seeds)
    done = sum(not trial.tuning for trial in results.trials)
    if done < planned:
        found.insert(0, f"Not finished: {done} of {planned} trials are done.")
    return tuple(found)


def contestant_warnings(results: Results, contestant: Contestant, budget: Budget) -> list[str]:
    """What a reader has to know of one contestant at one budget."""
    trials = results.reported(contestant.name, budget.name)
    return [
        *_harm(results, contestant, budget),
        *_off_budget(budget, trials),
        *_edges(results, contestant, budget),
        *(f"seed {trial.seed} failed: {trial.failed}" for trial in trials if trial.failed is not None),
        *dict.fromkeys(text.rstrip(".") for trial in trials for text in trial.warnings),
    ]


def _heldout_warnings(results: Results) -> list[str]:
    found = []
    for language in results.languages.all:
        size = results.base.heldout.get(language) or results.data.heldout.get(language)
        if size is not None and size.documents is not None and size.documents < FEW_DOCUMENTS:
            found.append(
                f"{language}: {size.documents} held-out documents; {FEW_DOCUMENTS} is the least that can carry a claim."
            )
    if not any(trial.measured.document_nats for trial in results.trials) and results.trials:
        found.append("No values per document: differences have no intervals, and nothing is marked as significant.")
    return found


def _harm(results: Results, contestant: Contestant, budget: Budget) -> list[str]:
    trials = results.finished(contestant.name, budget.name)
    found = []
    for language in results.languages.all:
        before = results.base.bpb.get(language)
        after = mean([trial.measured.bpb[language] for trial in trials if language in trial.measured.bpb])
        if before is None or after is None:
            continue
        if language in results.languages.targets and after >= before:
            found.append(
                f"the target language {language} is worse than in the base model ({signed(after - before)} bpb)"
            )
        limit = results.endpoint.source_limit_bpb
        if language in results.languages.sources and after - before > limit:
            found.append(
                f"the source language {language} is {signed(after - before)} bpb off the base, limit {limit:g}"
            )
    return found


def _off_budget(budget: Budget, trials: Sequence[Trial]) -> list[str]:
    found = []
    for trial in trials:
        spent = {"tokens": trial.tokens, "seconds": trial.seconds, "cpu_seconds": trial.cpu_seconds}[budget.kind]
        if trial.failed is None and spent is not None and abs(spent / budget.value - 1) > OFF_BUDGET:
            shown = f"{count(spent)} tokens" if budget.kind == "tokens" else duration(spent)
            found.append(f"seed {trial.seed} is off the budget of {budget.name}, with {shown}")
    return found


def tuned(results: Results, contestant: str, budget: str) -> list[Trial]:
    """Trials among which the learning rates were chosen: tuning trials, and the reported one that won."""
    own = [trial for trial in results.trials if (trial.contestant, trial.budget) == (contestant, budget)]
    seeds = {trial.seed for trial in own if trial.tuning}
    return [trial for trial in own if trial.seed in seeds and (trial.tuning or trial.validation or trial.failed)]


def score(results: Results, measured: Measured | None) -> float | None:
    """What tuning minimised: target + source_weight times source bits per byte of validation text."""
    target = results.target_bpb(measured) if measured else None
    if measured is None or target is None or not results.endpoint.source_weight:
        return target
    source = mean_bpb(measured, results.languages.sources)
    return target if source is None else target + results.endpoint.source_weight * source


def _edges(results: Results, contestant: Contestant, budget: Budget) -> list[str]:
    """Chosen learning rates beyond which nothing was tried."""
    trials = tuned(results, contestant.name, budget.name)
    chosen = next((trial for trial in trials if not trial.tuning), None)
    if chosen is None:
        return ["every learning rate that was tried failed"] if trials and all(t.failed for t in trials) else []
    found = []
    for section, rate in chosen.learning_rates.items():
        tried = sorted({trial.learning_rates[section] for trial in trials if section in trial.learning_rates})
        if len(tried) > 1 and rate in (tried[0], tried[-1]):
            end = "highest" if rate == tried[-1] else "lowest"
            found.append(
                f"the learning rate of {section}, {learning_rate(rate)}, is the {end} of {len(tried)} tried; a better "
                "one may be beyond"
            )
    return found
