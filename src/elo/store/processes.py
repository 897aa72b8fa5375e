"""The processes of one launch (torchrun, accelerate launch): one does what is done once, all train."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from elo.errors import EloError

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.2


def world_size() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes records and does what is done once."""
    return os.environ.get("RANK", "0") == "0"


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, the only one to call it, in every process; all must come here.

    Raises:
        EloError: in the other processes, where `make` failed in the main one (which raises what `make` did).
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
        except Exception as error:  # told to the others first, or they would wait for it until a time-out
            failure, box = error, [None, str(error)]
    broadcast_object_list(box)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise EloError(f"the main process stopped: {box[1]}")
    return box[0]


def wait_until(ready: Callable[[], bool]) -> None:
    """Look again and again: no collective, so that no time-out ends a wait of hours. The launcher ends dead waits."""
    while not ready():
        time.sleep(SECONDS_BETWEEN_LOOKS)
