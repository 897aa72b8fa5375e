"""Assemble results.json of a run, and what every results file says about its circumstances."""

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elo.processes import is_main
from elo.recipes.job import Job
from elo.report.schema import FILE_NAME, SCHEMA_VERSION

_PACKAGES = ("elo-cpt", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def write_results(job: Job, base: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Assemble and write results.json (schema: docs/results.md).

    Args:
        job: the run.
        base: evaluation record of the base model.
        methods: what `adapt` returned, by method.
    """
    from elo.recipes.trial import training_flops
    from elo.report import collect
    from elo.report.files import judged, write_results
    from elo.report.schema import Budget, Contestant, Results
    from elo.training.methods import METHODS

    config = job.config
    tokens = sum(record["tokens"] for record in methods[config.method]["stages"].values())
    budget = Budget(name=f"{tokens:,} tokens", kind="tokens", value=tokens)
    results = judged(
        Results(
            **circumstances(job),
            kind="run",
            title=config.title or f"{Path(config.model).name} learns {config.data.target}",
            config=config.model_dump(mode="json"),
            base=collect.measured(base),
            contestants=tuple(
                Contestant(name=name, label=METHODS[name].label, method=name, layers=job.layers) for name in methods
            ),
            budgets=(budget,),
            seeds=(config.seed,),
            trials=tuple(
                collect.trial(
                    name,
                    budget.name,
                    config.seed,
                    adapted,
                    learning_rates={
                        phase.settings: getattr(config, phase.settings).learning_rate
                        for phase in job.method(name).phases
                        if phase.name in adapted["stages"]
                    },
                    flops=training_flops(job, name, adapted["stages"]),
                )
                for name, adapted in methods.items()
            ),
        )
    )
    if is_main():
        write_results(job.path(FILE_NAME), results)
    return results.model_dump(mode="json")


def circumstances(job: Job) -> dict[str, Any]:
    """Fields of `Results` that runs and comparisons share: time, command, base model, languages, machine and data."""
    from elo.model.counting import build_on_meta, parameter_counts, read_config

    config = job.config
    assert job.prepared is not None
    model_config = read_config(str(job.base), trust_remote_code=config.trust_remote_code)
    counts = parameter_counts(build_on_meta(model_config, trust_remote_code=config.trust_remote_code), job.layers)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "model": {
            "name": config.model,
            "parameters": counts["total"],
            "num_layers": len(counts["layers"]),
            **_vocabulary(model_config),
        },
        "languages": {"targets": [config.data.target], "sources": [config.data.source]},
        "hardware": hardware(),
        "versions": versions(),
        "data": {
            **job.prepared.summary(),
            "replay_ratio": config.data.replay_ratio,
            "sequence_length": config.data.sequence_length,
        },
    }


def _vocabulary(model_config: Any) -> dict[str, Any]:
    """What `elo vocab extend` did to the base, if anything."""
    from elo.model.new_rows import VOCABULARY_KEY, read_new_rows

    return {"vocabulary": getattr(model_config, VOCABULARY_KEY)} if read_new_rows(model_config) else {}


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": memory}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command that this process was started with, for the record."""
    return " ".join(["elo", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("elo", "cli.py") else "elo.run(...)"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
