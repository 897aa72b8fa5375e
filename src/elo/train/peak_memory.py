"""Measure the peak memory of a piece of work."""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Return freed memory to the system and restart the measurement of the peak.

    Where the peak cannot be reset (systems other than Linux, some containers), it remains that of the whole process.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory_bytes() -> int:
    """Return the peak since the reset, in bytes: allocated GPU memory if there is a GPU, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
