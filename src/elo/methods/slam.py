"""SLAM (arXiv 2501.03681): train the feed-forward parts of a few layers that handle languages."""

from typing import ClassVar, Literal

from elo.methods.base import Method, Phase, register


@register
class Slam(Method):
    """Train the feed-forward parts of the chosen layers, with everything else frozen.

    SLAM chooses about six layers by how differently they treat languages: `layers: auto:parallel:6` (docs/probe.md).
    """

    label: ClassVar[str] = "SLAM"
    name: Literal["slam"] = "slam"
    module: Literal["mlp"] = "mlp"
    """Part of each chosen layer that trains: its feed-forward part."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("slam", "frozen", learning_rate=5e-4),)
