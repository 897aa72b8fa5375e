"""Record the time, losses and measurements of a phase across restarts."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from elo.store.processes import world_size
from elo.train.peak_memory import peak_memory_bytes


@dataclass
class Record:
    """Time, losses and measurements of a phase so far.

    Attributes:
        tokens_per_step: tokens per update over all processes.
        seconds: wall time of training, in seconds, without evaluation and checkpoints.
        cpu_seconds: CPU time of this process in that time, in seconds, summed over cores.
        losses: one {"tokens", "seconds", "loss"} per logging interval, with the loss in nats per token. With deep
            supervision, "internal" is the loss by layer.
        evaluations: one {"tokens", "seconds"} per measurement, with the measured values.
    """

    tokens_per_step: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    _since: tuple[float, float] | None = None

    def resume_clock(self) -> None:
        """Start to count time."""
        self._since = time.perf_counter(), time.process_time()

    def pause_clock(self) -> None:
        """Wait for the GPU, then stop counting time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._count()
        self._since = None

    def add_loss(self, step: int, loss: float, internal: Mapping[int, float] | None = None) -> dict[str, Any]:
        """Record the mean loss since the previous record, in nats per token. Return tokens and cost so far.

        Args:
            internal: mean loss of each supervised internal layer, in nats per token.
        """
        point = self._point(step)
        more = {"internal": {str(layer): value for layer, value in internal.items()}} if internal else {}
        self.losses.append(point | {"loss": loss} | more)
        return point | self._cost()

    def add_evaluation(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        """Record measured values. Return tokens and cost so far."""
        point = self._point(step)
        self.evaluations.append(point | measured)
        return point | self._cost()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: arguments of a `Record` that continues this one."""
        return {key: getattr(self, key) for key in ("seconds", "cpu_seconds", "losses", "evaluations")}

    def fault(self, gradient_norm: float, max_spike: float) -> str | None:
        """Describe what is wrong with the last losses; return None if nothing is.

        Args:
            gradient_norm: norm of the last update's gradient.
            max_spike: tolerated difference from the recent median loss, in nats.
        """
        losses = [point["loss"] for point in self.losses]
        if not (math.isfinite(losses[-1]) and math.isfinite(gradient_norm)):
            return f"the loss is {losses[-1]} and the gradient norm {gradient_norm}"
        recent, before = losses[-3:], losses[-23:-3]
        if len(before) >= 5 and min(recent) > statistics.median(before) + max_spike:
            shown = ", ".join(f"{value:.3f}" for value in recent)
            return (
                f"the last three logged losses ({shown}) are more than {max_spike} nats above the recent median "
                f"{statistics.median(before):.3f} (max_loss_spike_nats)"
            )
        return None

    def _point(self, step: int) -> dict[str, Any]:
        self._count()
        return {"tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3)}

    def _cost(self) -> dict[str, float]:
        """Return this process's CPU seconds and peak memory in bytes, and the GPU seconds of all processes."""
        cost = {"cpu_seconds": round(self.cpu_seconds, 3), "memory_bytes": float(peak_memory_bytes())}
        return cost | ({"gpu_seconds": round(self.seconds * world_size(), 3)} if torch.cuda.is_available() else {})

    def _count(self) -> None:
        if self._since is not None:
            now = time.perf_counter(), time.process_time()
            self.seconds += now[0] - self._since[0]
            self.cpu_seconds += now[1] - self._since[1]
            self._since = now
