"""`elo watch` shows a run that is going on from its files alone."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_fixtures import write_world

from elo.cli import main
from elo.errors import EloError
from elo.log import short, thinned
from elo.run import run
from elo.store import live
from elo.watch import Stage, is_finished, read_stages, render


def shown(folder: Path) -> str:
    console = Console(width=200, record=True)
    console.print(render(folder))
    return console.export_text()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Stage]], str]:
    """A finished run's folder, what was read from it while it trained, and the report of that time."""
    root = tmp_path_factory.mktemp("watched")
    config: dict[str, Any] = write_world(root)
    config |= {"method": "full", "tokens": 3200}
    config["training"] |= {"save_steps": 50, "evaluations": 2}
    folder = root / "run"
    states: list[list[Stage]] = []
    report = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "SECONDS_BETWEEN_WRITES", 0.0)
        thread = threading.Thread(target=run, args=(config,))
        thread.start()
        while thread.is_alive():
            if (folder / "stages").is_dir() and (stages := read_stages(folder)):
                states.append(stages)
            if not (folder / "results.json").exists() and (folder / "report.html").exists():
                report = (folder / "report.html").read_text(encoding="utf-8")
            time.sleep(0.1)
        thread.join()
    return folder, states, report


def test_a_running_phase_shows_progress_and_curves(watched: tuple[Path, list[list[Stage]], str]) -> None:
    _, states, _ = watched
    running = [
        stage
        for stages in states
        for stage in stages
        if (stage.name, stage.state) == ("full", "running") and stage.live
    ]
    assert running
    done = [stage.live["done"] for stage in running]
    assert done == sorted(done) and 0 <= done[0] < 3200 and done[-1] <= 3200
    assert any("%" in stage.progress and "tokens" in stage.progress for stage in running)
    assert any(stage.rate.endswith("/s") and stage.time.endswith("left") for stage in running)
    assert any(len(stage.loss.split()) == 3 for stage in running)
    assert any("xx " in stage.bits_per_byte and "en " in stage.bits_per_byte for stage in running)


def test_stages_to_come_are_planned(watched: tuple[Path, list[list[Stage]], str]) -> None:
    folder, states, _ = watched
    names = ["prepared", "evaluate-base", "full", "evaluate"]
    planned = [found for stages in states if (found := [each.name for each in stages if each.state == "planned"])]
    assert planned[0] == names[-len(planned[0]) :]
    assert [stage.name for stage in states[-1]] == names
    assert not any(is_finished(folder, stages) for stages in states if stages[-1].state == "planned")


def test_a_finished_run(watched: tuple[Path, list[list[Stage]], str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = watched
    assert not list((folder / "stages").glob("*.live.json"))
    stages = read_stages(folder)
    assert is_finished(folder, stages)
    bpb = json.loads((folder / "stages/evaluate.json").read_text())["record"]["bpb"]
    assert stages[-1].bits_per_byte == f"xx {bpb['xx']:.4f}, en {bpb['en']:.4f}"
    main(["watch", str(folder), "--once"])
    printed = capsys.readouterr().out
    assert "3.2 K tokens" in printed and "finished; report:" in printed


def test_the_report_is_written_during_the_run(watched: tuple[Path, list[list[Stage]], str]) -> None:
    folder, _, report = watched
    assert 'http-equiv="refresh"' in report and "This report is not finished" in report
    finished = (folder / "report.html").read_text(encoding="utf-8")
    assert "refresh" not in finished and "This report is not finished" not in finished
    assert report.count("<figure>") >= 2


def test_a_stage_that_stopped_says_so(tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    stages.mkdir()
    (stages / "full.begun.json").write_text("{}")
    state = {"time": time.time() - 3600, "done": 50, "total": 100, "unit": "tokens", "rate": 1.0, "note": ""}
    (stages / "full.live.json").write_text(json.dumps(state))
    (stage,) = read_stages(tmp_path)
    assert (stage.state, stage.progress) == ("running", "50 of 100 tokens (50%)")
    assert stage.time == "no update for 60 min"
    (stages / "full.live.json").write_text("{half")  # not what ELO writes, but nothing to stop for
    assert read_stages(tmp_path)[0].progress == ""
    assert "running: full" in shown(tmp_path)


def test_a_file_that_disappears_after_the_folder_is_listed_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "full.begun.json").symlink_to(tmp_path / "gone")  # listed, but cannot be read
    assert read_stages(tmp_path) == []


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EloError, match="is not the folder of a run or a comparison; give the `output`"):
        read_stages(tmp_path)


def test_long_curves_are_thinned() -> None:
    assert thinned([1, 2, 3]) == [1, 2, 3]
    few = thinned(list(range(10_001)))
    assert len(few) <= 500 and few[-1] == 10_000 and few == sorted(few)


def test_a_count_just_below_a_unit_is_one_of_it() -> None:
    assert [short(value) for value in (999, 999_400, 999_600, 12_300)] == ["999", "999 K", "1 M", "12.3 K"]
