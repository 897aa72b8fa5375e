"""Train the chosen layers in place: nothing is detached, and the other layers are frozen."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.footprint import Flops, Footprint
from elo.methods.base import ChosenLayers, Phase, Setup, parameters_in, register
from elo.methods.gradient_floor import GradientFloor
from elo.train.prepared import Prepared


@register
class Frozen(ChosenLayers):
    """Train the chosen layers in the whole model, with the other layers frozen.

    With `backward_share` below 1, only that share of the updates, drawn at random, computes the gradient below the
    topmost block of trained layers. That gradient is divided by `backward_share`, so that its expected value is exact.
    With 0, nothing below that block has a gradient: `layers: last:4` then trains only the top four layers.
    """

    label: ClassVar[str] = "Frozen middle"
    name: Literal["frozen"] = "frozen"
    backward_share: float = Field(1.0, ge=0, le=1)
    """Share of the updates that compute the gradient below the topmost block of trained layers."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("frozen", "frozen", also_train=self.also_train, learning_rate=5e-4),)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        prepared = super().prepare(model, phase, setup)
        if self.backward_share == 1:
            return prepared
        floor = GradientFloor(model)
        top = topmost_block(setup.layers)
        layers = layers_of(model)

        def before_step(step: int, _: Any) -> None:
            drawn = float(torch.rand((), generator=setup.generator(step))) < self.backward_share
            for index in setup.layers:
                for parameter in parameters_in(layers[index], self.module) if index < top else ():
                    parameter.requires_grad_(drawn)  # looked up each time, because FSDP replaces parameters
            if drawn:
                floor.open(top, 1 / self.backward_share)
            else:
                floor.close()

        return Prepared(
            before_step=before_step,
            first_row=prepared.first_row,
            supervised_output=floor.supervised_output,
            fold=floor.remove,
        )

    def flops_per_token(
        self, phase: Phase, footprint: Footprint, layers: Sequence[int], sequence_length: int, **counting: Any
    ) -> Flops:
        exact = super().flops_per_token(phase, footprint, layers, sequence_length, **counting)
        if self.backward_share == 1:
            return exact
        top = [index for index in layers if index >= topmost_block(layers)]
        parts = [part for part in phase.also_train if part != "embedding"]
        above = footprint.flops_per_token(
            "frozen", top, sequence_length=sequence_length, also_train=parts, module=self.module, **counting
        )
        return exact.mixed(above, self.backward_share)


def topmost_block(layers: Sequence[int]) -> int:
    """Return the first layer of the last run of consecutive indices in sorted `layers`."""
    first = layers[-1]
    for index in reversed(layers):
        if index < first - 1:
            break
        first = index
    return first
