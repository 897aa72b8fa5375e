"""Train embedding and head first, then every parameter, as EEVE does with a new vocabulary (arXiv 2402.14714)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from elo.checkpoint.new_rows import read_new_rows
from elo.methods.base import Method, Phase, Setup, register, select_layers
from elo.train.prepared import Prepared


@register
class EmbeddingsFirst(Method):
    """Train the new rows of embedding and head (all rows if none are new), then every parameter."""

    label: ClassVar[str] = "Embeddings first, then full CPT"
    uses_layers: ClassVar[bool] = False
    name: Literal["embeddings_first"] = "embeddings_first"
    full_share: float = Field(0.1, gt=0, lt=1)
    """Share of the run's tokens for the second phase."""

    @property
    def alignment_share(self) -> float:
        return self.full_share

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("embeddings", "frozen", "pretraining", also_train=("embedding", "head")),
            Phase("full", "trained", "alignment"),
        )

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        if phase.middle == "trained":
            return super().prepare(model, phase, setup)
        select_layers(model, (), phase.also_train)
        rows = read_new_rows(model.config)
        return Prepared(first_row=rows.start if rows else 0)

    def layers_at_once(self, phase: Phase, layers: Sequence[int], num_layers: int) -> Sequence[int]:
        return range(num_layers) if phase.middle == "trained" else ()
