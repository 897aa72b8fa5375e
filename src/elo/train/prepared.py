"""A model made ready to train: what a method hands to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """What a prepared model needs while it trains.

    Attributes:
        before_step: called before each update with its 0-based number and the optimizer, after a restart too.
        first_row: rows of embedding and head before this one do not train; 0 trains all.
        fold: takes out what was added and leaves a plain Hugging Face model that holds what was trained.
    """

    before_step: Callable[[int, Any], None] | None = None
    first_row: int = 0
    fold: Callable[[], None] = lambda: None
