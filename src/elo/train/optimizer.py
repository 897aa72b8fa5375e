"""Make the optimizer and the learning-rate schedule of a phase from their names in transformers."""

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import get_parameter_names

from elo.errors import EloError
from elo.train.embedding_rows import set_embeddings_apart
from elo.train.settings import TrainingSettings

_WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of parameter names that transformers excludes from weight decay."""


def make_optimizer(
    model: PreTrainedModel, settings: TrainingSettings, arguments: TrainingArguments, first_row: int
) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters that require gradients.

    Args:
        first_row: first trained row of embedding and head; 0 trains all rows.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _WITHOUT_DECAY))
    trained = [(name in decayed, each) for name, each in model.named_parameters() if each.requires_grad]
    groups: Any = [
        {"params": [each for decays, each in trained if decays], "weight_decay": settings.weight_decay},
        {"params": [each for decays, each in trained if not decays], "weight_decay": 0.0},
    ]
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if is_optimizer_factory(make):
        optimizer: torch.optim.Optimizer = make()(model, **options)
    else:
        for own in ("params", "optimizer_dict"):  # some optimizers, such as GaLore, group the parameters themselves
            groups = options.pop(own, groups)
        optimizer = make(groups, **options)
    if options.get("optim_bits") == 8:
        _keep_embeddings_in_fp32(model)
    if first_row or settings.embedding_learning_rate:
        set_embeddings_apart(optimizer, model, settings.embedding_learning_rate, first_row)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps: int) -> Any:
    """Return the learning-rate schedule of a phase of `steps` updates."""
    warmup = settings.warmup_steps
    return get_scheduler(
        settings.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=round(warmup * steps) if warmup < 1 else int(warmup),
        num_training_steps=steps,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs or None,
    )


def _keep_embeddings_in_fp32(model: PreTrainedModel) -> None:
    """Give embeddings 32-bit optimizer state in bitsandbytes, as transformers does."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def forget_overrides() -> None:
    """Reset bitsandbytes' list of parameters with 32-bit optimizer state.

    bitsandbytes keeps the list for the whole process, by position in the optimizer. Without a reset, the parameters at
    these positions would have 32-bit state in the next phase too, but not in a resumed run.
    """
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


def require_bitsandbytes() -> None:
    """Raise EloError if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise EloError(
            "optim: adamw_8bit needs bitsandbytes, which is not installed; "
            "run pip install 'elo-cpt[adamw8bit]', or write optim: adamw"
        ) from None
