"""Judge what the statistics support at each budget, and collect warnings for the reader."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from elo.format import count, duration, learning_rate, listed, mean_of, signed
from elo.report import retention
from elo.report.paired import BASE, compare_measures, corrected, measured_pairs
from elo.report.schema import (
    MIN_DOCUMENTS,
    MIN_SEEDS,
    Budget,
    BudgetVerdict,
    Contestant,
    Difference,
    Measured,
    Results,
    Trial,
    Verdict,
    mean_bpb,
)
from elo.report.statistics import Floats, bits_per_byte, estimate, resampled_documents

Pair = tuple[str, str, tuple[str, ...]]
"""Contestant, reference, languages."""
OFF_BUDGET = 0.1
"""Relative distance from a budget above which there is a warning."""
RULE = (
    "Differences are paired by seed and document. Intervals cover 95 %: documents are resampled 10,000 times, and the "
    "error over seeds is drawn from Student's t distribution. p-values are two-sided and corrected by Holm's method "
    "over contestants and languages, budget by budget. Bold: significant at 5 % after correction, over at least "
    f"{MIN_SEEDS} seeds and {MIN_DOCUMENTS} documents. Benchmarks are compared in the same way, item by item, as a "
    f"family of their own; with one seed, accuracies by McNemar's exact test. {retention.RULE}"
)


def judge(results: Results) -> Verdict:
    """Return the verdict on every budget, and all warnings."""
    return Verdict(
        rule=RULE, budgets=tuple(_judge(results, budget.name) for budget in results.budgets), warnings=warnings(results)
    )


def reference_of(results: Results) -> str:
    """Return what contestants are compared with: full CPT, else the first one; the base if there is only one."""
    if len(results.contestants) == 1:
        return BASE
    return next((each.name for each in results.contestants if each.method == "full"), results.contestants[0].name)


def title_of(results: Results, name: str) -> str:
    """Return a contestant's display name, in quotes if it contains a comma."""
    title = next((each.title for each in results.contestants if each.name == name), "base model")
    return f"“{title}”" if "," in title else title


def holds_source(results: Results, contestant: str, budget: str) -> bool:
    """Return whether the mean over seeds stays within the limit in every source language that was measured."""
    changes = [results.change(contestant, budget, language) for language in results.languages.sources]
    return all(change is None or change <= results.endpoint.source_limit_bpb for change in changes)


def _judge(results: Results, budget: str) -> BudgetVerdict:
    reference, targets = reference_of(results), results.languages.targets
    names = [each.name for each in results.contestants]
    pairs = [(name, reference, (language,)) for language in results.languages.all for name in names]
    bpb = {
        name: value
        for name in names
        if all(trial.failed is None for trial in results.reported(name, budget))
        and holds_source(results, name, budget)
        and (value := results.mean_bpb(name, budget, targets)) is not None
    }
    ranked = sorted(bpb, key=bpb.__getitem__)
    against = compare(results, budget, [(ranked[0], name, targets) for name in ranked[1:]])
    supported = [each for each in against if each.is_supported and each.value < 0]
    sources = [(language,) for language in results.languages.sources]
    retained = {
        name: retention.retention(
            results, budget, name, compare(results, budget, [(name, BASE, each) for each in sources])
        )
        for name in names
    }
    verdict = BudgetVerdict(
        budget=budget,
        reference=reference,
        differences=compare(results, budget, [pair for pair in pairs if pair[0] != reference]),
        ranked=tuple(ranked),
        best_against=against,
        best_is_supported=0 < len(supported) == len(ranked) - 1,
        measure_differences=compare_measures(
            results, budget, [(name, reference) for name in names if name != reference]
        ),
        retention=tuple(each for each in retained.values() if each is not None),
        retention_sentences=tuple(
            retention.sentence(title_of(results, name), each, len(results.finished(name, budget)))
            for name, each in retained.items()
            if each is not None
        ),
    )
    return verdict.model_copy(update={"sentences": tuple(_sentences(results, verdict))})


def compare(results: Results, budget: str, pairs: Sequence[Pair]) -> tuple[Difference, ...]:
    """Return paired differences of (contestant, reference, languages), with Holm's correction over all of them.

    Pairs without per-document values, or without a common seed, are left out.
    """
    found: list[Difference] = []
    for contestant, reference, languages in pairs:
        texts = [_paired_nats(results, budget, contestant, reference, language) for language in languages]
        known = [text for text in texts if text is not None]
        if not known or len(known) < len(texts):
            continue
        per_seed = np.mean([bits_per_byte(nats, sizes) for nats, sizes in known], axis=0)
        drawn = np.mean([resampled_documents(nats.mean(axis=0), sizes) for nats, sizes in known], axis=0)
        value = estimate(per_seed.tolist(), drawn)
        found.append(
            Difference(
                contestant=contestant,
                reference=reference,
                languages=languages,
                **asdict(value),
                adjusted_p_value=value.p_value,
                seeds=per_seed.size,
                documents=min(sizes.size for _, sizes in known),
            )
        )
    return corrected(found)


def _paired_nats(
    results: Results, budget: str, contestant: str, reference: str, language: str
) -> tuple[Floats, Floats] | None:
    """Return differences of nats [seeds, documents] and bytes [documents]; None if the two cannot be paired."""
    both = measured_pairs(results, budget, contestant, reference)
    if not both or any(not each.document_nats.get(language) for pair in both for each in pair):
        return None
    sizes = both[0][0].document_bytes[language]
    if any(each.document_bytes[language] != sizes for pair in both for each in pair):
        return None
    nats = np.array([[one.document_nats[language], other.document_nats[language]] for one, other in both], np.float64)
    return nats[:, 0] - nats[:, 1], np.array(sizes, np.float64)


def _sentences(results: Results, verdict: BudgetVerdict) -> list[str]:
    """Return the ranking and the differences in words."""
    names = [each.name for each in results.contestants if results.reported(each.name, verdict.budget)]
    if not any(results.finished(name, verdict.budget) for name in names):
        return ["Every trial failed." if names else "No trial has finished yet."]
    if len(results.contestants) == 1:
        return [*_against_base(results, verdict), *_one_seed(results, verdict)]
    targets, sources = mean_of(results.languages.targets), listed(results.languages.sources)
    limit = results.endpoint.source_limit_bpb
    condition = f", with {sources} at most {limit:g} above the base model" if sources else ""
    found = []
    if verdict.ranked:
        best, *others = verdict.ranked
        value = results.mean_bpb(best, verdict.budget, results.languages.targets) or 0.0
        lead = f"{targets}{condition}: {title_of(results, best)} is lowest with {value:.3f} bits per byte"
        alike = [each.reference for each in verdict.best_against if not (each.is_supported and each.value < 0)]
        if not others:
            found.append(f"{lead}, and no other contestant is ranked.")
        elif verdict.best_is_supported:
            found.append(f"{lead}, significantly below {_all(results, others)}.")
        elif len(verdict.best_against) < len(others):
            found.append(f"{lead}. Without values per document and seed it cannot be tested against the others.")
        elif all(each.seeds < MIN_SEEDS for each in verdict.best_against):
            found.append(f"{lead}.")
        else:
            found.append(f"{lead}. The data do not separate it from {_all(results, alike)}.")
        found += _one_seed(results, verdict)
        change = results.change(best, verdict.budget, *results.languages.targets)
        if change is not None and change > 0:
            found.append(f"{title_of(results, best)} is worse than the base model in {targets} ({signed(change)} bpb).")
    out = []
    for name in names:
        if name not in verdict.ranked:
            held = holds_source(results, name, verdict.budget)
            out.append(f"{title_of(results, name)} ({'a failed seed' if held else f'{sources} above the limit'})")
    found += [f"Not ranked: {listed(out)}."] if out else []
    return found


def _one_seed(results: Results, verdict: BudgetVerdict) -> list[str]:
    """Return what a difference over one seed cannot show, in one sentence; empty if all are over more."""
    differences = (*verdict.differences, *verdict.best_against, *verdict.measure_differences)
    if all(each.seeds >= MIN_SEEDS for each in differences):
        return []
    advice = "; run at least two" if results.kind == "comparison" else ""
    return [
        f"With one seed, intervals cover the choice of documents alone, so no difference is supported or bold{advice}."
    ]


def _against_base(results: Results, verdict: BudgetVerdict) -> list[str]:
    """Return how bits per byte changed in a single contestant's languages, in one sentence for each role."""
    contestant, found = results.contestants[0], []
    for languages in (results.languages.targets, results.languages.sources):
        parts = []
        for language in languages:
            change = results.change(contestant.name, verdict.budget, language)
            if change is not None:
                before = results.base.bpb[language]
                intervals = [
                    f", 95 % interval {signed(each.low)} to {signed(each.high)}"
                    for each in verdict.differences
                    if each.languages == (language,)
                ]
                text = f"{language}: {before:.3f} to {before + change:.3f} bits per byte"
                parts.append(f"{text} ({signed(change)}{''.join(intervals)})")
        found += [f"{contestant.title}, {'; '.join(parts)}."] if parts else []
    return found


def _all(results: Results, names: Sequence[str]) -> str:
    return listed([title_of(results, name) for name in names])


def warnings(results: Results) -> tuple[str, ...]:
    """Return what a reader has to know before using the results."""
    found = [*_heldout_warnings(results), *_extended_base(results)]
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
    """Return what a reader has to know about one contestant at one budget."""
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
        if size is not None and size.documents is not None and size.documents < MIN_DOCUMENTS:
            found.append(f"{language}: {size.documents} held-out documents; conclusions need at least {MIN_DOCUMENTS}.")
    if not any(trial.measured.document_nats for trial in results.trials) and results.trials:
        found.append("No values per document: differences have no intervals, and nothing is marked as significant.")
    return found


def _extended_base(results: Results) -> list[str]:
    """Where every base has new vocabulary rows, nothing is measured against the model before they were added."""
    bases = [contestant.model or results.model for contestant in results.contestants]
    if not bases or any(base.vocabulary is None for base in bases):
        return []
    return [
        "The base model has an extended vocabulary, and changes are measured against it. The model before the "
        "extension may predict the target languages better; compare with it, as a contestant with its own `model`."
    ]


def _harm(results: Results, contestant: Contestant, budget: Budget) -> list[str]:
    found, limit = [], results.endpoint.source_limit_bpb
    for language in results.languages.all:
        change = results.change(contestant.name, budget.name, language)
        if change is None:
            continue
        if language in results.languages.targets and change >= 0:
            how = "worse than" if change > 0 else "no better than"
            found.append(f"the target language {language} is {how} in the base model ({signed(change)} bpb)")
        if language in results.languages.sources and change > limit:
            found.append(f"the source language {language} is {change:.4f} bpb above the base model, limit {limit:g}")
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
    """Return the trials from which learning rates were chosen: tuning trials, and reported trials that also tuned."""
    own = [trial for trial in results.trials if (trial.contestant, trial.budget) == (contestant, budget)]
    seeds = {trial.seed for trial in own if trial.tuning}
    return [trial for trial in own if trial.seed in seeds and (trial.tuning or trial.validation or trial.failed)]


def source_excess(after: Measured, before: Measured, sources: tuple[str, ...], limit: float) -> float:
    """Return how far the source language that lost most is above the limit, in bits per byte; 0 if all are within it.

    Languages without text are left out.
    """
    changes = [after.bpb[each] - before.bpb[each] for each in sources if each in after.bpb and each in before.bpb]
    return max([0.0, *(change - limit for change in changes)])


def score(trial: Trial, targets: tuple[str, ...]) -> tuple[float, float]:
    """Return what tuning minimises: the source languages' excess over the limit, then mean target bits per byte.

    Both are infinite if the trial failed.
    """
    target = mean_bpb(trial.validation, targets) if trial.validation else None
    if trial.failed or target is None:
        return float("inf"), float("inf")
    return trial.source_excess_bpb or 0.0, target


def _edges(results: Results, contestant: Contestant, budget: Budget) -> list[str]:
    """Return a warning for each chosen learning rate that is the highest or lowest tried."""
    trials = tuned(results, contestant.name, budget.name)
    if trials and all(trial.failed for trial in trials):
        return ["every learning rate that was tried failed"]
    chosen = next(iter(results.reported(contestant.name, budget.name)), None)
    if chosen is None:
        return []
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
