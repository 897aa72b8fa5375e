"""Progress of an evaluation: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts up to `total` things of one `unit`; silent when `label` is None."""

    def __init__(self, total: int, label: str | None, unit: str) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, 0
        self._bar: Bar | None = None
        self._spoke_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.label is not None and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count)
        elif self.label is not None and time.monotonic() - self._spoke_at > _SECONDS_BETWEEN_LINES:
            self._spoke_at = time.monotonic()
            print(f"{self.label}: {self.done:,} of {self.total:,} {self.unit}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
