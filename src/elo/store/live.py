"""Record the progress of a running stage in a small file, so that `elo watch` can show it from another process."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from elo.store.files import TEMPORARY_PREFIX

SECONDS_BETWEEN_WRITES = 2.0
_owner: ContextVar[object] = ContextVar("live_owner", default=None)
_file: ContextVar[Path | None] = ContextVar("live_file", default=None)
_written: dict[Path, float] = {}


@contextmanager
def live_file(path: Path) -> Iterator[None]:
    """Let `write_live` write to `path`. A stage that stops leaves the file, which shows where it stopped."""
    tokens = _file.set(path), _owner.set(None)
    try:
        yield
    finally:
        _file.reset(tokens[0])
        _owner.reset(tokens[1])


def write_live(owner: object, state: Callable[[], dict[str, Any]], *, at_once: bool = False) -> None:
    """Write the state of the running stage, if there is one, to its file, at most once per `SECONDS_BETWEEN_WRITES`.

    The file is not flushed to disk, because nothing depends on it.

    Args:
        owner: object that the state describes. Until `release_live`, calls by other owners are ignored, so that a
            measurement during training does not replace the state of the training.
        state: function that returns the state. It is called only if the state is written.
        at_once: write even if the last write was less than `SECONDS_BETWEEN_WRITES` ago.
    """
    path, now = _file.get(), time.time()
    if path is None:
        return
    if _owner.get() is None:
        _owner.set(owner)
    if _owner.get() is not owner:
        return
    if not at_once and now - _written.get(path, 0.0) < SECONDS_BETWEEN_WRITES:
        return
    _written[path] = now
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        temporary.write_text(json.dumps({"time": now, "process": os.getpid(), **state()}), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a full disk must not stop the work itself


def release_live(owner: object) -> None:
    """Let another owner write to the file of the running stage."""
    if _owner.get() is owner:
        _owner.set(None)
