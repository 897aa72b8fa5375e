"""How much of the trained change to attach: the scale at which the whole model predicts unseen rows best."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.data.packing import IGNORE_INDEX
from elo.evaluation.scoring import evaluating, forward_logits, takes_position_ids, token_nats
from elo.model.provenance import PROVENANCE_KEY
from elo.model.surgery import attach_layers, detach_layers

_COARSE = (0.25, 0.5, 0.75, 1.0)
_FINE = 0.125


def search_scale(
    model: PreTrainedModel,
    detached: PreTrainedModel,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    include: Sequence[str] = (),
) -> tuple[float, dict[float, float]]:
    """Try scales of `attach_layers` by forward passes: quarters first, then the eighths beside the best.

    Training layers in a shallow model moves them further than the whole model wants them: an interpolation between
    where they were and where they went is often better than either (compare WiSE-FT, arXiv 2109.01903).

    Args:
        model: the base; as it was afterwards.
        detached: its trained layers.
        rows: by language, packed rows that `detached` was not trained on, `input_ids`, `shift_labels` and
            `position_ids` of [T]. Each language counts alike: what is forgotten weighs as much as what is learned.
        include: parts outside the layers that are attached with them.

    Returns:
        The best scale, and nats per token by scale, the mean over languages; 0 is the base itself.
    """
    original = detach_layers(model, getattr(detached.config, PROVENANCE_KEY)["layers"])
    tried: dict[float, float] = {}

    def attempt(scale: float) -> None:
        if scale > 0:
            attach_layers(model, detached, scale=scale, include=include)
        try:
            tried[scale] = sum(_nats_per_token(model, each) for each in rows.values()) / len(rows)
        finally:
            if scale > 0:
                attach_layers(model, original, include=include)

    for scale in (0.0, *_COARSE):
        attempt(scale)
    best = _best(tried)
    for scale in (best - _FINE, best + _FINE):
        if 0 < scale < max(_COARSE):
            attempt(scale)
    # Nothing better than the base may be found; what was trained is then attached at the smallest scale all the same.
    return _best({scale: nats for scale, nats in tried.items() if scale > 0}), dict(sorted(tried.items()))


def _best(tried: dict[float, float]) -> float:
    key: Callable[[float], float] = tried.__getitem__
    return min(tried, key=key)


def _nats_per_token(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    names = ["input_ids", *(["position_ids"] if takes_position_ids(model) else [])]
    nats, tokens = 0.0, 0
    with evaluating(model) as device:
        for row in rows:
            inputs = {name: torch.as_tensor(row[name]).unsqueeze(0).to(device) for name in names}
            if "attention_mask" in row:
                inputs["attention_mask"] = torch.as_tensor(row["attention_mask"]).unsqueeze(0).to(device)
            labels = torch.as_tensor(row["shift_labels"]).unsqueeze(0).to(device)
            nats += float(token_nats(forward_logits(model, **inputs), labels).sum())
            tokens += int((labels != IGNORE_INDEX).sum())
    return nats / tokens
