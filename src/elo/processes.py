"""The processes of one launch (torchrun, accelerate launch): one does what is done once, all train."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.2


def world_size() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes records and does what is done once."""
    return os.environ.get("RANK", "0") == "0"


def from_main(value: T) -> T:
    """The main process's `value`, in every process; all must call it."""
    if world_size() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    box = [value]
    broadcast_object_list(box)
    return box[0]


def wait_until(ready: Callable[[], bool]) -> None:
    """Look again and again: no collective, so that no time-out ends a wait of hours. The launcher ends dead waits."""
    while not ready():
        time.sleep(SECONDS_BETWEEN_LOOKS)
