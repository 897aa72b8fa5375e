"""What training has cost so far, as values for experiment trackers."""

import torch

from elo.store.processes import world_size
from elo.train.peak_memory import peak_memory_bytes


def cost_so_far(seconds: float, cpu_seconds: float) -> dict[str, float]:
    """Return CPU seconds of this process, GPU seconds of all processes and this process's peak memory in bytes.

    Args:
        seconds: wall time of training so far, in seconds.
        cpu_seconds: CPU time of this process in that time, in seconds.
    """
    cost = {"cpu_seconds": round(cpu_seconds, 3), "memory_bytes": float(peak_memory_bytes())}
    return cost | ({"gpu_seconds": round(seconds * world_size(), 3)} if torch.cuda.is_available() else {})
