"""Two processes train what one trains, and go on from where one was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bad_input_fixtures import assert_refused, write_config
from fork_fixtures import finish, forked, launched
from run_fixtures import write_world
from safetensors.torch import load_file

from elo.errors import EloError
from elo.run import run
from elo.store.processes import from_main, is_main

WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def _launch(config: Path, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "elo.cli", "run", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def _losses(root: Path, stage: str) -> list[float]:
    record = json.loads((root / "stages" / f"{stage}.json").read_text())["record"]
    return [point["loss"] for point in record["losses"]]


def test_a_killed_run_of_one_process_goes_on_with_two_and_ends_as_that_of_one(tmp_path):
    config = write_world(tmp_path)
    config["training"]["per_device_train_batch_size"] = 1
    alone = run(config)
    shared = {**config, "output": str(tmp_path / "shared")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(shared))

    def killed() -> None:
        from elo.train import loop

        write = loop.write_checkpoint

        def dying(accelerator, folder, step, *arguments):
            write(accelerator, folder, step, *arguments)
            if step == 4:  # pretraining's second checkpoint, a quarter of the way
                os._exit(9)

        loop.write_checkpoint = dying
        run(shared)

    assert finish(forked(killed, tmp_path / "killed.txt")) == 9
    assert list((tmp_path / "shared" / "elo_pretraining-checkpoints").glob("checkpoint-4"))
    done = _launch(tmp_path / "config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("elo_pretraining", "layer_alignment"):
        assert _losses(tmp_path / "shared", stage) == pytest.approx(_losses(tmp_path / "run", stage), abs=1e-5)
    results = json.loads((tmp_path / "shared" / "results.json").read_text())
    ours, theirs = (each["trials"][0]["measured"]["bpb"] for each in (results, alone))
    assert ours == pytest.approx(theirs, abs=1e-3)
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "shared"))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 2e-2, name  # bf16 on disk: a few of its steps
    assert done.stdout.count("elo elo_pretraining: 1,024 tokens (pretraining portion") == 1, "only one process speaks"
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.name.startswith(".tmp-")]


def test_what_fails_in_the_main_process_is_told_to_the_others(tmp_path):
    def work() -> None:
        def read() -> None:
            raise EloError("shard 3 is damaged")

        assert from_main(lambda: is_main()) is True
        try:
            from_main(read)
        except EloError as error:
            print("told" if not is_main() else "raised", error)

    statuses = launched(work, tmp_path / "log.txt")
    said = (tmp_path / "log.txt").read_text()
    assert statuses == [0, 0], said
    told = sorted(line for line in said.splitlines() if "shard 3" in line)
    assert told == ["raised shard 3 is damaged", "told the main process stopped: shard 3 is damaged"]


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_one_goes_on(tmp_path):
    config = write_world(tmp_path)
    config["training"]["per_device_train_batch_size"] = 1
    run(config, until="elo_pretraining")
    shared = {**config, "output": str(tmp_path / "shared")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(shared))
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys; from elo.train.loop import Record; from elo.cli import main\n"
        "add = Record.add_loss\n"
        "def dying(self, step, *arguments):\n"
        "    if step == 6 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return add(self, step, *arguments)\n"
        "Record.add_loss = dying\n"
        "main(['run', sys.argv[1], '--until', 'elo_pretraining'])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(tmp_path / "dying.py"), str(tmp_path / "config.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert killed.returncode != 0
    scratch = tmp_path / "shared" / "elo_pretraining-checkpoints"
    assert (scratch / "checkpoint-4" / "elo_checkpoint.json").is_file(), killed.stderr
    run(shared, until="elo_pretraining")  # one process where there were two
    assert _losses(tmp_path / "shared", "elo_pretraining") == pytest.approx(
        _losses(tmp_path / "run", "elo_pretraining"), abs=1e-5
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "1"}, "RANK set without LOCAL_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR; launch with torchrun"),
        ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}, "set without MASTER_PORT, MASTER_ADDR"),
        (WHOLE | {"RANK": "first"}, "RANK is 'first', not a number"),
        (WHOLE | {"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        (WHOLE | {"RANK": "3", "WORLD_SIZE": "1"}, "RANK 3 is not below WORLD_SIZE 1"),
    ],
)
def test_half_a_launch_is_refused_at_the_start(tmp_path, capsys, monkeypatch, given, words):
    path = write_config(tmp_path, write_world(tmp_path))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert_refused(["run", path], ("launch: ", words), (tmp_path,), capsys)
