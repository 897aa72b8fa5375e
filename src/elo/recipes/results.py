"""results.json of a run: everything that the report shows, and nothing that it has to compute from models."""

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elo.processes import is_main
from elo.recipes.job import Job
from elo.records import write_json

_PACKAGES = ("elo-cpt", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def write_results(job: Job, base: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Assemble and write results.json (schema: docs/results.md)."""
    config, about = job.config, circumstances(job)
    about["model"]["trainable_parameters"] = _trainable(methods)
    results = {
        "title": config.title or f"{Path(config.model).name} learns {config.data.target}",
        **about,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "base": _evaluation(base),
        "methods": [_method(name, adapted) for name, adapted in methods.items()],
    }
    if is_main():
        write_json(job.path("results.json"), results)
    return results


def circumstances(job: Job) -> dict[str, Any]:
    """What results.json and comparison.json both tell: when, with which command, on what, from which model and text."""
    from elo.model.counting import build_on_meta, parameter_counts, read_config

    config = job.config
    assert job.prepared is not None
    model_config = read_config(str(job.base), trust_remote_code=config.trust_remote_code)
    counts = parameter_counts(build_on_meta(model_config, trust_remote_code=config.trust_remote_code), job.layers)
    return {
        "schema": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "model": {
            "name": config.model,
            "parameters": counts["total"],
            "num_layers": len(counts["layers"]),
            "layers": list(job.layers),
            **_vocabulary(model_config),
        },
        "languages": {"target": config.data.target, "source": config.data.source},
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
    from elo.model.new_rows import read_new_rows, record_of

    return {"vocabulary": record_of(model_config)} if read_new_rows(model_config) else {}


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


def _trainable(methods: dict[str, dict[str, Any]]) -> int:
    """Parameters that train in the first training stage of the run's own method."""
    stages = next(iter(methods.values()))["stages"].values()
    return next((int(stage["trainable_parameters"]) for stage in stages if "trainable_parameters" in stage), 0)


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "bpb": record["bpb"],
        "cloze": record.get("cloze", {}),
        "samples": record.get("samples", []),
        "generation": record.get("generation", {}),
    }


def _method(name: str, adapted: dict[str, Any]) -> dict[str, Any]:
    from elo.recipes.run import wall_seconds
    from elo.training.methods import METHODS

    stages = adapted["stages"]
    before = adapted["before_alignment"]
    losses, evaluations = _curves(stages)
    return {
        "name": name,
        "label": METHODS[name].label,
        "note": None,
        "tokens": sum(record["tokens"] for record in stages.values()),
        "wall_seconds": wall_seconds(adapted),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in stages.values()),
        "stages": [
            {
                "name": stage,
                "seconds": record["seconds"],
                "tokens": record["tokens"],
                "tokens_per_second": record["tokens_per_second"],
                "peak_memory_bytes": record["peak_memory_bytes"],
            }
            for stage, record in stages.items()
        ],
        **_evaluation(adapted["evaluation"]),
        "before_alignment": None if before is None else {"bpb": before["bpb"]},
        "losses": losses,
        "evaluations": evaluations,
    }


def _curves(stages: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Loss and bits-per-byte curves over the method's whole run: tokens and seconds add up over its stages."""
    losses: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for stage, record in stages.items():
        for points, curve in ((record.get("losses", []), losses), (record.get("evaluations", []), evaluations)):
            for point in points:
                moved = {"tokens": point["tokens"] + tokens, "seconds": point["seconds"] + seconds}
                curve.append({"stage": stage, **point, **moved})
        tokens += record["tokens"]
        seconds += record["seconds"]
    return losses, evaluations
