"""Imports point one way, without cycles; the command line starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "elo"
# From the bottom to the top: a module imports from lines above its own, or from its own package.
ORDER = [
    {"errors", "format"},
    {"store"},
    {"log"},
    {"checkpoint"},
    {"data", "surgery"},
    {"evaluate"},
    {"train"},
    {"methods"},
    {"config"},
    {"check_output"},
    {"detach_attach"},
    {"identities", "budget"},
    {"circumstances"},
    {"vocab", "plan", "report", "generate"},
    {"probe"},
    {"stages", "preflight", "final_model", "push", "fewshot", "merge"},
    {"chat"},
    {"inputs"},
    {"run_results"},
    {"run"},
    {"compare", "watch", "doctor"},
    {"quickstart"},
    {"api", "cli_values", "cli_options"},
    {"cli_checkpoints", "cli_measuring", "cli_observing"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
COMMAND_LINE = {"cli.py", "cli_checkpoints.py", "cli_measuring.py", "cli_observing.py", "__main__.py"}
"""Import what a verb needs when it is called, so that --help is quick."""
OPTIONAL = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "peft",
    "ray",
    "py3langid",
    "sacrebleu",
    "torch",
}
"""Heavy, or installed for some uses alone: may be imported where they are used."""
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def _name(path: Path) -> str:
    """The module's dotted name."""
    parts = ["elo", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}


def _modules(node: ast.AST) -> Iterator[str]:
    """Modules that an import statement names: of `from package import name` the module, where name is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in MODULES else node.module


def _at_the_top(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that are executed, or read by a type checker, when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _id(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_point_downwards(path):
    own = _name(path).split(".")[1]
    assert own in RANK, f"{own}: give it a place in ORDER"
    for node in ast.walk(_tree(path)):
        for module in _modules(node):
            if module.startswith("elo."):
                other = module.split(".")[1]
                assert other == own or RANK[other] < RANK[own], f"{_id(path)} ({own}) imports {module} ({other})"


def test_no_cycle():
    """TopologicalSorter raises CycleError and names the cycle."""
    graph = {}
    for name, path in MODULES.items():
        found = {module for node in _at_the_top(_tree(path)) for module in _modules(node)}
        graph[name] = {module for module in found if module in MODULES and module != name}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in COMMAND_LINE], ids=_id)
def test_imports_are_at_the_top(path):
    tree = _tree(path)
    inside = [
        f"line {node.lineno}: {module}"
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        for module in _modules(node)
        if module.split(".")[0] not in OPTIONAL
    ]
    assert not inside


def test_files_stay_short():
    long = {str(path): lines for path in FILES if (lines := path.read_text().count("\n")) > 500}
    assert not long


def test_command_line_starts_without_heavy_imports():
    code = "import sys; import elo.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "elo.cli" in loaded
    assert not {"torch", "transformers", "datasets", "matplotlib", "pyarrow", "numpy", "pydantic"} & set(loaded)


def test_the_functions_of_all_verbs_are_in_the_api():
    from elo import api

    assert sorted(api.__all__) == api.__all__
    for name in api.__all__:
        assert callable(getattr(api, name)) and getattr(api, name).__doc__, name


def test_help_lists_every_verb():
    done = subprocess.run([sys.executable, "-m", "elo.cli", "--help"], capture_output=True, text=True, check=True)
    for verb in (
        "run",
        "prepare",
        "detach",
        "attach",
        "config",
        "chat",
        "compare",
        "chat-vector",
        "merge",
        "evaluate",
        "generate",
        "report",
        "push",
        "plan",
        "probe",
        "quickstart",
        "vocab",
        "watch",
        "doctor",
    ):
        assert f"\n  {verb} " in done.stdout
