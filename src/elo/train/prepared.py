"""Hooks of a method in the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Prepared:
    """The hooks of a prepared model.

    Attributes:
        before_step: function called before each update, with its 0-based number and a function that drops the
            optimizer state of a parameter. It may change which parameters require gradients.
        first_row: first trained row of embedding and head; 0 trains all rows.
        supervised_output: function of a supervised layer's index and output, which returns the output for the layer's
            own loss. It may scale the gradient.
        fold: function that merges or removes what `Method.prepare` installed and leaves a plain Hugging Face model.
        fold_parts: function that replaces `fold` if the weights are sharded. It removes what was installed, and returns
            a function that merges it into a gathered part of the model. None means that `fold` merges nothing.
    """

    before_step: Callable[[int, Callable[[nn.Parameter], Any]], None] | None = None
    first_row: int = 0
    supervised_output: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden
    fold: Callable[[], None] = lambda: None
    fold_parts: Callable[[], Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None
