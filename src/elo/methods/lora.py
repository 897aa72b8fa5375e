"""Low-rank adapters (LoRA, arXiv 2106.09685) of the package peft, merged into the weights at the end."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from elo.methods.base import Method, Phase, Setup, register, train_parts
from elo.train.prepared import Prepared
from elo.train.settings import Part


@register
class Lora(Method):
    """Train low-rank adapters on every linear layer of the decoder, and merge them at the end."""

    label: ClassVar[str] = "LoRA"
    uses_layers: ClassVar[bool] = False
    name: Literal["lora"] = "lora"
    rank: int = Field(32, gt=0)
    """Rank of the adapters."""
    alpha: int = Field(64, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapters' inputs."""
    also_train: tuple[Part, ...] = ()
    """Parts outside the layers that train in full beside the adapters. An extended vocabulary needs embedding and
    head."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("lora", "adapted", also_train=self.also_train, lora_rank=self.rank, learning_rate=5e-4),)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        return add_adapters(model, phase, setup.seed, alpha=self.alpha, dropout=self.dropout)


def add_adapters(model: PreTrainedModel, phase: Phase, seed: int, *, alpha: int, dropout: float = 0.0) -> Prepared:
    """Freeze `model`, add trainable adapters and unfreeze `phase.also_train`. `fold` merges the adapters."""
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=phase.lora_rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # a resumed run must start from the same adapters
        tuner = LoraModel(model, {"default": config}, "default")
    train_parts(model, phase.also_train)

    def fold() -> None:
        tuner.merge_and_unload(safe_merge=True)

    return Prepared(fold=fold)
