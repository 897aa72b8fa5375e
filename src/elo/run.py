"""The whole job: prepare, detach, ELO pretraining, attach, layer alignment, evaluation, controls, report.

Each step is a stage of the run folder (elo.store.run_folder): done once, gone on with after a kill, redone when what it
depends on has changed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elo.config import RunConfig, load_config
from elo.errors import EloError
from elo.job import Job, open_job
from elo.results import write_results
from elo.store.run_folder import Stage

if TYPE_CHECKING:
    from elo.methods.methods import Method

Until = Literal["prepare", "detach", "elo_pretraining", "attach", "layer_alignment"]


def prepare_together(config: str | Path | dict[str, Any], *, overrides: list[str] | None = None) -> None:
    """Tokenise a run's corpora beside other processes that do the same, on machines that share the run folder.

    It returns when all is prepared, whoever did it.

    Raises:
        EloError: as `run`; or the folder is held by a run.
    """
    with open_job(load_config(config, overrides), shared=True) as job:
        job.prepare(together=True)


class _ReachedError(Exception):
    """The stage that was asked for is done."""


def run(
    config: RunConfig | str | Path | dict[str, Any], *, overrides: list[str] | None = None, until: Until | None = None
) -> dict[str, Any]:
    """Do a run, or go on with it.

    Args:
        config: a configuration, its file, or a dict of the same form.
        overrides: `key.path=value`, applied to a file or dict.
        until: stop once this stage is done.

    Returns:
        The results, as in results.json (see docs/results.md); {} when `until` stopped it before.

    Raises:
        EloError: a mistake of the user's: what, where, what was got, what to do.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    with open_job(config) as job:
        try:
            return _all_stages(job, until)
        except _ReachedError:
            return {}


def _all_stages(job: Job, until: Until | None) -> dict[str, Any]:
    def reached(stage: str) -> None:
        if until == stage:
            raise _ReachedError

    config = job.config
    _check_until(job.method(config.method), until)
    prepared = job.prepare()
    reached("prepare")
    job.divide_budget(prepared)
    base = None if until else job.evaluate("base", job.base)

    methods: dict[str, dict[str, Any]] = {}
    # full_at_wall_time is matched with what the others took, so it comes last.
    controls = sorted(config.controls, key=lambda name: name == "full_at_wall_time")
    for name in (config.method, *controls):
        methods[name] = adapt(job, name, methods, reached=reached)
    assert base is not None
    job.link_model(methods[config.method]["model"])
    results = write_results(job, base.record, methods)
    job.report(results)
    return results


def _check_until(method: "Method", until: Until | None) -> None:
    if until is None:
        return
    stages = ["prepare"]
    for phase in method.phases:
        stages += ["detach", phase.name, "attach"] if phase.detached else [phase.name]
    if until not in stages:
        raise EloError(f"method {method.name!r} has no stage {until!r}; it has {', '.join(stages)}")


def adapt(job: Job, name: str, earlier: dict[str, dict[str, Any]], *, reached: Any = lambda _: None) -> dict[str, Any]:
    """Run one method from the base to its evaluated model.

    Args:
        earlier: what this function returned for the methods before, which full_at_wall_time is matched with.
        reached: called with each stage's name once it is done.

    Returns:
        {"model": folder, "stages": {name: record}, "evaluation": ..., "before_alignment": ... or None}
    """
    method = job.method(name)
    model: Stage | None = None
    folder = job.base
    stages: dict[str, dict[str, Any]] = {}
    before_alignment = bridge = None
    for phase in method.phases:
        rows = job.rows.of(phase, method, earlier)
        if len(rows) == 0:
            reached(phase.name)
            continue
        if phase.needs_bridge and bridge is None:
            bridge = job.bridge(method)
            stages["bridge"] = bridge.record
        if phase.detached:
            detached = job.detach(name)
            stages["detach"] = detached.record
            reached("detach")
            trained = job.train(method, phase, rows, job.path(name, "detached"), detached, bridge)
            stages[phase.name] = trained.record
            reached(phase.name)
            model = job.attach(method, job.path(name, phase.name), trained)
            stages["attach"] = model.record
            reached("attach")
            folder = job.path(name, "attached")
            before_alignment = job.evaluate(f"{name}-attached", folder, model, brief=True).record
        else:
            model = job.train(method, phase, rows, folder, model, bridge if phase.needs_bridge else None)
            stages[phase.name] = model.record
            folder = job.path(name, phase.name)
            reached(phase.name)
    evaluation = job.evaluate(name, folder, model)
    return {
        "model": folder,
        "stages": stages,
        "evaluation": evaluation.record,
        "before_alignment": before_alignment,
    }


def wall_seconds(adapted: dict[str, Any]) -> float:
    """Seconds a method took: its stages' own time, without evaluation."""
    return float(sum(record["seconds"] for record in adapted["stages"].values()))
