"""Full continual pretraining (CPT), the baseline."""

from typing import ClassVar, Literal

from elo.methods.base import Method, Phase, register


@register
class Full(Method):
    """Train every parameter on all tokens."""

    label: ClassVar[str] = "Full CPT"
    uses_layers: ClassVar[bool] = False
    name: Literal["full"] = "full"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("full", "trained"),)
