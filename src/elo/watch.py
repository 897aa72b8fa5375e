"""`elo watch`: show the stages of a running run or comparison from the files in its folder.

Nothing is locked or written, so any number of processes can watch, also on other machines that share the folder.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elo.config import load_config
from elo.errors import EloError
from elo.format import duration, memory
from elo.log import short
from elo.report.schema import FILE_NAME
from elo.run import stage_names
from elo.store.files import read_json, read_record
from elo.store.run_folder import RunFolder

# Without an update for this long, a stage is shown with the age of the last one.
SECONDS_UNTIL_SILENT = 60.0
_STYLES = {"done": "green", "running": "bold yellow", "planned": "dim"}


@dataclass(frozen=True)
class Stage:
    """The state of a stage, as read from its files.

    Attributes:
        record: record of a finished stage.
        live: state of a running stage (elo.store.live), if it has written one.
    """

    name: str
    state: Literal["done", "running", "planned"]
    record: Mapping[str, Any]
    live: Mapping[str, Any]

    @property
    def progress(self) -> str:
        """Amount done, rate and time left."""
        if self.state == "done":
            return f"{short(self.record['tokens'])} tokens" if self.record.get("tokens") else ""
        done, total, unit = self.live.get("done"), self.live.get("total"), self.live.get("unit", "")
        if done is None:
            return ""
        share = f" ({done / total:.0%})" if total else ""
        return f"{short(done)}{f' of {short(total)}' if total else ''} {unit}{share}"

    @property
    def time(self) -> str:
        """Wall time of a finished stage, or time left and, after a silence, the age of the last update."""
        if self.state == "done":
            return duration(self.record["seconds"]) if self.record.get("seconds") else ""
        done, total, rate = (self.live.get(key) for key in ("done", "total", "rate"))
        left = f"{duration((total - done) / rate)} left" if total and rate and done is not None else ""
        age = time.time() - self.live["time"] if self.live else 0.0
        return f"no update for {duration(age)}" if age > SECONDS_UNTIL_SILENT else left

    @property
    def rate(self) -> str:
        """Tokens, or other units, per second."""
        rate = self.record.get("tokens_per_second") or self.live.get("rate")
        return f"{short(rate)}/s" if rate else ""

    @property
    def loss(self) -> str:
        """The last logged losses in nats per token, newest last."""
        points = self.record.get("losses") or self.live.get("losses") or []
        return " ".join(f"{point['loss']:.3f}" for point in points[-3:])

    @property
    def bits_per_byte(self) -> str:
        """The last measured bits per byte by language."""
        points = self.record.get("evaluations") or self.live.get("evaluations") or []
        trial = (self.record.get("trial") or {}).get("measured") or {}
        found = self.record.get("bpb") or trial.get("bpb") or (points[-1]["bpb"] if points else {})
        return ", ".join(f"{language} {value:.4f}" for language, value in found.items())

    @property
    def memory(self) -> str:
        """Peak memory."""
        return memory(self.record["peak_memory_bytes"]) if self.record.get("peak_memory_bytes") else ""


def read_stages(folder: Path) -> list[Stage]:
    """Read the stages of a run or a comparison: finished, running and, for a run, planned.

    Raises:
        EloError: `folder` is not the folder of a run or a comparison.
    """
    if not (folder / "stages").is_dir():
        raise EloError(f"{folder}: is not the folder of a run or a comparison; give the `output` of its configuration")
    return _read_stages(folder)


def _read_stages(folder: Path) -> list[Stage]:
    files = RunFolder(folder).stage_file
    known: dict[str, tuple[float, Stage]] = {}
    for path in (folder / "stages").glob("*.json"):
        try:
            modified = path.stat().st_mtime
        except FileNotFoundError:
            continue  # the stage finished or was repeated after the folder was listed
        if path.name.endswith(".begun.json"):
            name = path.name.removesuffix(".begun.json")
            live = read_record(files(name, "live")) or {}
            stage = Stage(name, "running", {}, live)
        elif path.name.endswith(".live.json"):
            continue
        else:
            name = path.name.removesuffix(".json")
            done = read_record(path)
            if done is None:
                continue  # it is being replaced
            stage = Stage(name, "done", done.get("record") or {}, {})
        if stage.state == "done" or name not in known:
            known[name] = (modified, stage)
    found = [stage for _, stage in sorted(known.values(), key=lambda each: each[0])]
    return [each for stage in found for each in (stage, *_inside(folder, stage))] + _planned(folder, set(known))


def _inside(folder: Path, stage: Stage) -> list[Stage]:
    """Return the stages of a running trial of a comparison."""
    trial = folder / "trials" / stage.name.removeprefix("trials-")
    if stage.state != "running" or not (trial / "stages").is_dir():
        return []
    return [Stage(f"  {each.name}", each.state, each.record, each.live) for each in _read_stages(trial)]


def _planned(folder: Path, known: set[str]) -> list[Stage]:
    try:
        config = load_config(read_json(folder / "config.json"))
    except EloError:  # a trial, or the configuration of another version
        return []
    if any(name.startswith(("trials-", "budget-", "validate-")) for name in known):
        return []  # a comparison, whose number of trials depends on their results
    names = ["evaluate-base" if name == "prepare" else name for name in stage_names(config)]
    return [Stage(name, "planned", {}, {}) for name in ["prepared", *names, "evaluate"] if name not in known]


def render(folder: Path) -> RenderableType:
    """Return the table of stages.

    Raises:
        EloError: `folder` is not the folder of a run or a comparison.
    """
    stages = read_stages(folder)
    table = Table(title=Text(str(folder)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for title in ("stage", "", "progress", "rate", "time", "memory", "loss (nats)", "bits per byte"):
        table.add_column(title, justify="left" if title in ("stage", "", "bits per byte") else "right")
    for stage in stages:
        cells = (stage.name, stage.state, stage.progress, stage.rate, stage.time, stage.memory, stage.loss)
        table.add_row(*(Text(cell) for cell in (*cells, stage.bits_per_byte)), style=_STYLES[stage.state])
    return Group(table, Text(_summary(folder, stages), style="dim"))


def _summary(folder: Path, stages: list[Stage]) -> str:
    if is_finished(folder, stages):
        return f"finished; report: {folder / 'report.html'}"
    running = [stage.name.strip() for stage in stages if stage.state == "running"]
    return f"running: {', '.join(running)}" if running else "between stages, or stopped; the same command resumes"


def is_finished(folder: Path, stages: list[Stage]) -> bool:
    """Return whether the results are written and no stage is running or planned."""
    if not all(stage.state == "done" for stage in stages) or not (folder / FILE_NAME).exists():
        return False
    try:
        return not read_json(folder / FILE_NAME).get("in_progress")
    except EloError:
        return False


def watch(folder: str | Path, *, once: bool = False, every: float = 2.0) -> None:
    """Show the stages of a run or a comparison until it is finished or the user interrupts.

    Args:
        folder: `output` of the run or comparison.
        once: print the table once and return.
        every: seconds between updates.

    Raises:
        EloError: `folder` is not the folder of a run or a comparison.
    """
    folder = Path(folder)
    console = Console()
    if once or not console.is_terminal:
        console.width = max(console.width, 140)  # a table that wraps in a log file cannot be read
        console.print(render(folder))
        return
    with Live(render(folder), console=console, auto_refresh=False) as live:
        while not is_finished(folder, read_stages(folder)):
            time.sleep(every)
            live.update(render(folder), refresh=True)
