"""A run under kill -9, full disks, flipped bits, jumping clocks and rivals: the end is the undisturbed one."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from bad_input_fixtures import change, run_elo, write_config
from fork_fixtures import ended, finish, forked
from kill_fixtures import Tally, finished_stages, kill_until_done, small_world, weights

import elo.report.drawing as drawing
from elo.run import run
from elo.train import loop

CHECKPOINTS = "elo_pretraining-checkpoints"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """The configuration of a small run, and the checksums of the weights it ends with."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_PNG_DPI", 10)  # drawing is most of so small a run; the children inherit this
        config = small_world(root / "world")
        run({**config, "output": str(root / "run")})
        reference = weights(root / "run")
        assert len(reference) == 5
        yield config, reference


def run_to(folder: Path, config: dict[str, Any], step: int) -> dict[str, Any]:
    """Run in a child that dies right after it has sealed the checkpoint of `step` in ELO pretraining."""
    config = {**config, "output": str(folder / "run")}

    def work() -> None:
        write = loop.write_checkpoint

        def dying(accelerator: Any, scratch: Path, at: int, *arguments: Any) -> None:
            write(accelerator, scratch, at, *arguments)
            if at == step:
                os._exit(9)

        loop.write_checkpoint = dying
        run(config, until="layer_alignment")

    assert finish(forked(work, folder / "log.txt")) == 9
    return config


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size and its times stay."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_killed_at_random_instants(undisturbed, tmp_path):
    config, reference = undisturbed
    tally = Tally()
    seed = int(os.environ.get("ELO_TEST_SEED", "3"))
    kill_until_done(config, tmp_path / "victim", reference, random.Random(seed), 5, tally)
    assert tally.problems == []
    assert tally.runs == 1
    assert tally.kills == 5
    assert len(tally.places) > 1


@pytest.mark.parametrize("limit", [pytest.param(20_000, marks=pytest.mark.slow), 40_000])
def test_no_room_for_a_file(limit, undisturbed, tmp_path):
    config, reference = undisturbed
    config = {**config, "output": str(tmp_path / "run")}

    def work() -> None:
        from elo.cli import main

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        main(["run", str(write_config(tmp_path, config)), "--until", "layer_alignment"])

    log = tmp_path / "log.txt"
    assert finish(forked(work, log)) == 2, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"elo: {tmp_path}"), said
    assert "free disk space and run the same command again" in said.splitlines()[-1]
    run(config, until="layer_alignment")
    assert weights(tmp_path / "run") == reference


def test_the_newest_good_checkpoint_is_taken(undisturbed, tmp_path, capsys):
    config, reference = undisturbed
    config = run_to(tmp_path, config, 4)
    scratch = tmp_path / "run" / CHECKPOINTS
    assert sorted(path.name for path in scratch.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    flip(scratch / "checkpoint-4" / "optimizer.bin")
    now = time.time()
    os.utime(scratch / "checkpoint-3", (now + 10**6, now + 10**6))  # clocks jump: names count
    run(config, until="layer_alignment")
    said = capsys.readouterr().out
    assert "optimizer.bin: missing or damaged; checkpoint-4 is removed, and an earlier checkpoint is used" in said
    assert weights(tmp_path / "run") == reference


def test_other_micro_batch_after_a_kill(undisturbed, tmp_path):
    config, _ = undisturbed
    whole = run_losses(Path(config["model"]).parent.parent / "run")
    config = run_to(tmp_path, config, 3)
    run(change(config, training__per_device_train_batch_size=1), until="elo_pretraining")
    assert run_losses(tmp_path / "run") == pytest.approx(whole, abs=1e-5)


def run_losses(root: Path) -> list[float]:
    record = json.loads((root / "stages" / "elo_pretraining.json").read_text())["record"]
    assert [point["tokens"] for point in record["losses"]] == [64 * step for step in range(1, 9)], "no step twice"
    return [point["loss"] for point in record["losses"]]


def test_a_flipped_bit_in_what_a_stage_left(undisturbed, tmp_path, capsys):
    config, reference = undisturbed
    config = {**config, "output": str(tmp_path / "run")}
    run(config, until="elo_pretraining")
    damaged = tmp_path / "run" / "elo_pretraining" / "model.safetensors"
    flip(damaged)
    path = write_config(tmp_path, config)
    status, said = run_elo(["run", path, "--until", "layer_alignment"], capsys)
    assert status == 2
    assert f"{damaged}: its checksum is not the recorded one" in said
    assert "run the same command again to recreate it" in said
    assert run_elo(["run", path, "--until", "layer_alignment"], capsys)[0] == 0
    assert weights(tmp_path / "run") == reference

    # Records that are cut or of another shape: the stage is done again, and nothing else.
    before = finished_stages(tmp_path / "run")
    (tmp_path / "run" / "stages" / "attach.json").write_text('{"stage": "at')
    (tmp_path / "run" / "stages" / "detach.json").write_text("[]")
    assert run_elo(["run", path, "--until", "layer_alignment"], capsys)[0] == 0
    after = finished_stages(tmp_path / "run")
    assert {name for name in after if after[name] != before[name]} == {"attach", "detach"}
    assert weights(tmp_path / "run") == reference


@pytest.mark.slow
def test_a_flipped_bit_in_a_token_shard(undisturbed, tmp_path, capsys):
    config, reference = undisturbed
    config = {**config, "output": str(tmp_path / "run")}
    run(config, until="prepare")
    shard = min((tmp_path / "run" / "prepared" / "xx" / "train").rglob("*.tokens"))
    flip(shard)
    path = write_config(tmp_path, config)
    status, said = run_elo(["run", path, "--until", "layer_alignment"], capsys)
    assert status == 2
    assert f"{shard}: token shard is damaged: its checksum differs" in said
    shard.unlink()  # what the message asks for
    assert run_elo(["run", path, "--until", "layer_alignment"], capsys)[0] == 0
    assert weights(tmp_path / "run") == reference


def test_two_runs_in_one_folder(undisturbed, tmp_path, capsys):
    config, _ = undisturbed
    config = {**config, "output": str(tmp_path / "run")}
    first = forked(lambda: run(config, until="detach"), tmp_path / "first.txt")
    lock = tmp_path / "run" / "run.lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    status, said = run_elo(["run", write_config(tmp_path, config)], capsys)
    assert status == 2
    assert f"another run (process {first}) is using this folder" in said
    assert finish(first) == 0
    assert (tmp_path / "run" / "detach" / "config.json").is_file()


def test_a_link_in_the_place_of_the_lock_is_not_followed(undisturbed, tmp_path, capsys):
    config, _ = undisturbed
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "precious")
    path = write_config(tmp_path, {**config, "output": str(tmp_path / "run")})
    status, said = run_elo(["run", path], capsys)
    assert status == 2
    assert "cannot be written" in said
    assert (tmp_path / "precious").read_text() == "precious"


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(undisturbed, tmp_path):
    config, _ = undisturbed
    config = {**config, "output": str(tmp_path / "run"), "tokens": 64 * 1000}

    def work() -> None:
        from elo.cli import main

        main(["run", str(write_config(tmp_path, config)), "--until", "layer_alignment"])

    process = forked(work, tmp_path / "log.txt")
    scratch = tmp_path / "run" / CHECKPOINTS
    while not list(scratch.glob("checkpoint-*/elo_checkpoint.json")) and not ended(process):
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    assert finish(process) == 130
    said = (tmp_path / "log.txt").read_text()
    assert "elo: stopped by SIGINT at step" in said
    assert "the same command resumes from there" in said
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in scratch.iterdir())
    assert f"at step {newest};" in said
