"""Kill runs, give them bad input, fuzz, and process large files: the figures of docs/reliability.md.

    python benchmarks/reliability.py --kills 200 --fuzz-minutes 5 --output reliability.json

Needs the development extras (pytest, hypothesis), a Unix, and about --large-mb x 6 of disk in --scratch.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import in_process, largest_resident_bytes, weights_size
from surgery import make_checkpoint

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ELO_FUZZ="1", TRANSFORMERS_VERBOSITY="error")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

TABLES = ("config/test_bad_config.py", "checkpoint/test_bad_checkpoints.py", "data/test_bad_data.py")
FAULTS = (
    "test_run_faults.py",
    "data/test_prepare_faults.py",
    "surgery/test_checkpoint_faults.py",
    "store/test_run_folder.py",
    "train/test_processes.py",
)


def kills(count: int, scratch: Path, seed: int) -> dict[str, Any]:
    """Kill whole runs with SIGKILL at random instants until `count` kills are done; compare every end."""
    import torch
    from kill_fixtures import Tally, kill_until_done, small_world, weights

    import elo.report.drawing
    from elo.run import run

    torch.set_num_threads(1)
    elo.report.drawing._PNG_DPI = 10  # drawing would be most of so small a run
    config = small_world(scratch / "world")
    with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
        run({**config, "output": str(scratch / "undisturbed")})
    reference, tally, rng = weights(scratch / "undisturbed"), Tally(), random.Random(seed)
    started, victim = time.monotonic(), 0
    while tally.kills < count and len(tally.problems) < 10:
        victim += 1
        most = min(rng.randint(4, 14), count - tally.kills)
        kill_until_done(config, scratch / f"victim-{victim}", reference, rng, most, tally)
        shutil.rmtree(scratch / f"victim-{victim}")
        if tally.problems:
            print(tally.problems[-1], flush=True)
        print(f"kills: {tally.kills} of {count}, {tally.runs} runs ended, {len(tally.problems)} problems", flush=True)
    return {
        "injected": tally.kills,
        "runs": victim,
        "runs_ended_bit_identical": tally.runs - sum("weights differ" in each for each in tally.problems),
        "problems": tally.problems,
        "places": dict(tally.places.most_common()),
        "seconds": round(time.monotonic() - started, 1),
    }


def suites(names: tuple[str, ...]) -> dict[str, Any]:
    """Run test files in a process of their own; how many cases passed and failed, by file."""
    found: dict[str, Any] = {}
    for name in names:
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "slow or not slow",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / name),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "ELO_FUZZ"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
        found[name] = counts | {"seconds": round(time.monotonic() - started, 1)}
        if failures := re.findall(r"^(?:FAILED|ERROR) (.+)", done.stdout, re.MULTILINE):
            found[name]["failures"] = failures
        print(f"{name}: {found[name]}", flush=True)
    return found


def fuzz(minutes: float, seed: int) -> dict[str, Any]:
    """Call the functions of tests/test_fuzz.py in turn, on new examples, until the time is up."""
    import test_fuzz

    random.seed(seed)
    functions: list[tuple[str, Callable[[], None]]] = [
        (name, value) for name, value in vars(test_fuzz).items() if name.startswith("test_")
    ]
    findings: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    while time.monotonic() - started < minutes * 60:
        for name, function in functions:
            try:
                function()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                findings[f"{name}: {''.join(traceback.format_exception(error))[-1500:]}"] += 1
            if time.monotonic() - started >= minutes * 60:
                break
    shutil.rmtree(test_fuzz.world())
    return {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "examples": dict(test_fuzz.EXAMPLES),
        "examples_in_all": sum(test_fuzz.EXAMPLES.values()),
        "findings": dict(findings),
    }


def large(megabytes: int, corpus_mb: int, scratch: Path) -> dict[str, Any]:
    """Detach and attach a checkpoint, and prepare a corpus, of about these sizes."""
    from run_fixtures import SOURCE, TARGET, write_base

    write_base(scratch / "small")
    make_checkpoint(scratch / "base", megabytes, vocabulary=1000, shard="200MB")
    size = weights_size(scratch / "base")
    b, d, a = (repr(str(scratch / name)) for name in ("base", "detached", "attached"))
    detached = in_process(f"from elo.api import detach; detach({b}, 'first:1,last:1', output={d})")
    attached = in_process(f"from elo.api import attach; attach({d}, {b}, output={a})")
    rng, words = random.Random(0), [*SOURCE, *TARGET]
    with (scratch / "corpus.jsonl").open("w", encoding="utf-8") as file:
        while file.tell() < corpus_mb << 20:
            text = " ".join(rng.choices(words, k=rng.randint(50, 800)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    corpus = (scratch / "corpus.jsonl").stat().st_size
    call = (
        "from elo.api import prepare; "
        f"prepare({str(scratch / 'small')!r}, {{'xx': {str(scratch / 'corpus.jsonl')!r}}}, "
        f"{str(scratch / 'data')!r}, progress=False)"
    )
    return {
        "imports_alone": in_process("import elo.api"),
        "checkpoint_mib": size >> 20,
        "detach": detached,
        "attach": attached,
        "corpus_mib": corpus >> 20,
        "prepare": in_process(call),
    }


def main() -> None:
    """Do what the options ask for and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--fuzz-minutes", type=float, default=5.0)
    parser.add_argument("--large-mb", type=int, default=1000, help="size of the large checkpoint, in MB; 0 skips it")
    parser.add_argument("--corpus-mb", type=int, default=150, help="size of the large corpus, in MB")
    parser.add_argument("--no-suites", action="store_true", help="skip the suites of bad input and faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; default: a temporary folder")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="elo-reliability-", dir=options.scratch))
    found: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
        "seed": options.seed,
    }

    def keep(name: str, value: Any) -> None:
        found[name] = value
        options.output.write_text(json.dumps(found, indent=2) + "\n")

    try:
        if options.kills:
            keep("kills", kills(options.kills, scratch / "kills", options.seed))
        if not options.no_suites:
            keep("bad_input", suites(TABLES))
        if options.fuzz_minutes:
            keep("fuzz", fuzz(options.fuzz_minutes, options.seed))
        if not options.no_suites:
            keep("faults", suites(FAULTS))
        if options.large_mb:
            (scratch / "large").mkdir()
            keep("large", large(options.large_mb, options.corpus_mb, scratch / "large"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found["peak_rss_of_this_process_mib"] = largest_resident_bytes() >> 20
    keep("done", True)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
