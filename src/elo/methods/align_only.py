"""Layer alignment without ELO pretraining, as a control for what ELO pretraining adds."""

from typing import ClassVar, Literal

from pydantic import Field

from elo.methods.base import Method, Phase, register


@register
class AlignOnly(Method):
    """Train every parameter on the tokens that ELO's layer alignment would use."""

    label: ClassVar[str] = "Alignment alone"
    uses_layers: ClassVar[bool] = False
    name: Literal["align_only"] = "align_only"
    share: float = Field(0.1, gt=0, lt=1)
    """Share of the run's tokens to train on."""

    @property
    def alignment_share(self) -> float:
        return self.share

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("layer_alignment", "trained", "alignment"),)
