"""Show the progress of long work: a bar with rate and remaining time on a terminal, otherwise occasional lines."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from elo.format import duration
from elo.store.live import release_live, write_live

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows progress towards `total` on the terminal, and to `elo watch`; silent on the terminal if `label` is None.

    Attributes:
        curves: lists of points that grow during the work, such as losses, for `elo watch` and the report.

    Args:
        total: amount at which the work is complete; None if unknown.
        label: name of the work.
        unit: unit of the amounts, such as `tokens`.
        done: amount done before a resume. It does not count towards the rate.
    """

    def __init__(self, total: float | None, label: str | None, unit: str, done: float = 0.0) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, done
        self.curves: dict[str, list[dict[str, Any]]] = {}
        self._start_done, self._started = done, time.monotonic()
        self._printed_at = self._started
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._write_live(self._started, "")
        if self.label is not None and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.label, total=self.total, status="")
            self._bar.update(self._task, completed=self.done)
            self._bar.start()
        return self

    def advance(self, amount: float) -> None:
        """Add `amount` to the count."""
        self.update(self.done + amount)

    def update(self, done: float, note: str = "") -> None:
        """Set the count to `done`; show `note` after the rate."""
        self.done = done
        now = time.monotonic()
        self._write_live(now, note)
        if self.label is None:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=self._status(now, note))
        elif now - self._printed_at > SECONDS_BETWEEN_LINES:
            self._printed_at = now
            self.say(f"{self.label}: {self._status(now, note)}{self._time_left(now)}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.label is not None:
            print(line, file=sys.stderr, flush=True)

    def _write_live(self, now: float, note: str) -> None:
        def state() -> dict[str, Any]:
            known = {"done": self.done, "total": self.total, "unit": self.unit, "rate": self._rate(now), "note": note}
            return known | {name: thinned(points) for name, points in self.curves.items()}

        write_live(self, state, at_once=self.done == self.total)

    def _rate(self, now: float) -> float:
        return (self.done - self._start_done) / max(now - self._started, 1e-9)

    def _status(self, now: float, note: str) -> str:
        of = "" if self.total is None else f" of {short(self.total)}"
        rate = f", {short(self._rate(now))}/s" if self.done > self._start_done else ""
        return f"{short(self.done)}{of} {self.unit}{rate}" + (f", {note}" if note else "")

    def _time_left(self, now: float) -> str:
        rate = self._rate(now)
        if self.total is None or rate <= 0:
            return ""
        return f", {duration((self.total - self.done) / rate)} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        release_live(self)
        if self._bar is not None:
            self._bar.stop()


def thinned(points: list[Any], at_most: int = 500) -> list[Any]:
    """Return at most `at_most` evenly spaced points of a curve, the last one included."""
    stride = max(1, -(-len(points) // at_most))
    return points[::-1][::stride][::-1]


def short(value: float) -> str:
    """Format a count with about three digits: 950, 12.3 K, 4.56 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"
