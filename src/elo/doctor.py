"""`elo doctor`: this machine and installation, and what each feature lacks."""

import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.constants import HF_HOME
from packaging.requirements import Requirement
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elo.format import memory
from elo.store.environment import hardware
from elo.train.arguments import bf16_pays

PACKAGE = "elo-cpt"
# Feature: extra of this package.
_EXTRAS = {
    "optim: adamw_8bit": "adamw8bit",
    "benchmarks (--tasks), translation": "eval",
    "language identification (--chat, data.filters)": "chat",
    "object storage: s3://": "s3",
    "object storage: gs://": "gcs",
    "elo prepare --ray": "ray",
}
# Feature: package that is in no extra.
_OTHERS = {
    "report_to: tensorboard": "tensorboard",
    "report_to: wandb": "wandb",
    "report_to: mlflow": "mlflow",
    "report_to: trackio": "trackio",
    "training_arguments: deepspeed": "deepspeed",
}
_COMPILERS = ("c++", "g++", "clang++")


def examine() -> dict[str, Any]:
    """Return hardware, versions, memory, disk and, by feature, what is missing; JSON values only."""
    required, extras = _requirements()
    return {
        "elo": _version(PACKAGE),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "hardware": hardware()
        | {"available_memory_bytes": psutil.virtual_memory().available, "bf16": bf16_pays(_device())},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cuda": {"torch": torch.version.cuda, "usable": torch.cuda.is_available()},
        "disk": {name: _free(path) for name, path in (("working folder", Path()), ("model cache", Path(HF_HOME)))},
        "packages": [_package(each) for each in required],
        "features": _features(extras),
    }


def _features(extras: dict[str, list[Requirement]]) -> list[dict[str, Any]]:
    compilers = [] if any(map(shutil.which, _COMPILERS)) else ["a C++ compiler"]
    return [
        *(_feature(name, f"pip install '{PACKAGE}[{extra}]'", extras[extra]) for name, extra in _EXTRAS.items()),
        *(_feature(name, f"pip install {other}", [Requirement(other)]) for name, other in _OTHERS.items()),
        {"feature": "torch_compile on a CPU", "missing": compilers, "remedy": "install g++ or clang"},
    ]


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return what this package requires always, and by extra. Nothing if it is not installed."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    always, extras = [], {extra: list[Requirement]() for extra in _EXTRAS.values()}
    for each in map(Requirement, lines):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            always.append(each)
        for extra, found in extras.items():
            if each.marker is not None and each.marker.evaluate({"extra": extra}) and each not in always:
                found.append(each)
    return always, extras


def _package(requirement: Requirement) -> dict[str, Any]:
    version = _version(requirement.name)
    wrong = version is None or not requirement.specifier.contains(version, prereleases=True)
    return {"name": requirement.name, "version": version, "requires": str(requirement.specifier), "is_wrong": wrong}


def _feature(name: str, remedy: str, needs: list[Requirement]) -> dict[str, Any]:
    packages = [_package(each) for each in needs]
    missing = [f"{each['name']}{each['requires']}" for each in packages if each["is_wrong"]]
    return {"feature": name, "missing": missing, "remedy": remedy}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory_bytes": total, "free_memory_bytes": free}


def _free(path: Path) -> dict[str, Any]:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return {"path": str(path.absolute()), "free_bytes": shutil.disk_usage(there).free}


def render(found: dict[str, Any]) -> RenderableType:
    """Return what `examine` found as tables."""
    machine, cuda = found["hardware"], found["cuda"]
    facts = [
        ("ELO", f"{found['elo'] or 'not installed as a package'}, Python {found['python']['version']}"),
        ("Interpreter", found["python"]["executable"]),
        ("System", found["system"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"),
        ("Memory", f"{memory(machine['memory_bytes'])}, {memory(machine['available_memory_bytes'])} free"),
        ("bf16 in hardware", "yes" if machine["bf16"] else "no: training is in fp32"),
    ]
    facts += [
        (f"GPU {number}", f"{gpu['name']}, {memory(gpu['memory_bytes'])}, {memory(gpu['free_memory_bytes'])} free")
        for number, gpu in enumerate(found["gpus"])
    ]
    if not found["gpus"]:
        built = f"torch is built for CUDA {cuda['torch']}" if cuda["torch"] else "torch is built without CUDA"
        facts.append(("GPU", f"none ({built})"))
    facts += [
        (f"Disk, {name}", f"{memory(at['free_bytes'])} free at {at['path']}") for name, at in found["disk"].items()
    ]
    packages = Table("package", "version", "required", box=box.SIMPLE_HEAD)
    for each in found["packages"]:
        style = "bold red" if each["is_wrong"] else ""
        packages.add_row(*map(Text, (each["name"], each["version"] or "missing", each["requires"])), style=style)
    features = Table("feature", "missing", "remedy", box=box.SIMPLE_HEAD)
    for each in found["features"]:
        missing = ", ".join(each["missing"])
        features.add_row(*map(Text, (each["feature"], missing or "-", each["remedy"] if missing else "")))
    table = Table(box=None, show_header=False)
    for fact in facts:
        table.add_row(*map(Text, fact))
    return Group(table, packages, features)
