"""LISA (arXiv 2403.17919): train a few layers, drawn at random every few updates, and the parts outside the layers."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.footprint import Flops, Footprint
from elo.methods.base import Method, Phase, Setup, parameters_in, register, train_all
from elo.methods.gradient_floor import GradientFloor
from elo.train.prepared import Prepared


@register
class Lisa(Method):
    """Train embedding, final norm, head and a few layers, which are redrawn at random every `period` updates.

    With `window`, the drawn layers are consecutive and nothing below them has a gradient. The embedding then trains
    only through a tied head, or when the first layer is drawn.
    """

    label: ClassVar[str] = "LISA"
    redraws_layers: ClassVar[bool] = True
    uses_layers: ClassVar[bool] = False
    name: Literal["lisa"] = "lisa"
    layers: int = Field(4, gt=0)
    """Number of decoder layers that train at a time."""
    period: int = Field(4, gt=0)
    """Number of updates between draws."""
    window: bool = False
    """Draw consecutive layers and compute no gradient below them."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("lisa", "frozen", also_train=("embedding", "head"), learning_rate=2e-4),)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        layers = layers_of(model)
        num_drawn = min(self.layers, len(layers))
        # The optimizer gets the parameters that require gradients when it is created, so all of them must.
        train_all(model, self.module)
        floor = GradientFloor(model) if self.window else None

        def before_step(step: int, forget: Callable[[nn.Parameter], Any]) -> None:
            turn, inside = divmod(step, self.period)
            generator = setup.generator(turn)
            chosen = set(torch.randperm(len(layers), generator=generator)[:num_drawn].tolist())
            if floor is not None:
                first = int(torch.randint(len(layers) - num_drawn + 1, (), generator=generator))
                chosen = set(range(first, first + num_drawn))
                floor.open() if first == 0 else floor.close()
            for index, layer in enumerate(layers):
                for parameter in parameters_in(layer, self.module):
                    parameter.requires_grad_(index in chosen)
                    if inside == 0 and index not in chosen:  # its moments would be stale when it is drawn again
                        forget(parameter)

        return Prepared(before_step=before_step, fold=floor.remove if floor else lambda: None)

    def layers_at_once(self, phase: Phase, layers: Sequence[int], num_layers: int) -> Sequence[int]:
        return range(min(self.layers, num_layers))  # only the number matters, because the embedding trains

    def flops_per_token(
        self, phase: Phase, footprint: Footprint, layers: Sequence[int], sequence_length: int, **counting: Any
    ) -> Flops:
        num_drawn = min(self.layers, footprint.num_layers)
        if not self.window:
            return super().flops_per_token(phase, footprint, layers, sequence_length, **counting)
        starts = range(footprint.num_layers - num_drawn + 1)
        counts = [
            footprint.flops_per_token(
                "frozen",
                range(start, start + num_drawn),
                sequence_length=sequence_length,
                also_train=("embedding", "head") if start == 0 else ("head",),
                module=self.module,
                **counting,
            )
            for start in starts
        ]
        return Flops.mean(counts)
