"""The trainings that a method is made of, and which ones ELO's options ask for; without torch, for plans."""

from dataclasses import dataclass
from typing import Literal

from elo.train.settings import EloOptions

Rows = Literal["pretraining", "alignment", "all"]
Middle = Literal["absent", "bridge", "forward_only", "computed"]
Section = Literal["elo_pretraining", "layer_alignment", "full", "lora", "lisa"]


@dataclass(frozen=True)
class Phase:
    """One training of one model.

    Attributes:
        name: as it stands in records and folder names.
        middle: what is done with the layers that are not among the trained ones. `absent`: they are detached, and what
            is kept is joined end to end. `bridge`: detached, and a linear bridge stands where they stood.
            `forward_only`: computed without a graph, while the gradient passes by the bridge's Jacobian. `computed`:
            like any other layer.
        rows: which part of the run's token budget it sees. `all` is `pretraining` followed by `alignment`.
        settings: section of the configuration that holds its training arguments.
    """

    name: str
    middle: Middle
    rows: Rows
    settings: Section

    @property
    def detached(self) -> bool:
        """Whether it trains a detached model, which is attached afterwards."""
        return self.middle in ("absent", "bridge")

    @property
    def needs_bridge(self) -> bool:
        """Whether a bridge has to be fitted on the base before."""
        return self.middle in ("bridge", "forward_only")


def elo_phases(elo: EloOptions) -> tuple[Phase, ...]:
    """ELO pretraining, and layer alignment where the options have one."""
    middles: dict[str, Middle] = {"none": "absent", "bridge": "bridge", "forward_only": "forward_only"}
    alignment = elo.alignment
    if alignment == "auto":
        alignment = "none" if elo.stand_in == "forward_only" else "full"
    rows: Rows = "all" if alignment == "none" else "pretraining"
    pretraining = Phase("elo_pretraining", middles[elo.stand_in], rows, settings="elo_pretraining")
    if alignment == "none":
        return (pretraining,)
    aligned: Middle = "computed" if alignment == "full" else "forward_only"
    return pretraining, Phase("layer_alignment", aligned, rows="alignment", settings="layer_alignment")
