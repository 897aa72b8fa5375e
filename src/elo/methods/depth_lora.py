"""Adapters whose rank depends on depth, after DAMA (arXiv 2602.01008)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from elo.checkpoint.architecture import layers_of
from elo.errors import EloError
from elo.methods.base import Method, Phase, Setup, register
from elo.methods.lora import add_adapters
from elo.train.prepared import Prepared


@register
class DepthLora(Method):
    """Train low-rank adapters with a different rank for each decoder layer, with everything else frozen.

    DAMA finds that the adaptability of layers is U-shaped over depth, and gives the middle layers the lowest ranks. Its
    initialisation of the adapters by singular vectors is not part of this method.
    """

    label: ClassVar[str] = "Depth-aware LoRA"
    uses_layers: ClassVar[bool] = False
    name: Literal["depth_lora"] = "depth_lora"
    profile: Literal["u_shaped", "probe"] | tuple[int, ...] = "u_shaped"
    """Rank over depth. `u_shaped` falls from `rank` to `min_rank` over the first third of the layers and rises again
    over the last. `probe` follows each layer's adaptability (docs/probe.md). A list gives one rank per layer; 0
    means no adapter."""
    rank: int = Field(32, gt=0)
    """Highest rank."""
    min_rank: int = Field(4, ge=0)
    """Lowest rank of `u_shaped` and `probe`; 0 means no adapter."""
    alpha: int = Field(64, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / `rank`, on every layer alike."""

    @model_validator(mode="after")
    def _check_ranks(self) -> "DepthLora":
        if self.min_rank > self.rank:
            raise ValueError(f"min_rank: got {self.min_rank}, which is above rank; write at most {self.rank}")
        if isinstance(self.profile, tuple) and (not any(self.profile) or min(self.profile) < 0):
            raise ValueError(f"profile: got {list(self.profile)}; write ranks of 0 or more, at least one above 0")
        return self

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("depth_lora", "adapted", lora_rank=self.rank, learning_rate=5e-4),)

    @property
    def probe_criterion(self) -> str | None:
        return "adaptability" if self.profile == "probe" else None

    def with_scores(self, scores: Sequence[float]) -> "DepthLora":
        low, high = min(scores), max(scores)
        spread = self.rank - self.min_rank
        ranks = tuple(self.min_rank + round(spread * (each - low) / ((high - low) or 1)) for each in scores)
        return self.model_copy(update={"profile": ranks})

    def lora_ranks(self, phase: Phase, num_layers: int) -> Sequence[int]:
        if isinstance(self.profile, tuple):
            if len(self.profile) != num_layers:
                raise EloError(
                    f"method.profile: has {len(self.profile)} ranks, but the model has {num_layers} decoder layers; "
                    "write one rank per layer"
                )
            return self.profile
        # Before the probe has scored the layers, `probe` is planned like `u_shaped`.
        spread = self.rank - self.min_rank
        ends = (min(index, num_layers - 1 - index) / (num_layers / 3) for index in range(num_layers))
        return [self.rank - round(spread * min(1.0, end)) for end in ends]

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        ranks = self.lora_ranks(phase, len(layers_of(model)))
        return add_adapters(model, phase, setup.seed, ranks, self.alpha / self.rank, module=self.module)
