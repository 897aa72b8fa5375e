"""Stages are done once, redone when what they depend on changes, and never taken for done when they are not."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from elo.errors import EloError, UnfinishedError
from elo.methods import METHODS
from elo.store.environment import command_line
from elo.store.processes import check_launch, is_main, world_size
from elo.store.run_folder import Artifact, RunFolder, identity
from elo.train.settings import TrainingSettings


@pytest.fixture
def folder(tmp_path):
    said = []
    folder = RunFolder(tmp_path / "run", said.append)
    folder.said = said
    with folder.locked():
        yield folder


class Stage:
    """A stage that counts how often it is done."""

    def __init__(self):
        self.calls = 0

    def __call__(self, output, *, fail=False, **arguments):
        self.calls += 1
        scratch = output.with_name(f"{output.name}-checkpoints")
        scratch.mkdir(exist_ok=True)
        if fail:
            raise RuntimeError("died")
        output.mkdir()
        (output / "file").write_text(str(arguments))
        return {"answer": 42}


def test_done_once(folder):
    stage = Stage()
    first = folder.once("s", stage, a=1, execution={"workers": 2})
    second = folder.once("s", stage, a=1, execution={"workers": 2})
    assert stage.calls == 1
    assert (first.path, first.fingerprint, first.record) == (second.path, second.fingerprint, second.record)
    assert first.path == folder.path("s") and (first.path / "file").read_text() == "{'a': 1, 'workers': 2}"
    assert first.record["answer"] == 42 and first.record["seconds"] >= 0
    assert not folder.path("s-checkpoints").exists()


def test_a_changed_argument_is_named_and_the_stage_done_again(folder):
    stage = Stage()
    folder.once("s", stage, settings={"learning_rate": 1e-4}, b=2)
    found = folder.once("s", stage, settings={"learning_rate": 2e-4}, b=2)
    assert stage.calls == 2
    assert any("settings.learning_rate 0.0001 -> 0.0002" in line for line in folder.said)
    assert (found.path / "file").read_text() == str({"settings": {"learning_rate": 2e-4}, "b": 2})


def test_an_execution_argument_is_no_reason_to_do_it_again(folder):
    stage = Stage()
    folder.once("s", stage, a=1, execution={"workers": 2})
    folder.once("s", stage, a=1, execution={"workers": 3, "say": print})
    assert stage.calls == 1


def test_execution_settings_do_not_count_but_others_do(folder):
    stage, settings = Stage(), TrainingSettings()
    for update, calls in (
        ({}, 1),
        ({"save_steps": 7, "per_device_train_batch_size": 2}, 1),
        ({"learning_rate": 1e-5}, 2),
    ):
        folder.once("s", stage, settings=settings.model_copy(update=update))
        assert stage.calls == calls, update


def test_what_a_stage_is_made_from_counts_by_its_fingerprint(folder):
    first, second = Stage(), Stage()
    made = folder.once("first", first, a=1)
    folder.once("second", second, model=made)
    folder.once("second", second, model=Artifact(Path("/somewhere/else"), made.fingerprint))
    assert second.calls == 1
    folder.once("second", second, model=folder.once("first", first, a=2))
    assert (first.calls, second.calls) == (2, 2)


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, [lambda: None], b"bytes"], ids=type)
def test_an_argument_without_identity_is_an_error(folder, value):
    stage = Stage()
    with pytest.raises(TypeError, match="has no identity, so no stage can depend on it"):
        folder.once("s", stage, value=value)
    assert stage.calls == 0


def test_identities():
    class Model(BaseModel):
        a: int = 1

    full = METHODS["full"].model_validate({"name": "full"})
    assert identity({"a": [None, True, 1, 1.5, "x", Path("p")], 2: (1, range(2))}) == {
        "a": [None, True, 1, 1.5, "x", "p"],
        "2": [1, [0, 1]],
    }
    assert identity(Model()) == {"a": 1}
    assert identity(full) == {"name": "full", "module": "layer"}
    assert identity(full.phases[0])["middle"] == "trained"
    assert identity(Artifact(Path("p"), "f")) == "f"


def test_a_name_may_have_parts(folder):
    stage = Stage()
    found = folder.once("trials/full-1", stage, a=1, keep=False)
    assert json.loads(folder.path("stages", "trials-full-1.json").read_text())["stage"] == "trials/full-1"
    assert found.record["answer"] == 42
    assert list(folder.path("trials").iterdir()) == [], "scratch"
    folder.once("trials/full-1", stage, a=1, keep=False)
    assert stage.calls == 1


def test_a_trial_that_was_killed_finds_what_it_left(folder):
    def killed(output, *, a):
        (output / "half").mkdir(parents=True)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        folder.once("trials/one", killed, keep=False, a=1)
    again = RunFolder(folder.root, folder.say)
    again.sweep()
    seen = []

    def look(output, *, a):
        seen.append((output / "half").exists())
        return {}

    again.once("trials/one", look, keep=False, a=1)
    assert seen == [True]


def test_damaged_output_is_redone(folder):
    stage = Stage()
    folder.once("s", stage, a=1)
    folder.path("s", "file").write_text("{")
    folder.once("s", stage, a=1)
    assert stage.calls == 2
    assert any("missing or damaged" in line for line in folder.said)


def test_other_processes_wait_until_a_damaged_output_is_replaced(folder, monkeypatch):
    stage = Stage()
    file = folder.once("s", stage, a=1).path / "file"
    text = file.read_text()
    file.unlink()
    monkeypatch.setenv("RANK", "1")
    threading.Timer(0.3, file.write_text, [text]).start()
    folder.once("s", stage, a=1)
    assert file.read_text() == text
    assert stage.calls == 1


def test_an_altered_output_is_noticed_before_it_is_used(folder):
    def weights(output):
        output.mkdir()
        (output / "model.safetensors").write_text("abc")
        return {}

    used = Stage()
    folder.once("first", weights)
    folder.path("first", "model.safetensors").write_text("abd")
    again = RunFolder(folder.root, folder.say)
    with pytest.raises(UnfinishedError, match=r"model\.safetensors: its checksum is not the recorded one"):
        again.once("second", used, model=again.once("first", weights))
    assert used.calls == 0
    again.once("second", used, model=again.once("first", weights))
    assert folder.path("first", "model.safetensors").read_text() == "abc"


def test_scratch_survives_a_failure_but_not_a_change(folder):
    stage, checkpoint = Stage(), folder.path("s-checkpoints", "checkpoint")

    def fails(**arguments):
        with pytest.raises(RuntimeError):
            folder.once("s", stage, execution={"fail": True}, **arguments)

    fails(a=1)
    checkpoint.write_text("")
    fails(a=1)
    assert checkpoint.exists()
    fails(a=2)
    assert not checkpoint.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stage": "s"}'])
def test_a_damaged_record_counts_as_none(folder, damage):
    stage = Stage()
    folder.once("s", stage, a=1)
    folder.path("stages", "s.json").write_text(damage)
    assert folder.once("s", stage, a=1).record["answer"] == 42
    assert stage.calls == 2


def test_second_run_in_the_folder_is_told_so(folder):
    with pytest.raises(EloError, match="another run"), RunFolder(folder.root, print).locked():
        pass


def test_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from elo.store.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), print).locked(): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with RunFolder(tmp_path, print).locked():
        pass


def test_killed_between_the_record_and_the_end_of_its_stage(folder):
    stage = Stage()
    folder.once("s", stage, a=1)
    begun = folder.path("stages", "s.begun.json")
    begun.write_text("{}")
    folder.path("s-checkpoints").mkdir()
    folder.once("s", stage, a=1)
    assert stage.calls == 1
    assert not begun.exists()
    assert not folder.path("s-checkpoints").exists()


def test_a_refused_start_leaves_no_folder_and_takes_no_other(tmp_path):
    for existed in (False, True):
        root = tmp_path / "runs" / "one"
        if existed:
            root.mkdir(parents=True)
            (root / "notes.txt").write_text("mine")
        with pytest.raises(EloError, match="wrong"), RunFolder(root, print).locked():
            raise EloError("wrong")
        assert (tmp_path / "runs").exists() == existed
    assert (root / "notes.txt").read_text() == "mine"


def test_a_refused_start_keeps_the_run_that_started_beside_it(tmp_path):
    root = tmp_path / "runs" / "one"
    with pytest.raises(EloError, match="wrong"), RunFolder(root, print).locked():
        (tmp_path / "runs" / "two").mkdir()
        raise EloError("wrong")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]


def test_an_error_after_a_stage_is_done_keeps_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run", lambda _: None)
    with pytest.raises(EloError, match="wrong"), folder.locked():
        folder.once("trials/one", Stage(), keep=False)
        raise EloError("wrong")
    assert folder.path("stages", "trials-one.json").is_file()


def test_empty_variables_of_a_launcher_count_as_unset(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    check_launch()
    assert is_main() and world_size() == 1


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/usr/bin/elo", "elo run 'my config.yaml' data.seed=1"),
        ("/lib/elo/__main__.py", "elo run 'my config.yaml' data.seed=1"),
        ("/lib/elo/cli.py", "elo run 'my config.yaml' data.seed=1"),
        ("/lib/pytest/__main__.py", "elo.run(...)"),
    ],
)
def test_the_recorded_command_can_be_run_again(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program, "run", "my config.yaml", "data.seed=1"])
    assert command_line() == command
