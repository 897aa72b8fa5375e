"""Shared by all measures: run a model without changing it, and compute the nats of each token.

Shapes: B sequences, T positions, V vocabulary entries.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from elo.checkpoint.architecture import is_recurrent
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError
from elo.log import Progress

Ids: TypeAlias = Sequence[int] | np.ndarray
"""Token ids, or labels, of one sequence."""

LOGITS_BYTES = 1 << 30
"""Maximum memory of the fp32 logits of a batch, in bytes; one sequence is always allowed."""

MAX_BATCH_TOKENS = 1 << 14
_CHUNK_BYTES = 1 << 28
_TRAINING_ATTENTION = "elo_"


@contextmanager
def evaluating(
    model: PreTrainedModel, device: torch.device | str | None = None, autocast_dtype: torch.dtype | None = None
) -> Iterator[torch.device]:
    """Put a model into evaluation mode without gradients, and restore its mode and attention afterwards.

    SDPA replaces the attention of ELO's training loop (`elo_...`), which needs arguments that only training batches
    have.

    Args:
        model: any causal LM.
        device: device to move the model to, where it stays; None leaves it where it is.
        autocast_dtype: compute dtype, for a model with weights in another dtype; None computes in the model's own.

    Yields:
        The device for inputs.
    """
    if device is not None:
        nn.Module.to(model, device)
    place = embedding_weight(model).device
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if (attention or "").startswith(_TRAINING_ATTENTION):
        model.set_attn_implementation("sdpa")
    try:
        with (
            torch.no_grad(),
            torch.autocast(place.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        ):
            yield place
    finally:
        model.train(was_training)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the weight [V, width] of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embedding; token ids must be smaller."""
    weight = embedding_weight(model)
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # DeepSpeed's ZeRO-3 leaves an empty tensor in its place


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return the model's number of positions (`max_position_embeddings`); None if its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def rope_regime(config: PreTrainedConfig, length: int) -> int:
    """Return the regime of a sequence of this length; only sequences of the same regime may share a batch.

    With `longrope` and `dynamic` rotary embeddings, the longest sequence in a batch determines the frequencies of all.
    The regime is 0 up to the original number of positions. Beyond it, the regime is 1 if there is one other set of
    frequencies, and the length if every length has its own. The latter also holds for sparse attention (`index_topk`),
    where the position in the batch determines which of equally good tokens are attended to.
    """
    found = 0
    for rope, original in _ropes(config.get_text_config(decoder=True)):
        if length > original:
            found = max(found, length if "dynamic" in rope else 1)
    return found


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the number of positions up to which a batch has regime 0 (`rope_regime`); None if there is no limit."""
    return min((original for _, original in _ropes(config.get_text_config(decoder=True))), default=None)


def _ropes(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield kind and limit of each rotary embedding, or selection of tokens, that depends on the length."""
    if isinstance(selected := getattr(config, "index_topk", None), int):
        yield "dynamic selection", selected
    block = getattr(config, "index_block_size", None)  # MiniMax M3 counts blocks from the start of a sequence
    if isinstance(block, int) and any("sparse" in kind for kind in getattr(config, "layer_types", None) or ()):
        yield "dynamic selection", block
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    positions = getattr(config, "max_position_embeddings", None)
    for rope in each:
        kind = str(rope.get("rope_type", rope.get("type", "")))
        original = positions
        if "dynamic" not in kind:
            if not {"long_factor", "long_mscale"} & rope.keys():
                continue
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", positions
            )
        if isinstance(original, int):
            yield kind, original


def batch_tokens(model: PreTrainedModel) -> int:
    """Return the number of positions in a batch whose fp32 logits stay within `LOGITS_BYTES`."""
    return max(1, min(MAX_BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary_size(model))))


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Return whether the forward method of the model's class, which a trainer may have wrapped, takes position ids."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def keeps_apart(model: PreTrainedModel, length: int) -> bool:
    """Return whether sequences can be packed or padded to `length` positions without changing their logits."""
    limit = rope_limit(model.config)
    return takes_position_ids(model) and not is_recurrent(model) and (limit is None or length <= limit)


def forward_logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Return logits [B, T, V]. No key-value cache is used, because it would turn off the isolation of documents."""
    return model(**inputs, use_cache=False).logits


def token_nats(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each label.

    Args:
        logits_BTV: [B, T, V] in any floating-point dtype; the softmax is computed in fp32, in chunks.
        labels_BT: [B, T] int64, already shifted: the token that follows position t, or `IGNORE_INDEX`.

    Returns:
        [B, T] float64 on the CPU, in nats; 0 where the label is `IGNORE_INDEX`.
    """
    logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
    step = max(1, _CHUNK_BYTES // (4 * logits_NV.shape[1]))
    nats = [
        functional.cross_entropy(
            logits_NV[start : start + step].float(),
            labels_N[start : start + step],
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        for start in range(0, len(labels_N), step)
    ]
    return torch.cat(nats).to("cpu", torch.float64).view(labels_BT.shape)


def right_padded(rows: Sequence[tuple[Ids, Ids]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask and labels of (ids, labels) pairs, int64 [B, T] each, padded at the end."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    attended_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORE_INDEX)
    for row, (ids, labels) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.as_tensor(ids)
        attended_BT[row, : len(ids)] = 1
        labels_BT[row, : len(ids)] = torch.as_tensor(labels)
    return ids_BT, attended_BT, labels_BT


def summed_nats(
    model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids]], place: torch.device, bar: Progress, batch_size: int | None
) -> list[float]:
    """Return the summed nats of the labels of each sequence.

    Args:
        model: causal LM in evaluation mode (`evaluating`).
        rows: (ids, labels) of each sequence; labels are already shifted, as in `token_nats`.
        place: device for inputs.
        bar: progress bar, which counts sequences.
        batch_size: sequences per forward pass; None takes as many as keep fp32 logits within 1 GiB.
    """
    lengths = [len(ids) for ids, _ in rows]
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    nats = [0.0] * len(rows)
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        batch = order[start : start + (batch_size or max(1, batch_tokens(model) // longest))]
        regime = rope_regime(model.config, longest)
        batch = [index for index in batch if rope_regime(model.config, lengths[index]) == regime]
        ids_BT, attended_BT, labels_BT = right_padded([rows[index] for index in batch])
        logits_BTV = forward_logits(model, input_ids=ids_BT.to(place), attention_mask=attended_BT.to(place))
        for index, cost in zip(batch, token_nats(logits_BTV, labels_BT.to(place)).sum(1).tolist(), strict=True):
            nats[index] = cost
        start += len(batch)
        bar.advance(len(batch))
    return nats


def check_ids(largest: int, model: PreTrainedModel, what: str) -> None:
    """Check that the model has an embedding for all token ids. On a GPU, a larger id would abort the process.

    Args:
        largest: largest token id.
        what: name of the text, for the message.

    Raises:
        EloError: the embedding has no row `largest`.
    """
    rows = vocabulary_size(model)
    if largest >= rows:
        raise EloError(
            f"{what}: token id {largest} is beyond the model's embedding ({rows} rows); "
            "tokenise with the tokenizer that belongs to this model"
        )
