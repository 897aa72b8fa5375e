"""`elo prepare --ray` on a local cluster of two nodes: the shards of one machine, and one message for what is wrong."""

import functools
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from bad_input_fixtures import assert_refused, run_elo, write_config
from ray_fixtures import NODE, ray_cluster
from run_fixtures import SOURCE, TARGET, write_base, write_documents, write_world

import elo
import elo.stages
from elo.data.prepare import prepare
from elo.errors import EloError
from elo.run import run


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def second(cluster):
    """The node that is not the driver's."""
    return cluster.add_node(**NODE, num_cpus=1)


def write_corpora(folder: Path, files: int, documents: int) -> dict[str, list[str]]:
    """Corpora of one file each, which are units of their own however small."""
    folder.mkdir(exist_ok=True)
    return {
        language: [str(write_documents(folder / f"{language}{n}.jsonl", words, documents, n)) for n in range(files)]
        for language, words in (("xx", TARGET), ("en", SOURCE))
    }


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its name; and that no temporary file is left."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in found if ".tmp-" in name]
    return found


def times(files: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files}


def tokenizing_process(node) -> psutil.Process:
    """Wait until a process of the node tokenises a file."""
    (raylet,) = node.all_processes["raylet"]
    while True:
        for process in psutil.process_iter(["ppid", "name"]):
            if process.info["ppid"] == raylet.process.pid and process.info["name"].startswith("ray::_run_unit"):
                return process
        time.sleep(0.01)


def test_a_bad_file_is_named_when_the_others_are_done(cluster, second, tmp_path, capsys):
    base, corpora = write_base(tmp_path / "base"), write_corpora(tmp_path, 3, 40)
    bad = Path(corpora["xx"][1])
    whole = bad.read_text()
    bad.write_text(whole + '{"text": 7}\n')
    output = tmp_path / "prepared"
    with pytest.raises(EloError, match=rf"^{bad}:41: .*") as raised:
        prepare(base, corpora, output, heldout_share=0, ray=cluster.address)
    assert f"failed: {raised.value}; continuing" in capsys.readouterr().err
    finished = times([*output.rglob("00000.json"), *output.rglob("*.tokens")])
    assert len(finished) == 2 * 5
    content(output)
    bad.write_text(whole)
    prepare(base, corpora, output, heldout_share=0)
    assert finished == times(list(finished))
    prepare(base, corpora, tmp_path / "alone", heldout_share=0)
    assert content(output) == content(tmp_path / "alone")


def test_a_lost_node_costs_its_unfinished_files(cluster, second, tmp_path, capsys, monkeypatch):
    """And a run takes what the cluster prepared."""
    monkeypatch.setattr(elo.stages, "prepare", functools.partial(prepare, shard_tokens=10_000))
    config = write_world(tmp_path)
    config["data"]["corpora"] = write_corpora(tmp_path, 3, 2500)
    path, output = write_config(tmp_path, config), tmp_path / "run" / "prepared"
    kept: dict[Path, int] = {}
    begun: list[Path] = []  # finished segments of the file that the lost node was at

    def kill() -> None:
        """Kill the second node in the middle of a file, after the first node has finished the others."""
        nonlocal begun
        process = tokenizing_process(second)
        while not any(Path(file.path).is_relative_to(output) for file in process.open_files()):
            time.sleep(0.001)
        process.suspend()
        while not begun and len(finished := {path.parent for path in output.rglob("00000.json")}) < 6:
            segments = list(output.rglob("?????-?????.json"))
            if len(finished) == 5 and not (begun := [path for path in segments if path.parent not in finished]):
                process.resume()
            time.sleep(0.005)
            process.suspend()
        kept.update(times([*segments, *(path.with_suffix(".tokens") for path in segments)]))
        cluster.remove_node(second, allow_graceful=False)
        process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    status, message = run_elo(["prepare", path, "--ray", cluster.address], capsys)
    assert status == 0, message
    assert begun, "the node was killed in the middle of a file"
    assert kept == times(list(kept)), "finished segments stay"
    shards = times(list(output.rglob("*.tokens")))
    run(path, until="prepare")
    assert shards == times(list(shards))
    run(path, overrides=[f"output={tmp_path / 'alone'}"], until="prepare")
    assert content(output) == content(tmp_path / "alone" / "prepared")


def test_files_that_a_node_does_not_see(cluster, tmp_path):
    base, corpora = write_base(tmp_path / "base"), write_corpora(tmp_path / "text", 1, 40)
    folder = os.open(tmp_path / "text", os.O_RDONLY)
    unseen = f"/proc/self/fd/{folder}/xx0.jsonl"  # of this process alone
    words = rf"^--ray: node {socket.gethostname()}: {unseen}: is not the file that the driver sees there \(.*\); put"
    with pytest.raises(EloError, match=words):
        prepare(base, {**corpora, "xx": unseen}, tmp_path / "prepared", ray=cluster.address)
    os.close(folder)
    assert not (tmp_path / "prepared").exists()


def test_another_version_on_a_node(cluster, tmp_path, monkeypatch):
    base, corpora = write_base(tmp_path / "base"), write_corpora(tmp_path, 1, 40)
    here = elo.__version__
    monkeypatch.setattr(elo, "__version__", "9.9.9")
    words = rf"has ELO {here} with .*, not ELO 9\.9\.9 with .*; install the same versions on all nodes"
    with pytest.raises(EloError, match=words):
        prepare(base, corpora, tmp_path / "prepared", ray=cluster.address)
    assert not (tmp_path / "prepared").exists()


def test_no_ray_and_no_cluster(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, write_world(tmp_path))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        words = ("--ray: Ray is not installed; run: pip install 'elo-cpt[ray]'",)
        assert_refused(["prepare", path, "--ray", "auto"], words, (tmp_path / "run",), capsys)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = (f"--ray {address}: cannot connect to a Ray cluster (", "Connection refused", "ray start --head")
    assert_refused(["prepare", path, "--ray", address], words, (tmp_path / "run",), capsys)
    assert_refused(["prepare", path, "--ray", "nonsense"], ("Invalid address format",), (tmp_path / "run",), capsys)
