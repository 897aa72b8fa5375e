"""Runs killed at random instants."""

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_fixtures import ended, finish, forked
from run_fixtures import write_world

WEIGHTS = ("detach", "elo_pretraining", "attach", "scale", "layer_alignment")
LONGEST_DELAY = 0.35
"""Seconds between the moment a child has reached its target and the kill: about the length of a stage."""


def small_world(root: Path) -> dict[str, Any]:
    """A whole run of a second or two, with a checkpoint at every step."""
    root.mkdir(parents=True, exist_ok=True)
    config = write_world(root)
    config["training"] |= {"save_steps": 1, "evaluations": 1, "logging_steps": 1}
    config["tokens"] = 640
    del config["evaluation"]
    return config


def run_forked(config: dict[str, Any], log: Path) -> int:
    """Start `elo run` with this configuration in a child, as the command line does."""

    def work() -> None:
        from elo.cli import main

        path = log.with_suffix(".yaml")
        path.write_text(json.dumps(config))  # JSON is YAML
        main(["run", str(path)])

    return forked(work, log)


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a finished run."""
    files = [file for name in WEIGHTS for file in sorted((run / name).glob("*.safetensors"))]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def temporaries(run: Path) -> list[str]:
    """What must not be there once a run has ended well."""
    wrong = (".tmp-", "checkpoint-")
    return [str(path) for path in run.rglob("*") if path.name.startswith(wrong) or path.name.endswith(".begun.json")]


def finished_stages(run: Path) -> dict[str, int]:
    """Time at which each stage's record was written."""
    found = {}
    for path in run.glob("stages/*.json"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.endswith((".begun.json", ".live.json")):
                found[path.stem] = path.stat().st_mtime_ns
    return found


def where(run: Path) -> str:
    """What a killed run was in the middle of, by what it left."""
    if not (run / "stages").is_dir():
        return "start"
    unsealed = [each for each in run.glob("*/checkpoint-*") if not (each / "elo_checkpoint.json").exists()]
    if unsealed:
        return "checkpoint save"
    begun = [path.name.removesuffix(".begun.json") for path in run.glob("stages/*.begun.json")]
    if begun:
        return begun[0]
    if (run / "report.html").exists():
        return "after the report"
    return "report" if (run / "results.json").exists() else "between stages"


@dataclass
class Tally:
    """What a campaign of kills came to."""

    kills: int = 0
    runs: int = 0
    places: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def kill_until_done(
    config: dict[str, Any], folder: Path, reference: dict[str, str], rng: random.Random, most: int, tally: Tally
) -> None:
    """Run `config` in `folder`, killing it up to `most` times at random instants, then let it end and compare."""
    run, log = folder / "run", folder / "log.txt"
    folder.mkdir(parents=True)
    config = {**config, "output": str(run)}
    kills = 0
    while True:
        before = finished_stages(run)
        process = run_forked(config, log)
        if kills < most:
            goal = len(before) + rng.choice((0, 0, 0, 1, 2))
            while len(finished_stages(run)) < goal and not ended(process):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, LONGEST_DELAY))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # before it had a group of its own
        status = finish(process)
        again = [name for name, time_ns in finished_stages(run).items() if before.get(name, time_ns) != time_ns]
        if again or before.keys() - finished_stages(run).keys():
            tally.problems.append(f"{folder}: finished stages were done again: {again}")
        if status == 0:
            break
        if status != -signal.SIGKILL:
            tally.problems.append(f"{folder}: exit status {status}: {log.read_text()[-600:]}")
            return
        kills += 1
        tally.kills += 1
        tally.places[where(run)] += 1
    tally.runs += 1
    if weights(run) != reference:
        tally.problems.append(f"{folder}: the weights differ from the undisturbed run's")
    if left := temporaries(run):
        tally.problems.append(f"{folder}: left behind {left}")
