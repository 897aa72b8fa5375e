"""The circumstances of a measurement: machine, versions, command, base model and data."""

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from elo.checkpoint.counting import build_on_meta, parameter_counts, read_config
from elo.checkpoint.new_rows import read_new_rows, record_of
from elo.config import RunConfig
from elo.data.shards import PreparedData

_PACKAGES = ("elo-cpt", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def circumstances(config: RunConfig, base: Path, layers: tuple[int, ...], data: PreparedData) -> dict[str, Any]:
    """Fields of `elo.report.schema.Results` that do not depend on what was trained."""
    model_config = read_config(str(base), trust_remote_code=config.trust_remote_code)
    counts = parameter_counts(build_on_meta(model_config, trust_remote_code=config.trust_remote_code), layers)
    extended = read_new_rows(model_config) is not None
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "model": {
            "name": config.model,
            "parameters": counts["total"],
            "num_layers": len(counts["layers"]),
            **({"vocabulary": record_of(model_config)} if extended else {}),
        },
        "languages": {"targets": [config.data.target], "sources": [config.data.source]},
        "hardware": hardware(),
        "versions": versions(),
        "data": {
            **data.summary(),
            "replay_ratio": config.data.replay_ratio,
            "sequence_length": config.data.sequence_length,
        },
    }


def hardware() -> dict[str, Any]:
    """What the run ran on."""
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
