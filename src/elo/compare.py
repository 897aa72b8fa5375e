"""Compare methods, or base models, on the same text and budget (`elo compare`).

Each contestant's learning rates are tuned on validation text, with the whole budget or a share of it. Then the
contestant is trained with every seed and measured on held-out text. A trial is a run (`elo.run`) with given rates,
tokens and seed. Every trial has a complete schedule, because a run that is stopped during its decay is worse than one
that ends there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elo.budget import divide_budget
from elo.circumstances import circumstances, model_record
from elo.config import Budget, CompareConfig, RunConfig, contestant_run, load_comparison
from elo.data.shards import PreparedData
from elo.errors import EloError, MethodFailedError
from elo.format import duration, listed
from elo.inputs import Inputs
from elo.preflight import check_inputs, check_model, check_processes
from elo.report import collect, schema, verdict
from elo.report.files import judged, write_results
from elo.report.write import report, show
from elo.run import (
    adapt,
    heldout_text,
    measure,
    open_run,
    prepare_data,
    probe_layers,
    validation_text,
)
from elo.run_results import training_flops
from elo.store.processes import is_main
from elo.store.run_folder import RunFolder

# Number of updates in the first speed test of a contestant, and share of the time budget for the second.
_FIRST_TEST_STEPS = 6
_SECOND_TEST_SHARE = 0.15
# Relative deviation of a trial from its time budget above which its tokens are computed again.
_TOLERANCE = 0.05
# Maximum number of rates to try beyond the grid if the best one is at its edge.
_EXTENSIONS = 2

Rates = dict[str, float]
"""Peak learning rate by phase."""


def compare(
    config: CompareConfig | str | Path | dict[str, Any], *, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Run all trials of a comparison, or resume an interrupted comparison.

    Args:
        config: a comparison's configuration, its file, or a dict of the same form.
        overrides: `key.path=value`, applied to a file or dict.

    Returns:
        The results, as in results.json (docs/results.md), which is also written after every contestant.

    Raises:
        EloError: the configuration or an input is invalid.
    """
    if not isinstance(config, CompareConfig):
        config = load_comparison(config, overrides)
    with _open(config) as opened:
        comparison = _Comparison(config, opened)
        inputs = comparison.inputs
        results = comparison.run()
        if is_main():
            show(results)
            inputs.folder.say(f"report: {inputs.folder.path('report.html')}")
        return results.model_dump(mode="json")


@contextmanager
def _open(config: CompareConfig) -> Iterator[dict[str, Inputs]]:
    """Check every contestant's run, lock the folders, and yield each contestant's inputs.

    Contestants with the same base model share a folder: the first one's is that of the comparison.
    """
    runs = {
        name: contestant_run(
            config,
            name,
            Path(config.output),
            learning_rates={},
            tokens=config.budgets[0].tokens or 1,
            seed=config.seeds[0],
        )
        for name in config.contestants
    }
    for run in runs.values():
        if run.chat is not None:
            raise EloError(
                "run: chat: a comparison makes no chat models; remove the section, and use `elo run` or `elo chat` on "
                "the method that you choose"
            )
        check_inputs(run)
        check_processes(run)
    first = next(iter(runs.values()))
    for name, run in runs.items():
        for key in ("data", "evaluation", "trust_remote_code"):
            if _shared(run, key) != _shared(first, key):
                raise EloError(
                    f"contestants.{name}.changes: {key} differs from the other contestants, and must be the same for "
                    "all; remove the change"
                )
    with ExitStack() as stack:
        opened: dict[tuple[str, str | None], Inputs] = {}
        found = {}
        for name, run in runs.items():
            base = (run.model, run.tokenizer)
            if base not in opened:
                output = str(Path(config.output) / "bases" / name) if opened else run.output
                opened[base] = stack.enter_context(open_run(run.model_copy(update={"output": output})))
            layers = check_model(run, opened[base].base.path)
            found[name] = replace(opened[base], layers=layers)
        yield found


@dataclass(frozen=True)
class _Base:
    """A base model before training, and the text in its tokens."""

    data: PreparedData
    measured: dict[str, Any]
    validation: dict[str, Any]


class _Comparison:
    def __init__(self, config: CompareConfig, opened: dict[str, Inputs]) -> None:
        self.config, self.opened = config, opened
        self.inputs = next(iter(opened.values()))
        self.say = self.inputs.folder.say
        self.reasons: dict[str, str] = {}
        by_folder: dict[Path, _Base] = {}
        self.bases: dict[str, _Base] = {}
        for name, inputs in opened.items():
            folder = inputs.folder.root
            if folder not in by_folder:
                data = prepare_data(inputs)
                measured = measure(inputs, "evaluate-base", inputs.base, heldout_text(inputs, data))
                # Before training, so that missing validation text is an error at the start.
                validation = validation_text(inputs, data)
                by_folder[folder] = _Base(
                    data, measured, measure(inputs, "validate-base", inputs.base, validation, brief=True)
                )
            self.bases[name] = by_folder[folder]
            self._probe_layers(name)
        self.base = self.bases[next(iter(opened))]
        for line in self.base.measured["warnings"]:
            self.say(f"warning: {line}")
        self.seconds: dict[str, float] = {}  # by trial
        self.num_expected = sum(
            sum(len(grid) for grid in self._grids(name).values()) - len(self._grids(name)) + len(config.seeds)
            for name in config.contestants
        ) * len(config.budgets)

    def _probe_layers(self, name: str) -> None:
        """Make the choices of a contestant that need scores of the layers."""
        run = self._run(name, 1)
        found = probe_layers(replace(self.opened[name], config=run), self.bases[name].data)
        self.opened[name] = replace(self.opened[name], layers=found.layers)
        self.reasons[name] = found.layers_reason
        contestant = self.config.contestants[name].model_copy(update={"method": found.config.method})
        self.config = self.config.model_copy(update={"contestants": self.config.contestants | {name: contestant}})

    def run(self) -> schema.Results:
        """Tune and train every contestant with every budget."""
        trials: list[schema.Trial] = []
        results = self._results(trials)
        for budget in self.config.budgets:
            for name in self.config.contestants:
                tokens = self._tokens(name, budget)
                share = max(1, round(tokens * self.config.tuning_share / self._step(name))) * self._step(name)
                rates, tried = self._tune(name, share)
                tuned = self._reports_tuning(name)
                reported = [
                    self._trial(name, rates, tokens, seed, validated=tuned and seed == self.config.seeds[0])
                    for seed in self.config.seeds
                ]
                chosen = tuple(rates.values()) if tuned else None
                tried = {key: trial for key, trial in tried.items() if key != chosen}
                trials += [each.model_copy(update={"budget": budget.name, "tuning": True}) for each in tried.values()]
                trials += [each.model_copy(update={"budget": budget.name}) for each in reported]
                last = budget == self.config.budgets[-1] and name == list(self.config.contestants)[-1]
                results = self._results(trials).model_copy(update={"in_progress": not last})
                if is_main():
                    write_results(self.inputs.folder.path(schema.FILE_NAME), results)
                    report(results, self.inputs.folder.root)
        return results

    # Budgets.

    def _tokens(self, name: str, budget: Budget) -> int:
        """Return the number of tokens of a contestant's run; for a time budget, computed from its speed."""
        if budget.tokens is not None:
            return budget.tokens
        if speed := self.config.contestants[name].tokens_per_second:
            seconds = budget.value - self.config.contestants[name].fixed_seconds
            if seconds <= 0:
                raise EloError(
                    f"contestants.{name}.fixed_seconds: leaves nothing of the budget of {budget.name}; lower it, or "
                    "raise the budget"
                )
            return max(1, round(speed * seconds / self._step(name))) * self._step(name)

        def find_tokens(output: Path, *, seconds: float, **decisive: Any) -> dict[str, Any]:
            method = self._run(name, 1).method
            step = self._step(name)
            shortest = int(_FIRST_TEST_STEPS * step / min(map(method.share_of, method.phases)))
            rates = _middle(self._grids(name))

            seed = self.config.seeds[0]
            tokens = shortest
            for wanted in (_SECOND_TEST_SHARE * seconds, seconds):
                test = self._train(name, rates, tokens, seed, validated=False, reported=False)
                tokens = max(shortest, _tokens_within(test, tokens, wanted, budget.kind)) // step * step
            # Tuning reuses this trial, if it filled the budget.
            whole = self._train(name, rates, tokens, seed, validated=self._reports_tuning(name))
            if abs(_spent(whole, budget.kind) / seconds - 1) > _TOLERANCE:
                tokens = max(shortest, _tokens_within(whole, tokens, seconds, budget.kind)) // step * step
            return {"tokens": tokens}

        described = self._run(name, 1).model_dump(mode="json", exclude={"output"})
        stage_name = f"budget-{name}-{budget.kind}-{budget.value:g}"
        stage = self.inputs.folder.once(
            stage_name,
            find_tokens,
            keep=False,
            collective=True,
            seconds=budget.value,
            run=described,
            base=self.opened[name].base,
            data=self.bases[name].data.fingerprint,
            layers=self.opened[name].layers,
        )
        self.say(f"{name}: {stage.record['tokens']:,} tokens within {budget.name}")
        return int(stage.record["tokens"])

    def _step(self, name: str) -> int:
        """Return the number of tokens of a contestant's largest update."""
        return max(self._run(name, 1).settings(phase).tokens_per_step for phase in self.config.method(name).phases)

    # Learning rates.

    def _grids(self, name: str) -> dict[str, list[float]]:
        """Return the rates to try by phase, in the order of the method's phases."""
        phases = [phase.name for phase in self.config.method(name).phases]
        own = self.config.contestants[name].learning_rates
        if isinstance(own, dict):
            for phase in own:
                if phase not in phases:
                    raise EloError(
                        f"contestants.{name}.learning_rates: the method has no phase {phase!r}; write "
                        f"{' or '.join(phases)}"
                    )
        chosen = own if isinstance(own, dict) else dict.fromkeys(phases, own or self.config.learning_rates)
        return {phase: sorted(set(chosen.get(phase) or self.config.learning_rates)) for phase in phases}

    def _reports_tuning(self, name: str) -> bool:
        """Return whether the trial that wins the tuning of a contestant is also reported, to save a training."""
        return self.config.tuning_share == 1 and any(len(grid) > 1 for grid in self._grids(name).values())

    def _tune(self, name: str, tokens: int) -> tuple[Rates, dict[tuple[float, ...], schema.Trial]]:
        """Choose the best learning rates on validation text, one phase after another.

        The rates are ranked as contestants are: source languages within the limit first, then by the target languages.

        Returns:
            The chosen rates, and all trials by their rates.
        """
        grids = self._grids(name)
        rates = _middle(grids)
        tried: dict[tuple[float, ...], schema.Trial] = {}

        def score(phase: str, rate: float) -> tuple[float, float]:
            attempt = {**rates, phase: rate}
            key = tuple(attempt.values())
            if key not in tried:
                tried[key] = self._trial(
                    name, attempt, tokens, self.config.seeds[0], validated=True, reported=self.config.tuning_share == 1
                )
            return verdict.score(tried[key], self.inputs.config.data.targets)

        for phase, grid in grids.items():
            if len(grid) == 1:
                continue
            scores = {rate: score(phase, rate) for rate in grid}
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
                scores[float(f"{beyond:.3g}")] = score(phase, float(f"{beyond:.3g}"))
            rates[phase] = min(scores, key=scores.__getitem__)
        return rates, tried

    # Trials.

    def _trial(
        self, name: str, rates: Rates, tokens: int, seed: int, *, validated: bool, reported: bool = True
    ) -> schema.Trial:
        """Train and measure a contestant, and show the user the result.

        Args:
            validated: whether to measure on validation text.
            reported: whether to measure on held-out text. With `tuning_share` 1, the trial with the first seed serves
                both for tuning and in the report.
        """
        trial = self._train(name, rates, tokens, seed, validated=validated, reported=reported)
        self.seconds[_identity(name, rates, tokens, seed, validated=validated, reported=reported)] = trial.seconds
        done = len(self.seconds)
        bpb = (trial.measured if reported else trial.validation or trial.measured).bpb
        shown = trial.failed or ", ".join(f"{language} {value:.4f}" for language, value in bpb.items())
        shown += "" if reported or trial.failed else " on validation text"
        at = ", ".join(f"{rate:g}" for rate in rates.values())
        left = (self.num_expected - done) * sum(self.seconds.values()) / done
        self.say(
            f"trial {done} of about {max(self.num_expected, done)}: {name} at {at}, seed {seed}: {shown}"
            + (f"; about {duration(left)} left" if left > 0 else "")
        )
        return trial

    def _train(
        self, name: str, rates: Rates, tokens: int, seed: int, *, validated: bool, reported: bool = True
    ) -> schema.Trial:
        """Train and measure a contestant, or return the finished trial. For the arguments see `_trial`.

        A speed test is neither validated nor reported: it is not measured, since only its time counts.
        """
        identity = _identity(name, rates, tokens, seed, validated=validated, reported=reported)
        run = self._run(name, tokens, rates, seed)

        def work(output: Path, *, measured_on: list[str], **decisive: Any) -> dict[str, Any]:
            config = self._run(name, tokens, rates, seed, output)
            return self._run_trial(name, replace(self.opened[name], config=config), output, measured_on)

        record = self.inputs.folder.once(
            f"trials/{identity}",
            work,
            keep=False,
            collective=True,
            base=self.opened[name].base,
            data=self.bases[name].data.fingerprint,
            measured_on=["heldout"] * reported + ["validation"] * validated,
            run=run.model_dump(mode="json", exclude={"output", "title"}),
            layers=self.opened[name].layers,
        ).record
        trial = schema.Trial.model_validate(record["trial"])
        if trial.validation is None:
            return trial
        before, sources = collect.measured(self.bases[name].validation), self.inputs.config.data.sources
        excess = verdict.source_excess(trial.validation, before, sources, self.config.source_limit)
        return trial.model_copy(update={"source_excess_bpb": excess})

    def _run_trial(self, name: str, inputs: Inputs, output: Path, measured_on: list[str]) -> dict[str, Any]:
        folder = RunFolder(output, lambda _: None)
        (output / "stages").mkdir(parents=True, exist_ok=True)
        inputs = replace(inputs, folder=folder)
        rates = {phase.name: inputs.config.settings(phase).learning_rate for phase in inputs.config.method.phases}
        described = {"contestant": name, "budget": "", "seed": inputs.config.seed, "learning_rates": rates}
        try:
            base = self.bases[name]
            sequences = divide_budget(inputs.config, base.data, folder.say)
            adapted = adapt(inputs, base.data, sequences, base.measured["bpb"])
        except MethodFailedError as error:
            return {"trial": schema.Trial(**described, failed=str(error)).model_dump(mode="json")}
        trial = collect.trial(
            name,
            "",
            inputs.config.seed,
            adapted.records,
            measure(inputs, "evaluate", adapted.model, heldout_text(inputs, base.data))
            if "heldout" in measured_on
            else None,
            before_alignment=adapted.before_alignment,
            learning_rates=rates,
            validation=measure(inputs, "validate", adapted.model, validation_text(inputs, base.data), brief=True)
            if "validation" in measured_on
            else None,
            flops=training_flops(inputs, adapted),
        )
        return {"trial": trial.model_dump(mode="json")}

    def _run(
        self,
        name: str,
        tokens: int,
        rates: Rates | None = None,
        seed: int | None = None,
        folder: Path | None = None,
    ) -> RunConfig:
        return contestant_run(
            self.config,
            name,
            folder or self.inputs.folder.path("trials"),
            learning_rates=rates or {},
            tokens=tokens,
            seed=self.config.seeds[0] if seed is None else seed,
        )

    # Results.

    def _results(self, trials: list[schema.Trial]) -> schema.Results:
        config, run = self.config, self.inputs.config
        contestants = []
        for name, each in config.contestants.items():
            method = config.method(name)
            label = each.label or (method.label if method.name == name else name)
            contestants.append(
                {
                    "name": name,
                    "label": label,
                    "method": method.name,
                    "layers": self.opened[name].layers,
                    **self._base(name),
                    "layers_reason": self.reasons[name],
                    "changes": each.changes | method.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
                }
            )
        shared = circumstances(run, self.inputs.base.path, self.base.data)
        if len({self._run(name, 1).data.model_dump_json() for name in config.contestants}) > 1:
            # Schedules differ, and with them the shares.
            shared["data"] |= {"replay_ratio": None, "shares": {}}
        results = schema.Results.model_validate(
            {
                **shared,
                "schema_version": schema.SCHEMA_VERSION,
                "kind": "comparison",
                "title": config.title or self._title(),
                "config": config.model_dump(mode="json"),
                "endpoint": {"source_limit_bpb": config.source_limit},
                "base": collect.measured(self.base.measured),
                "base_validation": collect.measured(self.base.validation),
                "contestants": contestants,
                "budgets": [{"name": each.name, "kind": each.kind, "value": each.value} for each in config.budgets],
                "seeds": config.seeds,
                "trials": trials,
            }
        )
        return judged(results)

    def _base(self, name: str) -> dict[str, Any]:
        """Return the base model of a contestant, if base models are compared."""
        if all(base is self.base for base in self.bases.values()):
            return {}
        inputs = self.opened[name]
        model = model_record(inputs.config, inputs.base.path)
        return {"model": model, "base": collect.measured(self.bases[name].measured).model_dump(mode="json")}

    def _title(self) -> str:
        run = self.inputs.config
        several = any(base is not self.base for base in self.bases.values())
        names = listed(list(dict.fromkeys(Path(inputs.config.model).name for inputs in self.opened.values())))
        targets = listed(run.data.targets)
        return (
            f"{names} learn {targets}: base models compared"
            if several
            else f"{names} learns {targets}: methods compared"
        )


def _shared(run: RunConfig, key: str) -> Any:
    """Return the value of `key` that all contestants must share; for the data, without the schedule."""
    return run.data.model_copy(update={"schedule": []}) if key == "data" else getattr(run, key)


def _identity(name: str, rates: Rates, tokens: int, seed: int, *, validated: bool, reported: bool) -> str:
    at = "-".join(f"{rate:g}" for rate in rates.values())
    return f"{name}-{tokens}-{seed}-{at}" + ("" if reported else "-tuning" if validated else "-speed")


def _middle(grids: dict[str, list[float]]) -> Rates:
    return {phase: grid[len(grid) // 2] for phase, grid in grids.items()}


def _spent(trial: schema.Trial, kind: str) -> float:
    return float(getattr(trial, kind) or trial.seconds)


def _tokens_within(trial: schema.Trial, tokens: int, seconds: float, kind: str) -> int:
    """Return the tokens of a run that takes `seconds`, from the speed and fixed costs of a trial with `tokens`."""
    training = sum(float(getattr(stage, kind) or stage.seconds) for stage in trial.stages if stage.tokens)
    fixed = _spent(trial, kind) - training
    return int(max(0.0, seconds - fixed) / training * tokens) if training else tokens
