"""Coordinate the processes of one launch (torchrun, accelerate launch): all train, and the main one writes files."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from elo.errors import EloError

T = TypeVar("T")
_POLL_INTERVAL_S = 0.2
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
_LAUNCH = (*_NUMBERS, "MASTER_ADDR")
"""Environment variables that a launcher of several processes sets."""


def check_launch() -> None:
    """Raise EloError if the environment variables that a launcher sets are incomplete or inconsistent."""
    remedy = "launch with torchrun, or set all variables that it sets (docs/launching.md)"
    given = {name: os.environ[name] for name in _LAUNCH if os.environ.get(name)}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return
    if given.get("WORLD_SIZE") == "1" and given.get("RANK", "0") == "0":
        return
    if missing := [name for name in _LAUNCH if name not in given]:
        raise EloError(f"launch: {', '.join(given)} set without {', '.join(missing)}; {remedy}")
    if wrong := [name for name in _NUMBERS if not given[name].isdecimal()]:
        raise EloError(f"launch: {wrong[0]} is {given[wrong[0]]!r}, not a number; {remedy}")
    if int(given["RANK"]) >= world_size():
        raise EloError(f"launch: RANK {given['RANK']} is not below WORLD_SIZE {world_size()}; {remedy}")


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_main() -> bool:
    """Return whether this is the main process (rank 0), which writes records and does work that is done once."""
    return (os.environ.get("RANK") or "0") == "0"


def from_main(make: Callable[[], T]) -> T:
    """Call `make` in the main process only, and return its result in every process. All processes must call this.

    Raises:
        EloError: `make` failed. Raised in the other processes; the main process raises the original error.
    """
    if world_size() == 1:
        return make()
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            box = [make(), None]
        except Exception as error:  # broadcast first, because the others would otherwise wait until a timeout
            failure, box = error, [None, str(error)]
    broadcast_object_list(box)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise EloError(f"the main process stopped: {box[1]}")
    return box[0]


def wait_until(ready: Callable[[], bool]) -> None:
    """Poll until `ready()` returns true.

    A collective would time out after hours. If the main process fails, the launcher kills those that wait for it.
    """
    while not ready():
        time.sleep(_POLL_INTERVAL_S)
