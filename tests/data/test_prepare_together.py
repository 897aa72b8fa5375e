"""Several processes prepare one folder: the same bytes as one alone, whoever dies, and nobody in another's way."""

import fcntl
import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from bad_input_fixtures import assert_refused, run_elo, write_config
from fork_fixtures import ended, finish, forked
from run_fixtures import SOURCE, TARGET, write_documents, write_world

import elo.data.corpora
import elo.data.prepare
import elo.stages
from elo.cli import main
from elo.data.prepare import _locked
from elo.data.shard_writer import UnitWriter
from elo.run import run

FILES = 6


@pytest.fixture
def config(tmp_path):
    config = write_world(tmp_path)
    for folder, words in (("xx", TARGET), ("en", SOURCE)):
        (tmp_path / folder).mkdir()
        for number in range(FILES):
            write_documents(tmp_path / folder / f"{number}.jsonl", words, 40, number)
        config["data"]["corpora"][folder] = str(tmp_path / folder)
    return config


def start(config, output: Path, *arguments: str, dies: bool = False) -> int:
    """A child that prepares, in units of one file and segments of some hundred tokens; its process id."""
    path = output.with_suffix(".yaml")
    if not path.exists():
        path.write_text(yaml.safe_dump({**config, "output": str(output)}))

    def work() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        elo.data.corpora.UNIT_BYTES = 1000
        elo.stages.prepare = functools.partial(elo.data.prepare.prepare, shard_tokens=300)
        if dies:
            close, times = UnitWriter._close_segment, []

            def dying(self, *rest):
                times.append(1)
                if len(times) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                close(self, *rest)

            UnitWriter._close_segment = dying  # type: ignore[method-assign]
        main(["prepare", str(path), *arguments])

    return forked(work, output.parent / "log.txt")


def said(folder: Path) -> str:
    """What the children printed."""
    return (folder / "log.txt").read_text()


def content(folder: Path) -> dict[str, bytes]:
    """Every shard's bytes by its name; and that nothing else is left."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in found if ".tmp-" in name or name.endswith(".lock")]
    return found


def test_three_processes_make_what_one_makes(config, tmp_path):
    assert finish(start(config, tmp_path / "alone")) == 0, said(tmp_path)
    several = [start(config, tmp_path / "several", "--together") for _ in range(3)]
    assert [finish(each) for each in several] == [0, 0, 0], said(tmp_path)
    assert content(tmp_path / "several" / "prepared") == content(tmp_path / "alone" / "prepared")


def test_what_a_killed_process_left_is_gone_on_with(config, tmp_path):
    assert finish(start(config, tmp_path / "alone")) == 0, said(tmp_path)
    assert finish(start(config, tmp_path / "killed", "--together", dies=True)) == -signal.SIGKILL
    prepared = tmp_path / "killed" / "prepared"
    assert not (prepared / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in prepared.rglob("?????-?????.json")}
    assert finished
    assert finish(start(config, tmp_path / "killed", "--together")) == 0, said(tmp_path)
    assert content(prepared) == content(tmp_path / "alone" / "prepared")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "finished segments stay"


def test_a_unit_that_another_works_on_is_left_to_it_until_it_dies(config, tmp_path):
    """The other is a child that takes a unit's lock and does nothing."""
    finish(start(config, tmp_path / "run", "--together", dies=True))
    prepared = tmp_path / "run" / "prepared"
    unit = next(path for path in sorted(prepared.rglob("*.lock")) if not path.with_suffix(".json").exists())

    def hold() -> None:
        with unit.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            time.sleep(60)

    other = forked(hold, tmp_path / "other.txt")
    until((tmp_path / "held").exists)
    helper = start(config, tmp_path / "run", "--together")
    until(lambda: "waiting for other processes to finish 1 groups of files" in said(tmp_path))
    assert not ended(helper)
    assert not (prepared / "manifest.json").exists()
    os.kill(other, signal.SIGKILL)
    finish(other)
    until(lambda: ended(helper))
    assert finish(helper) == 0, said(tmp_path)
    assert (prepared / "manifest.json").exists()


def until(condition) -> None:
    """Wait for something that comes within seconds, or fail."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_a_run_takes_what_was_prepared_together(config, tmp_path, capsys):
    path = write_config(tmp_path, {**config, "output": str(tmp_path / "run")})
    assert run_elo(["prepare", path, "--together"], capsys)[0] == 0
    shards = {each: each.stat().st_mtime_ns for each in (tmp_path / "run" / "prepared").rglob("*.bin")}
    run(path, until="prepare")
    assert shards == {each: each.stat().st_mtime_ns for each in (tmp_path / "run" / "prepared").rglob("*.bin")}
    assert json.loads((tmp_path / "run" / "stages" / "prepared.json").read_text())["fingerprint"]
    assert run_elo(["prepare", path, "--together"], capsys)[0] == 0, "once more"
    content(tmp_path / "run" / "prepared")


def test_another_configuration_is_refused(config, tmp_path, capsys):
    path = write_config(tmp_path, {**config, "output": str(tmp_path / "run")})
    assert run_elo(["prepare", path, "--together"], capsys)[0] == 0
    other = yaml.safe_load(path.read_text())
    other["data"]["heldout_share"] = 0.2
    other_path = tmp_path / "other.yaml"
    other_path.write_text(yaml.safe_dump(other))
    words = ("prepared was begun with other inputs", "heldout_share")
    assert_refused(["prepare", other_path, "--together"], words, (tmp_path / "run" / "prepared",), capsys)


def test_alone_and_together_exclude_each_other(config, tmp_path, capsys):
    path = write_config(tmp_path, {**config, "output": str(tmp_path / "run")})
    (tmp_path / "run" / "stages").mkdir(parents=True)
    output = tmp_path / "run" / "prepared"
    with _locked(output, shared=False):
        status, message = run_elo(["prepare", path, "--together"], capsys)
    assert (status, "another elo prepare is writing to it" in message) == (2, True)
    with _locked(output, shared=True):
        status, message = run_elo(["prepare", path], capsys)
    assert (status, "another elo prepare is writing to it" in message) == (2, True)
