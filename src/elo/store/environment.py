"""Describe the environment of a run: hardware, package versions, command line."""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("elo-cpt", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Return the time, hardware and package versions that every results file records."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "hardware": hardware(), "versions": versions()}


def hardware() -> dict[str, Any]:
    """Return the hardware of this machine: CPU, cores, memory in bytes, GPUs."""
    memory = psutil.virtual_memory().total
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": memory}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """Return the command that started this process, quoted for a shell; `elo.run(...)` if it was not `elo`."""
    program = Path(sys.argv[0])
    is_module = program.parent.name == "elo" and program.name in ("__main__.py", "cli.py")
    return shlex.join(["elo", *sys.argv[1:]]) if is_module or program.name == "elo" else "elo.run(...)"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
