"""`elo compare`: which way of adapting buys most, on this model and text, for this budget.

Every contestant has its learning rates tuned on the budget itself, with its own schedule for it (a curve cut in the
middle of its decay is no fair point), on validation text; then it is trained with every seed and measured on test text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elo.config import Budget, CompareConfig, RunConfig, contestant_run, load_comparison
from elo.errors import EloError
from elo.job import Job, open_job
from elo.log import duration
from elo.preflight import check_inputs, check_model
from elo.reporting.pareto_results import FILE_NAME
from elo.store.files import write_json
from elo.store.processes import is_main
from elo.trial import TEST, VALIDATION, Trials

# Steps of the first look at a contestant's speed, and the share of a wall-time budget that the second look takes.
_FIRST_LOOK_STEPS = 6
_SECOND_LOOK_SHARE = 0.15
# How far from a wall-time budget a whole trial may end before its tokens are worked out again.
_TOLERANCE = 0.05
# How often the next rate beyond the grid is tried, where the best one stands at its edge.
_EXTENSIONS = 2


def compare(
    config: CompareConfig | str | Path | dict[str, Any], *, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Do a comparison, or go on with it: each trial is done once.

    Args:
        config: a comparison's configuration, its file, or a dict of the same form.
        overrides: `key.path=value`, applied to a file or dict.

    Returns:
        The results, as in comparison.json (docs/results.md), which is also written after every contestant.

    Raises:
        EloError: a mistake of the user's: what, where, what was got, what to do.
    """
    if not isinstance(config, CompareConfig):
        config = load_comparison(config, overrides)
    with _open(config) as comparison:
        return comparison.all()


class _Comparison:
    def __init__(self, config: CompareConfig, shared: Job, layers: dict[str, tuple[int, ...]]) -> None:
        self.config, self.shared = config, shared
        self.trials = Trials(config, shared, layers)
        self.say = shared.workspace.say
        self.seconds: dict[tuple[Any, ...], float] = {}  # by trial
        self.expected = sum(
            sum(len(grid) for grid in self._grids(name).values()) - len(self._grids(name)) + len(config.seeds)
            for name in config.contestants
        ) * len(config.budgets)

    def all(self) -> dict[str, Any]:
        self.shared.prepare()
        base = {
            part: self.shared.evaluate(f"base-{part}", self.shared.base, brief=True, heldout=documents).record
            for part, documents in (("test", TEST), ("validation", VALIDATION))
        }
        entries: list[dict[str, Any]] = []
        sweeps: list[dict[str, Any]] = []
        results = self._results(base["test"]["bpb"], entries, sweeps)
        for index, budget in enumerate(self.config.budgets):
            for name in self.config.contestants:
                tokens = self._tokens(name, budget)
                rates, sweep = self._tune(name, tokens)
                sweeps.append({"contestant": name, "budget": index, "trials": sweep})
                entry: dict[str, Any] = {
                    "contestant": name,
                    "budget": index,
                    "learning_rates": rates,
                    "trials": [self._trial(name, rates, tokens, seed) for seed in self.config.seeds],
                }
                entries.append(entry)
                if is_main():
                    write_json(self.shared.path(FILE_NAME), results)
        self._report(results)
        return results

    # Budgets.

    def _tokens(self, name: str, budget: Budget) -> int:
        """Tokens of a contestant's run within a budget: for wall time, by its own measured rates."""
        if budget.tokens is not None:
            return budget.tokens
        assert budget.seconds is not None
        seconds = budget.seconds

        def work() -> dict[str, Any]:
            run = self._run(name, 1)
            step = max(getattr(run, section).tokens_per_step for section in self._grids(name))
            shortest = int(_FIRST_LOOK_STEPS * step / min(1.0, *_shares(run)))
            rates = _middle(self._grids(name))

            def looked(tokens: int) -> dict[str, Any]:
                return self.trials.run(name, rates=rates, tokens=tokens, seed=self.config.seeds[0], validated=True)

            tokens = shortest
            for wanted in (_SECOND_LOOK_SHARE * seconds, seconds):
                tokens = max(shortest, _tokens_within(looked(tokens), tokens, wanted)) // step * step
            whole = looked(tokens)  # tuning starts from this very trial, if it filled the budget
            if abs(whole["wall_seconds"] / seconds - 1) > _TOLERANCE:
                tokens = max(shortest, _tokens_within(whole, tokens, seconds)) // step * step
            return {"tokens": tokens}

        inputs = {"seconds": seconds, "run": self._run(name, 1).model_dump(mode="json", exclude={"output"})}
        stage = self.shared.workspace.stage(f"budget-{name}-{seconds:g}", inputs, work, collective=True)
        self.say(f"{name}: {stage.record['tokens']:,} tokens within {seconds:g} s")
        return int(stage.record["tokens"])

    # Learning rates.

    def _grids(self, name: str) -> dict[str, list[float]]:
        """Rates to try by section, in the order of the method's phases."""
        run = self._run(name, 1)
        sections = dict.fromkeys(phase.settings for phase in _method(run).phases)
        if not run.layer_alignment.share and len(sections) > 1:
            sections.pop("layer_alignment", None)
        own = self.config.contestants[name].learning_rates
        if isinstance(own, dict):
            for section in own:
                if section not in sections:
                    raise EloError(
                        f"contestants.{name}.learning_rates: it does not train with section {section!r}, but with "
                        f"{', '.join(sections)}"
                    )
        chosen = own if isinstance(own, dict) else dict.fromkeys(sections, own or self.config.learning_rates)
        return {section: sorted(set(chosen.get(section) or self.config.learning_rates)) for section in sections}

    def _tune(self, name: str, tokens: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The learning rates with the lowest score on validation text, one section after the other."""
        grids = self._grids(name)
        rates = _middle(grids)
        tried: dict[tuple[float, ...], dict[str, Any]] = {}

        def score(section: str, rate: float) -> float:
            attempt = {**rates, section: rate}
            key = tuple(attempt.values())
            if key not in tried:
                trial = self._trial(name, attempt, tokens, self.config.seeds[0])
                bpb = trial["validation_bpb"] or {}
                tried[key] = {
                    "learning_rates": attempt,
                    "bpb": bpb,
                    "score": self._score(bpb),
                    "failed": trial["failed"],
                    "chosen": False,
                }
            value = tried[key]["score"]
            return float("inf") if value is None else float(value)

        for section, grid in grids.items():
            if len(grid) == 1:
                continue
            scores = {rate: score(section, rate) for rate in grid}
            for _ in range(_EXTENSIONS):
                ordered = sorted(scores)
                best = min(scores, key=scores.__getitem__)
                if best == ordered[-1]:
                    beyond = best * ordered[-1] / ordered[-2]
                elif best == ordered[0]:
                    beyond = best * ordered[0] / ordered[1]
                else:
                    break
                if beyond > 1:
                    break
                scores[float(f"{beyond:.3g}")] = score(section, float(f"{beyond:.3g}"))
            rates[section] = min(scores, key=scores.__getitem__)
        if tuple(rates.values()) in tried:
            tried[tuple(rates.values())]["chosen"] = True
        return rates, list(tried.values())

    def _score(self, bpb: dict[str, float]) -> float | None:
        target, source = self.shared.languages
        return bpb[target] + self.config.source_weight * bpb[source] if bpb else None

    def _trial(self, name: str, rates: dict[str, float], tokens: int, seed: int) -> dict[str, Any]:
        tuning = seed == self.config.seeds[0]  # one trial serves for tuning and for the report
        trial = self.trials.run(name, rates=rates, tokens=tokens, seed=seed, validated=tuning)
        self.seconds[name, tuple(rates.items()), tokens, seed] = trial["seconds"]
        done = len(self.seconds)
        shown = ", ".join(f"{language} {value:.4f}" for language, value in trial["bpb"].items()) or trial["failed"]
        at = ", ".join(f"{rate:g}" for rate in rates.values())
        left = (self.expected - done) * sum(self.seconds.values()) / done
        self.say(
            f"trial {done} of about {max(self.expected, done)}: {name} at {at}, seed {seed}: {shown}"
            + (f"; about {duration(left)} left" if left > 0 else "")
        )
        return trial

    def _run(self, name: str, tokens: int) -> RunConfig:
        rates: dict[str, float] = {}
        folder = self.shared.path("trials")
        return contestant_run(self.config, name, folder, learning_rates=rates, tokens=tokens, seed=self.config.seeds[0])

    # What is written.

    def _results(self, base: dict[str, float], entries: list[Any], sweeps: list[Any]) -> dict[str, Any]:
        from elo.methods.methods import METHODS
        from elo.results import circumstances

        run, config = self.shared.config, self.config
        return {
            **circumstances(self.shared),
            "kind": "comparison",
            "title": config.title or f"{Path(run.model).name} learns {run.data.target}: methods compared",
            "seeds": config.seeds,
            "source_weight": config.source_weight,
            "config": config.model_dump(mode="json"),
            "base": {"bpb": base},
            "budgets": [
                {
                    "name": budget.name,
                    "kind": "tokens" if budget.tokens is not None else "seconds",
                    "value": budget.tokens if budget.tokens is not None else budget.seconds,
                }
                for budget in config.budgets
            ],
            "contestants": [
                {
                    "name": name,
                    "label": each.label or (METHODS[name].label if config.method(name) == name else name),
                    "method": config.method(name),
                    "changes": each.changes,
                }
                for name, each in config.contestants.items()
            ],
            "entries": entries,
            "sweeps": sweeps,
        }

    def _report(self, results: dict[str, Any]) -> None:
        if not is_main():
            return
        from rich.console import Console

        from elo.report.write import report
        from elo.reporting.pareto_terminal import render_pareto

        report(results, self.shared.workspace.root)
        console = Console()
        console.width = max(console.width, 118)  # a table that wraps in a log file cannot be read
        console.print(render_pareto(results))
        self.say(f"report: {self.shared.path('report.html')}")


@contextmanager
def _open(config: CompareConfig) -> Iterator[_Comparison]:
    """Check every contestant's run, lock the folder, and yield the comparison."""
    output = Path(config.output)
    runs = {
        name: contestant_run(
            config, name, output, learning_rates={}, tokens=config.budgets[0].tokens or 1, seed=config.seeds[0]
        )
        for name in config.contestants
    }
    for run in runs.values():
        check_inputs(run)
    first = next(iter(runs.values()))
    for name, run in runs.items():
        for key in ("model", "data", "tokenizer", "evaluation", "trust_remote_code"):
            if getattr(run, key) != getattr(first, key):
                raise EloError(
                    f"contestants.{name}.changes: {key} must be the same for all contestants, else they cannot be "
                    "compared"
                )
    with open_job(first) as shared:
        layers = {name: check_model(run, shared.base) for name, run in runs.items()}
        yield _Comparison(config, shared, layers)


def _middle(grids: dict[str, list[float]]) -> dict[str, float]:
    return {section: grid[len(grid) // 2] for section, grid in grids.items()}


def _method(run: RunConfig) -> Any:
    from elo.preflight import methods_of

    return methods_of(run)[0]


def _shares(run: RunConfig) -> Iterator[float]:
    """Shares of the budget that the phases of the run's method train on."""
    share = run.layer_alignment.share
    for phase in _method(run).phases:
        part = {"pretraining": 1 - share, "alignment": share, "all": 1.0}[phase.rows]
        if part:
            yield part


def _tokens_within(trial: dict[str, Any], tokens: int, seconds: float) -> int:
    """Tokens of a run that takes `seconds`, by the rates and the fixed costs of a trial with `tokens`."""
    training = sum(stage["seconds"] for stage in trial["stages"] if stage["tokens"])
    fixed = trial["wall_seconds"] - training
    return int(max(0.0, seconds - fixed) / training * tokens) if training else tokens
