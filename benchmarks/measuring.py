"""What several benchmarks need: a process of its own with its peak memory, a table."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


def in_process(code: str, *, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run Python code in a process of its own.

    Returns:
        {"seconds", "peak_rss_mib", "printed"}: wall time with the interpreter's start, peak of its resident memory, and
        the last lines it printed; {"failed": end of its stderr} where it did not come to an end.
    """
    # Not getrusage: its maximum is inherited from the process that started this one.
    tail = "\nimport re; print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code + tail],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    seconds = time.monotonic() - started
    match = re.search(r"PEAK (\d+)\s*$", done.stdout)
    if done.returncode or match is None:
        return {"failed": (done.stderr or done.stdout)[-1500:]}
    return {
        "seconds": round(seconds, 2),
        "peak_rss_mib": int(match[1]) >> 10,
        "printed": done.stdout[: match.start()].strip()[-2000:],
    }


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def weights_size(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]), flush=True)
