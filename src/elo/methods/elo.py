"""ELO (arXiv 2601.03648): detach layers, train them on the target language, attach them, align the whole model."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from elo.checkpoint.architecture import layers_of
from elo.methods.base import ChosenLayers, Phase, Portion, Scale, Setup, register
from elo.methods.lora import add_adapters
from elo.train.prepared import Prepared
from elo.train.settings import Part


@register
class Elo(ChosenLayers):
    """Train the chosen layers in a detached model, attach them, and align the whole model briefly.

    The defaults are starting points that were not tuned (dev/LOG.md). `elo_paper` is the published method.
    """

    label: ClassVar[str] = "ELO"
    name: Literal["elo"] = "elo"
    middle: Literal["bridged", "removed"] = "bridged"
    """Replacement for the other layers in the detached model: `bridged` is a frozen linear map fitted on the base,
    `removed` is none."""
    scale: Scale = "search"
    """Factor of the detached model's change when it is attached. `search` tries several scales, 0 (the base) among
    them, and takes the one with the lowest loss over all languages."""
    alignment: Literal["full", "lora", "none"] = "full"
    """Training in layer alignment: every parameter (`full`), low-rank adapters on every layer (`lora`), with the new
    rows if `embedding_rows` is `new`, or no layer alignment (`none`)."""
    alignment_rank: int = Field(32, gt=0)
    """Rank of the adapters with `alignment: lora`."""
    share: float = Field(0.5, gt=0, lt=1)
    """Share of the run's tokens for layer alignment."""

    @property
    def alignment_share(self) -> float:
        return 0.0 if self.alignment == "none" else self.share

    @property
    def phases(self) -> tuple[Phase, ...]:
        portion: Portion = "all" if self.alignment == "none" else "pretraining"
        pretraining = Phase("elo_pretraining", self.middle, portion, self.also_train, learning_rate=5e-4)
        if self.alignment == "none":
            return (pretraining,)
        if self.alignment == "full":
            return pretraining, Phase("layer_alignment", "trained", "alignment")
        # The new rows have learnt in the detached model, and go on in the whole one.
        parts = self.also_train if self.needs_new_rows else ()
        rank = self.alignment_rank
        return pretraining, Phase("layer_alignment", "adapted", "alignment", parts, rank, learning_rate=5e-4)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        if phase.middle == "adapted":
            ranks = self.lora_ranks(phase, len(layers_of(model)))
            first_row = self.first_row(model)
            return add_adapters(model, phase, setup.seed, ranks, 2.0, module=self.module, first_row=first_row)
        return super().prepare(model, phase, setup)


@register
class EloPaper(Elo):
    """Train the chosen layers joined end to end with everything else frozen, then briefly train the whole model.

    This is ELO exactly as published.
    """

    label: ClassVar[str] = "ELO as published"
    name: Literal["elo_paper"] = "elo_paper"  # type: ignore[assignment]
    middle: Literal["removed"] = "removed"
    also_train: tuple[Part, ...] = ()
    embedding_rows: Literal["all"] = "all"
    scale: Scale = 1.0
    alignment: Literal["full"] = "full"
    share: float = Field(0.1, gt=0, lt=1)
    """Share of the run's tokens for layer alignment; the paper uses 1 GB of 10 GB."""

    @model_validator(mode="after")
    def _as_published(self) -> "EloPaper":
        if self.also_train or self.scale != 1.0 or self.module != "layer":
            raise ValueError("elo_paper takes no also_train, scale or module; to change them, write method: elo")
        return self
