"""One trial of a comparison: a contestant's run with given rates, tokens and seed, and what is kept of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.config import CompareConfig, RunConfig, contestant_run
from elo.errors import TrainingDivergedError
from elo.recipes.job import Job
from elo.workspace import Stage, Workspace

if TYPE_CHECKING:
    from elo.training.methods import Method

# Held-out documents are dealt out in turn: what is reported is never measured on what chose the learning rates.
TEST, VALIDATION = slice(0, None, 2), slice(1, None, 2)


@dataclass(frozen=True)
class Trials:
    """Runs trials in the folder of a comparison, each once.

    Attributes:
        shared: the comparison's own job, whose base and token shards all trials use.
        layers: decoder layers by contestant.
    """

    config: CompareConfig
    shared: Job
    layers: dict[str, tuple[int, ...]]

    def run(self, name: str, *, rates: dict[str, float], tokens: int, seed: int, validated: bool) -> dict[str, Any]:
        """Train a contestant, measure it, and return its trial (`elo.report.schema.Trial`) without a budget.

        Args:
            name: of the contestant.
            rates: learning rate by section.
            validated: measure on the validation documents too.
        """
        workspace = self.shared.workspace
        identity = f"{name}-{tokens}-{seed}-" + "-".join(f"{rate:g}" for rate in rates.values())
        folder = workspace.path("trials", identity)
        run = contestant_run(self.config, name, folder, learning_rates=rates, tokens=tokens, seed=seed)
        assert self.shared.prepared is not None
        inputs = {
            "base": self.shared.base_identity,
            "data": self.shared.prepared.fingerprint,
            "validated": validated,
            "run": run.model_dump(mode="json", exclude={"output", "title"}),
        }

        def work() -> dict[str, Any]:
            return self._train(run, folder, name, validated)

        return workspace.stage(f"trial-{identity}", inputs, work, scratch=(folder,), collective=True).record

    def _train(self, run: RunConfig, folder: Path, name: str, validated: bool) -> dict[str, Any]:
        from elo.recipes.run import adapt
        from elo.report import collect
        from elo.report.schema import Trial

        workspace = Workspace(folder, lambda _: None)
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        job = Job(
            run,
            workspace,
            base=self.shared.base,
            tokenizer=self.shared.tokenizer,
            layers=self.layers[name],
            base_identity=self.shared.base_identity,
            prepared=self.shared.prepared,
            heldout=TEST,
        )
        assert job.prepared is not None
        job.divide_budget(job.prepared)
        rates: dict[str, float] = {
            phase.settings: getattr(run, phase.settings).learning_rate for phase in job.method(run.method).phases
        }
        try:
            adapted = adapt(job, run.method, {})
        except TrainingDivergedError as error:
            failed = Trial(contestant=name, budget="", seed=run.seed, learning_rates=rates, failed=str(error))
            return failed.model_dump(mode="json") | {"seconds": 0.0}
        trial = collect.trial(
            name,
            "",
            run.seed,
            adapted,
            learning_rates=rates,
            validation=self._validation(job, adapted) if validated else None,
            flops=training_flops(job, run.method, adapted["stages"]),
        )
        return trial.model_dump(mode="json")

    def _validation(self, job: Job, adapted: dict[str, Any]) -> dict[str, Any]:
        last = Stage("", str(adapted["model"]), {})  # a trial's folder holds one model of that name
        return job.evaluate("validation", adapted["model"], last, brief=True, heldout=VALIDATION).record


def training_flops(job: Job, name: str, stages: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Matmul FLOPs of a method's training by stage, without fitting a bridge or searching a scale."""
    from elo.model.counting import footprint, read_config

    method: Method = job.method(name)
    counted = footprint(read_config(str(job.base), trust_remote_code=job.config.trust_remote_code))
    return {
        phase.name: stages[phase.name]["tokens"]
        * method.flops_per_token(phase, counted, job.layers, job.config.data.sequence_length)
        for phase in method.phases
        if phase.name in stages
    }
