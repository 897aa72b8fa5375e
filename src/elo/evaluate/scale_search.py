"""Search the share of the trained change with which the whole model predicts unseen text best.

Training on part of a model, or on little text, often moves weights too far for the whole model. An interpolation
between the weights before and after is then better than either (WiSE-FT, arXiv 2109.01903).
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture, modules_of
from elo.checkpoint.new_rows import read_new_rows
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError
from elo.evaluate.scoring import batch_tokens, evaluating, forward_logits, rope_regime, takes_position_ids, token_nats
from elo.surgery.in_memory import blend

_COARSE = 0.25
_BATCH_TOKENS = 2048


def search_scale(
    base: PreTrainedModel,
    trained: PreTrainedModel,
    sequences: Mapping[str, Sequence[dict[str, Any]]],
    autocast_dtype: torch.dtype | None = None,
) -> tuple[float, dict[float, float]]:
    """Find the scale of base + scale x (trained - base) with the lowest loss, among the eighths from 0 to 1.

    Args:
        base: model before training.
        trained: model after training, with the same parameters. This function changes its weights.
        sequences: packed sequences that training did not see, by language: `input_ids`, `shift_labels` and
            `position_ids`, each of shape [T]. Languages have the same weight, so forgetting counts as much as learning.
        autocast_dtype: compute dtype; None is the model's own.

    Returns:
        The best scale, and the nats per token of each scale that was tried and has a finite loss, as the mean over
        languages.

    Raises:
        EloError: the loss is not finite at any scale.
    """
    before = dict(base.named_parameters())
    rows = read_new_rows(trained.config)
    find_architecture(trained)
    embeddings = {id(each) for module in modules_of(trained, ("embedding", "head")) for each in module.parameters()}
    moved = [
        (parameter, before[name].detach(), parameter.detach().clone(), id(parameter) in embeddings)
        for name, parameter in trained.named_parameters()
        if not torch.equal(parameter, before[name])
    ]

    def attempt(scale: float) -> float:
        with torch.no_grad():
            for parameter, old, new, is_embedding in moved:
                parameter.copy_(blend(old, new, scale, rows.start if rows and is_embedding else None))
        return sum(_nats_per_token(trained, each, autocast_dtype) for each in sequences.values()) / len(sequences)

    return lowest_scale(attempt)


def lowest_scale(nats: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return an eighth from 0 to 1 at which `nats` is low, and all finite values that were computed.

    From the weights before training to those after it, the loss falls and then rises (in every search so far). So the
    quarters are searched downhill from the middle. Then the eighth next to the best quarter is tried, on the side of
    its lower neighbour. 0, the model before training, is always tried: where it is best, training does harm. This
    computes five values. NaN counts as infinite.

    Raises:
        EloError: no value is finite.
    """
    tried: dict[float, float] = {}

    def at(scale: float) -> float:
        if scale not in tried:
            value = nats(scale)
            tried[scale] = inf if isnan(value) else value
        return tried[scale]

    at(0.0)
    best, step = (0.75, _COARSE) if at(0.75) < at(0.5) else (0.5, -_COARSE)
    while 0 <= best + step <= 1 and at(best + step) < at(best):
        best += step
    lower = min((best - _COARSE, best + _COARSE), key=lambda scale: tried.get(scale, inf))
    at((best + lower) / 2)
    finite = {scale: value for scale, value in sorted(tried.items()) if value < inf}
    if not finite:
        raise EloError(
            "method.scale: the model's loss is not finite at any of the scales "
            f"{', '.join(f'{scale:g}' for scale in sorted(tried))}; lower training.learning_rate"
        )
    return min(finite, key=finite.__getitem__), finite


def _nats_per_token(
    model: PreTrainedModel, sequences: Sequence[dict[str, Any]], autocast_dtype: torch.dtype | None
) -> float:
    names = ["input_ids", "attention_mask", *(["position_ids"] if takes_position_ids(model) else [])]
    names = [name for name in names if name in sequences[0]]
    length = len(sequences[0]["input_ids"])
    together = max(1, min(_BATCH_TOKENS, batch_tokens(model)) // length)
    if rope_regime(model.config, length):
        together = 1
    nats, tokens = 0.0, 0
    with evaluating(model, None, autocast_dtype) as device:
        for start in range(0, len(sequences), together):
            batch = sequences[start : start + together]
            *inputs, labels = (
                torch.stack([torch.as_tensor(row[name]) for row in batch]).to(device)
                for name in (*names, "shift_labels")
            )
            logits = forward_logits(model, **dict(zip(names, inputs, strict=True)))
            nats += float(token_nats(logits, labels).sum())
            tokens += int((labels != IGNORE_INDEX).sum())
    return nats / tokens
