"""Files and folders appear whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elo.errors import EloError, UnfinishedError
from elo.store.files import TEMPORARY_PREFIX, atomic_directory, read_json, write_json


def test_directory_is_absent_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_existing_output_is_kept_unless_overwriting(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("precious")
    with pytest.raises(EloError, match="already exists"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "precious").read_text() == "precious"
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}out-1234abcd").mkdir()
    others = tmp_path / f"{TEMPORARY_PREFIX}out-large-1234abcd"
    others.mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    others.rmdir()  # another output's temporary is not ours to sweep
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_while_the_first_is_alive(tmp_path):
    target = tmp_path / "out"
    command = "import sys; from pathlib import Path; from elo.store.files import atomic_directory\n"
    command += "with atomic_directory(Path(sys.argv[1])) as folder: print(folder, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", command, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        folder = Path(first.stdout.readline().strip())
        (folder / "file").write_text("first")
        with pytest.raises(EloError, match="out: another process is writing it; wait for it"), atomic_directory(target):
            pass
        first.communicate("\n")
    assert first.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "first"


def test_what_appeared_while_writing_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(EloError, match="already exists"), atomic_directory(target) as folder:
        (folder / "file").write_text("ours")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "theirs"


def test_unwritable_place_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EloError, match="cannot be written"), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"언어": 1})
    assert read_json(path) == {"언어": 1}
    path.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UnfinishedError, match="not JSON"):
        read_json(path)
    with pytest.raises(UnfinishedError, match="no such file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"NaN|nan|JSON"):
        write_json(path, {"a": float("nan")})
    assert list(tmp_path.glob(f"{TEMPORARY_PREFIX}*")) == []


def test_overwriting_that_fails_leaves_the_old(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    rename, failures = Path.rename, []

    def failing(self, goal):
        if goal == target and not failures:
            failures.append(self)  # between the two renames
            raise OSError("no")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_directory(target, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert failures
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
