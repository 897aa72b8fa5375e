"""Low-rank adapters (LoRA, arXiv 2106.09685) of the package peft, merged into the weights at the end."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import PLAIN_LINEAR, LayerModule, layers_of, modules_in
from elo.errors import EloError
from elo.methods.base import Phase, Setup, TrainedParts, register, train_parts
from elo.train.prepared import Prepared

_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Families whose fused kernels read the weight of `out_proj` and not its adapter. peft refuses them too."""


@register
class Lora(TrainedParts):
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

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("lora", "adapted", also_train=self.also_train, lora_rank=self.rank, learning_rate=5e-4),)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        ranks = self.lora_ranks(phase, len(layers_of(model)))
        scale = self.alpha / self.rank
        first_row = self.first_row(model)
        return add_adapters(
            model, phase, setup.seed, ranks, scale, module=self.module, dropout=self.dropout, first_row=first_row
        )


def add_adapters(
    model: PreTrainedModel,
    phase: Phase,
    seed: int,
    ranks: Sequence[int],
    scale: float,
    *,
    module: LayerModule = "layer",
    dropout: float = 0.0,
    first_row: int = 0,
) -> Prepared:
    """Freeze `model`, add trainable adapters and unfreeze `phase.also_train`. `fold` merges the adapters.

    Args:
        ranks: rank of the adapters of each decoder layer; 0 for none.
        scale: factor of the adapters' output, the same for all ranks.
        module: part of the layers that gets adapters.
        dropout: dropout probability of the adapters' inputs.
        first_row: first row of embedding and head to train, if `phase.also_train` names them.
    """
    from peft import LoraConfig, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    # For some mixture-of-experts families peft replaces the target modules by the fused experts. It finds the family in
    # `model.config`, so it gets a module without one.
    whole = nn.ModuleDict({"model": model})
    names = {id(each): name for name, each in whole.named_modules()}
    rank_of = {
        names[id(linear)]: rank
        for layer, rank in zip(layers_of(model), ranks, strict=True)
        for part in modules_in(layer, module)
        for linear in part.modules()
        if rank and type(linear) in PLAIN_LINEAR
    }
    if model.config.model_type in _MAMBA and any(name.endswith(".out_proj") for name in rank_of):
        raise EloError(
            f"method: {model.config.model_type} cannot be trained with adapters, because its fused kernels ignore "
            "them; choose a method without adapters, for example full, lisa or frozen"
        )
    if not rank_of:
        raise EloError(f"method.module: {module}: no linear layer would get an adapter; choose another module or rank")
    patterns = {f"^{re.escape(name)}$": rank for name, rank in rank_of.items()}
    config = LoraConfig(
        r=max(ranks),
        rank_pattern=patterns,
        lora_alpha=scale * max(ranks),  # type: ignore[arg-type]
        alpha_pattern={pattern: scale * rank for pattern, rank in patterns.items()},
        lora_dropout=dropout,
        target_modules=list(rank_of),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # a resumed run must start from the same adapters
        tuner = LoraModel(whole, {"default": config}, "default")
    for each in tuner.modules():
        if isinstance(each, BaseTunerLayer):
            # Autocast casts the inputs. peft would first make an fp32 copy of each.
            each.cast_input_dtype_enabled = False  # type: ignore[assignment]
    train_parts(model, phase.also_train)

    def fold() -> None:
        tuner.merge_and_unload(safe_merge=True)

    def fold_parts() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        adapted = {name: each for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}
        tuner.unload()
        return lambda part: _merged(part, adapted)

    return Prepared(first_row=first_row, fold=fold, fold_parts=fold_parts)


def _merged(part: dict[str, Tensor], adapted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a part of a model with the adapters in it merged.

    Args:
        adapted: peft's layers by name, for the scale and orientation of their weights.
    """
    merged = {}
    for name, tensor in part.items():
        owner, found, own = name.partition(".base_layer.")
        if found and own == "weight":
            change = part[f"{owner}.lora_B.default.weight"] @ part[f"{owner}.lora_A.default.weight"]
            change = (change.t() if adapted[owner].fan_in_fan_out else change) * adapted[owner].scaling["default"]
            tensor = tensor + change.to(tensor.dtype)
        if ".lora_" not in name:
            merged[f"{owner}.{own}" if found else name] = tensor
    return merged
