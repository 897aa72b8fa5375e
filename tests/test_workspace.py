"""Stages are done once, redone when what they depend on changes, and never taken for done when they are not."""

import subprocess
import sys

import pytest

from elo.errors import EloError
from elo.store.run_folder import Workspace


@pytest.fixture
def workspace(tmp_path):
    said = []
    workspace = Workspace(tmp_path / "run", said.append)
    workspace.said = said
    with workspace.locked():
        yield workspace


def _stage(workspace, inputs, log, fail=False):
    output, scratch = workspace.path("out"), workspace.path("scratch")

    def work():
        log.append("worked")
        scratch.mkdir(exist_ok=True)
        if fail:
            raise RuntimeError
        output.mkdir(exist_ok=True)
        (output / "file").write_text(str(inputs))
        return {"answer": 42}

    return workspace.stage("s", inputs, work, outputs=(output,), scratch=(scratch,))


def test_done_once(workspace):
    log = []
    first = _stage(workspace, {"a": 1}, log)
    second = _stage(workspace, {"a": 1}, log)
    assert log == ["worked"]
    assert first == second
    assert first.record["answer"] == 42
    assert not workspace.path("scratch").exists()


def test_changed_input_is_named_and_redone(workspace):
    log = []
    _stage(workspace, {"settings": {"learning_rate": 1e-4}, "b": 2}, log)
    stage = _stage(workspace, {"settings": {"learning_rate": 2e-4}, "b": 2}, log)
    assert log == ["worked"] * 2
    assert any("settings.learning_rate 0.0001 -> 0.0002" in line for line in workspace.said)
    assert workspace.path("out", "file").read_text() == str({"settings": {"learning_rate": 2e-4}, "b": 2})
    assert stage.record["answer"] == 42


def test_damaged_output_is_redone(workspace):
    log = []
    _stage(workspace, {"a": 1}, log)
    workspace.path("out", "file").write_text("truncated"[:2])
    _stage(workspace, {"a": 1}, log)
    assert log == ["worked"] * 2


def test_scratch_survives_a_failure_but_not_a_change(workspace):
    with pytest.raises(RuntimeError):
        _stage(workspace, {"a": 1}, [], fail=True)
    workspace.path("scratch", "checkpoint").write_text("")
    with pytest.raises(RuntimeError):
        _stage(workspace, {"a": 1}, [], fail=True)
    assert workspace.path("scratch", "checkpoint").exists()
    with pytest.raises(RuntimeError):
        _stage(workspace, {"a": 2}, [], fail=True)
    assert not workspace.path("scratch", "checkpoint").exists()


def test_second_run_in_the_folder_is_told_so(workspace):
    with pytest.raises(EloError, match="another run"), Workspace(workspace.root, print).locked():
        pass


def test_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from elo.store.run_folder import Workspace\n"
        "with Workspace(Path(sys.argv[1]), print).locked(): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with Workspace(tmp_path, print).locked():
        pass


def test_killed_between_the_record_and_the_end_of_its_stage(workspace):
    log = []
    _stage(workspace, {"a": 1}, log)
    begun = workspace.path("stages", "s.begun.json")
    begun.write_text("{}")
    workspace.path("scratch").mkdir()
    _stage(workspace, {"a": 1}, log)
    assert log == ["worked"]
    assert not begun.exists()
    assert not workspace.path("scratch").exists()


def test_a_refused_start_leaves_no_folder_and_takes_no_other(tmp_path):
    for existed in (False, True):
        root = tmp_path / "runs" / "one"
        if existed:
            root.mkdir(parents=True)
            (root / "notes.txt").write_text("mine")
        with pytest.raises(EloError, match="wrong"), Workspace(root, print).locked():
            raise EloError("wrong")
        assert (tmp_path / "runs").exists() == existed
    assert (root / "notes.txt").read_text() == "mine"
