"""What every refusal must be: exit status 2, one message that names the thing, nothing made, nothing changed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from elo.cli import main

LONGEST_MESSAGE = 900

Mistake = Callable[[Path], Any]
"""Does the damage in a folder of its own and returns the command line that meets it."""


def run_elo(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of a command, in this process; an exception that escapes is a traceback to the user."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return status, capsys.readouterr().err


def snapshot(*roots: Path) -> dict[str, tuple[int, int] | None]:
    """Every file's size and time of change, every folder's existence."""
    found: dict[str, tuple[int, int] | None] = {}
    for root in roots:
        for path in root.rglob("*"):
            status = path.lstat()
            found[str(path)] = None if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def unchanged(*roots: Path) -> Iterator[None]:
    """Assert that nothing appears, goes or changes below `roots`."""
    before = snapshot(*roots)
    yield
    after = snapshot(*roots)
    assert not after.keys() - before.keys(), f"left behind: {sorted(after.keys() - before.keys())}"
    assert not before.keys() - after.keys(), f"removed: {sorted(before.keys() - after.keys())}"
    assert after == before, f"changed: {[path for path in before if before[path] != after[path]]}"


def assert_refused(
    arguments: list[Any], words: tuple[str, ...], roots: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the command and check its refusal; `words` must all stand in the message."""
    with unchanged(*roots):
        status, said = run_elo(arguments, capsys)
    messages = [line for line in said.splitlines() if line.startswith("elo: ")]
    usage = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert status == 2, f"exit status {status}: {said}"
    assert len(messages) + len(usage) == 1, f"one message is wanted: {said}"
    message = (messages or usage)[0]
    assert said.rstrip().endswith(message), f"the message must be the last thing said, in one line: {said}"
    assert "Traceback" not in said
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def change(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a configuration with keys set; `__` in a name goes a section deeper; `...` removes the key."""
    copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = copied
        for parent in parents:
            here = here.setdefault(parent, {})
        if value is ...:
            here.pop(last)
        else:
            here[last] = value
    return copied


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """`folder`/config.yaml with this content."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def copy_of(folder: Path, name: Path) -> Path:
    """A private copy of a checkpoint folder to damage."""
    shutil.copytree(folder, name)
    return name
