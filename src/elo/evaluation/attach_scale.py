"""How much of the trained change to attach: the scale at which the whole model predicts unseen rows best."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError
from elo.evaluation.scoring import batch_tokens, evaluating, forward_logits, rope_regime, takes_position_ids, token_nats
from elo.model.provenance import PROVENANCE_KEY
from elo.model.surgery import attach_layers, detach_layers

_COARSE, _FINE = 0.25, 0.125
_BATCH_TOKENS = 2048


def search_scale(
    model: PreTrainedModel,
    detached: PreTrainedModel,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    include: Sequence[str] = (),
) -> tuple[float, dict[float, float]]:
    """Try scales of `attach_layers`, eighths above 0 up to 1, each by a forward pass over `rows`.

    Training layers in a shallow model moves them further than the whole model wants them: an interpolation between
    where they were and where they went is often better than either (compare WiSE-FT, arXiv 2109.01903).

    Args:
        model: the base; as it was afterwards.
        detached: its trained layers.
        rows: by language, packed rows that `detached` was not trained on, `input_ids`, `shift_labels` and
            `position_ids` of [T]. Each language counts alike: what is forgotten weighs as much as what is learned.
        include: parts outside the layers that are attached with them.

    Returns:
        The best scale, and nats per token by scale that was tried, the mean over languages; finite ones alone.

    Raises:
        EloError: the attached model's loss is finite at no scale.
    """
    original = detach_layers(model, getattr(detached.config, PROVENANCE_KEY)["layers"])

    def attempt(scale: float) -> float:
        attach_layers(model, detached, scale=scale, include=include)
        try:
            return sum(_nats_per_token(model, each) for each in rows.values()) / len(rows)
        finally:
            attach_layers(model, original, include=include)

    return lowest_scale(attempt)


def lowest_scale(nats: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """A scale, in eighths above 0 and up to 1, where `nats` is low, and its value wherever it was asked for.

    Between where layers were and where they went the loss falls and then rises (in every search that was looked at), so
    the quarters are walked downhill from the middle, and then the eighth on the lower side of the best is tried: four
    values, or five where the first quarter is the best. Not a number counts as infinite.

    Raises:
        EloError: no value is finite.
    """
    tried: dict[float, float] = {}

    def at(scale: float) -> float:
        if scale not in tried:
            value = nats(scale)
            tried[scale] = inf if isnan(value) else value
        return tried[scale]

    best, step = (0.75, _COARSE) if at(0.75) < at(0.5) else (0.5, -_COARSE)
    while 0 < best + step <= 1 and at(best + step) < at(best):
        best += step
    beside: tuple[float, ...] = (best + _FINE, best - _FINE)
    # The side whose quarter is lower. Of the least quarter either: 0, the base itself, is never tried.
    if best > _COARSE:
        lower = min((best - _COARSE, best + _COARSE), key=lambda scale: tried.get(scale, inf))
        beside = ((best + lower) / 2,)
    for scale in beside:
        if at(scale) < at(best):
            break
    finite = {scale: value for scale, value in sorted(tried.items()) if value < inf}
    if not finite:
        raise EloError(
            "elo.scale: with what was trained attached the model's loss is not finite, at none of the scales "
            f"{', '.join(f'{scale:g}' for scale in sorted(tried))}; lower elo_pretraining.learning_rate"
        )
    return min(finite, key=finite.__getitem__), finite


def _nats_per_token(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    names = ["input_ids", "attention_mask", *(["position_ids"] if takes_position_ids(model) else [])]
    names = [name for name in names if name in rows[0]]
    length = len(rows[0]["input_ids"])
    together = max(1, min(_BATCH_TOKENS, batch_tokens(model)) // length)
    if rope_regime(model.config, length):
        together = 1
    nats, tokens = 0.0, 0
    with evaluating(model) as device:
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            *inputs, labels = (
                torch.stack([torch.as_tensor(row[name]) for row in batch]).to(device)
                for name in (*names, "shift_labels")
            )
            logits = forward_logits(model, **dict(zip(names, inputs, strict=True)))
            nats += float(token_nats(logits, labels).sum())
            tokens += int((labels != IGNORE_INDEX).sum())
    return nats / tokens
