"""Imports point downwards, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "elo"
# Who may import whom: a package may import those to its right, and itself.
ALLOWED = {
    "cli": {"recipes", "config", "workspace", "training", "evaluation", "data", "model", "quickstart", "base"},
    "recipes": {
        "config", "workspace", "training", "evaluation", "data", "model", "report", "quickstart", "base"
    },
    "config": {"training", "base"},
    "workspace": {"base"},
    "report": {"base"},
    "quickstart": {"base"},
    "training": {"evaluation", "data", "model", "base"},
    "evaluation": {"data", "model", "base"},
    "data": {"base"},
    "model": {"base"},
    "base": {"base"},
}  # fmt: skip
BASE = {"cli_values", "errors", "format", "layers", "processes", "progress", "records"}


def _package(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "base"
    return "base" if name in BASE else name


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name == "elo" or name.startswith("elo.")}


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    relative = path.relative_to(SOURCE)
    own = _package("elo." + (relative.parts[0] if len(relative.parts) > 1 else relative.stem))
    for module in _imports(path):
        other = _package(module)
        assert other == own or other in ALLOWED[own], f"{relative} ({own}) imports {module} ({other})"


def test_files_stay_short():
    long = {str(path): lines for path in FILES if (lines := path.read_text().count("\n")) > 500}
    assert not long


def test_command_line_starts_without_heavy_imports():
    code = "import sys; import elo.cli, elo.run, elo.data.prepare; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "elo.cli" in loaded
    assert not {"torch", "transformers", "datasets", "matplotlib", "pyarrow", "numpy"} & set(loaded)


def test_help_lists_every_verb():
    done = subprocess.run([sys.executable, "-m", "elo.cli", "--help"], capture_output=True, text=True, check=True)
    for verb in (
        "run",
        "prepare",
        "detach",
        "pretrain",
        "attach",
        "align",
        "evaluate",
        "report",
        "plan",
        "quickstart",
        "vocab",
    ):
        assert f"\n  {verb} " in done.stdout
