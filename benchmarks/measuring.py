"""Shared functions of the benchmarks: run code in a separate process, measure it, print a table."""

import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


def in_process(code: str, *, env: dict[str, str] | None = None, python: str = sys.executable) -> dict[str, Any]:
    """Run Python code in a separate process, optionally with another environment's `python`.

    Returns:
        {"seconds", "peak_rss_mib", "printed"}: wall time including the interpreter's start, peak resident memory, and
        the end of the printed output; or {"failed": end of its stderr} if it did not finish.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, "-c", code], stdout=printed, stderr=errors, env={**os.environ, **(env or {})}
        )
        peak = 0
        # Asked for again and again: training sets the kernel's mark back when a phase begins.
        while process.poll() is None:
            peak = max(peak, _high_water_mark(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - started
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            return {"failed": (errors.read() or printed.read())[-1500:]}
        return {"seconds": round(seconds, 2), "peak_rss_mib": peak >> 10, "printed": printed.read().strip()[-2000:]}


def finished(code: str, *, env: dict[str, str] | None = None, python: str = sys.executable) -> dict[str, Any]:
    """As `in_process`, but the end of everything where the code fails."""
    found = in_process(code, env=env, python=python)
    if "failed" in found:
        raise SystemExit(found["failed"])
    return found


def largest_resident_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Largest resident memory so far of this process, or of its children that have ended, in bytes."""
    largest = resource.getrusage(who).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _high_water_mark(process: int) -> int:
    try:
        match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) if match else 0


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(bf16: bool | None = None, seconds: float = 1.0) -> float:
    """Best rate of large square matrix products on this machine, in FLOP/s; by default bf16 on a GPU alone."""
    import torch

    gpu = torch.cuda.is_available()
    side, dtype = (8192 if gpu else 1024), torch.bfloat16 if (gpu if bf16 is None else bf16) else torch.float32
    left, right, product = (torch.ones(side, side, dtype=dtype, device="cuda" if gpu else "cpu") for _ in range(3))
    torch.mm(left, right, out=product)
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or fastest == float("inf"):
        synchronise()
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        synchronise()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * side**3 / fastest


def weights_size(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_report(path: Path | None, arguments: dict[str, Any], **found: Any) -> None:
    """Write what was found as JSON, with date, machine, versions and the command's arguments; nowhere if None."""
    from elo.store.environment import hardware, versions

    if path is not None:
        told = {name: getattr(each, "name", each) for name, each in arguments.items() if each is not path}
        today = datetime.date.today().isoformat()
        report = {"date": today, "hardware": hardware(), "versions": versions(), "arguments": told, **found}
        path.write_text(json.dumps(report, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]), flush=True)
