"""One trial of a comparison: a contestant's run with given rates, tokens and seed, and what is kept of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.config import CompareConfig, RunConfig, contestant_run
from elo.errors import TrainingDivergedError
from elo.job import Job
from elo.store.run_folder import Stage, Workspace

if TYPE_CHECKING:
    from elo.methods.methods import Method

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
        """Train a contestant, measure it, and return what comparison.json holds of it (docs/results.md).

        Args:
            name: of the contestant.
            rates: learning rate by section.
            validated: measure on the validation documents too, under "validation_bpb".
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
        from elo.run import adapt, wall_seconds

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
        record: dict[str, Any] = {"seed": run.seed, "failed": None}
        try:
            adapted = adapt(job, run.method, {})
        except TrainingDivergedError as error:
            return {**record, "bpb": {}, "validation_bpb": None, "before_alignment": None, "scale": None, "tokens": 0,
                    "wall_seconds": 0.0, "flops": None, "peak_memory_bytes": None, "stages": [], "failed": str(error),
                    "seconds": 0.0}  # fmt: skip
        stages = adapted["stages"]
        before = adapted["before_alignment"]
        record |= {
            "bpb": adapted["evaluation"]["bpb"],
            "validation_bpb": self._validation(job, adapted) if validated else None,
            "before_alignment": None if before is None else {"bpb": before["bpb"]},
            "scale": stages["attach"]["scale"] if "attach" in stages else None,
            "tokens": sum(stage["tokens"] for stage in stages.values()),
            "wall_seconds": wall_seconds(adapted),
            "flops": training_flops(job, stages),
            "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
            "stages": [
                {key: stage.get(key) for key in ("seconds", "tokens", "tokens_per_second", "peak_memory_bytes")}
                | {"name": stage_name}
                for stage_name, stage in stages.items()
            ],
        }
        return record

    def _validation(self, job: Job, adapted: dict[str, Any]) -> dict[str, float]:
        last = Stage("", str(adapted["model"]), {})  # a trial's folder holds one model of that name
        measured = job.evaluate("validation", adapted["model"], last, brief=True, heldout=VALIDATION)
        bpb: dict[str, float] = measured.record["bpb"]
        return bpb


def training_flops(job: Job, stages: dict[str, dict[str, Any]]) -> float:
    """Matmul FLOPs of a method's training; what fitting a bridge and searching a scale add is not counted."""
    from elo.checkpoint.counting import footprint, read_config

    method: Method = job.method(job.config.method)
    counted = footprint(read_config(str(job.base), trust_remote_code=job.config.trust_remote_code))
    return sum(
        stages[phase.name]["tokens"]
        * method.flops_per_token(phase, counted, job.layers, job.config.data.sequence_length)
        for phase in method.phases
        if phase.name in stages
    )
