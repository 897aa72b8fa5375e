"""Attention that never crosses a document boundary inside a packed sequence.

The SDPA path of transformers achieves this with a block-diagonal T x T mask, derived from `position_ids` that restart
at each document. The mask works everywhere, but it rules out the flash kernel on CUDA, and all pairs of tokens are
computed. `elo_varlen` instead concatenates the sequences and attends within each document: with
`torch.nn.attention.varlen` on CUDA, and one document at a time on a CPU.
Shapes: B sequences, T tokens per sequence, S = B x T, H heads, K key-value heads, D head width.
"""

from inspect import signature
from itertools import groupby
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from elo.checkpoint.architecture import is_recurrent, layers_of
from elo.errors import EloError
from elo.evaluate.scoring import evaluating, rope_limit, takes_position_ids
from elo.store.processes import from_main

VARLEN = "elo_varlen"
# Tokens per sequence from which elo_varlen is used on a CPU. At this length it takes half as long as the mask.
_CPU_VARLEN_FROM = 512


def document_starts(position_ids_BT: Tensor) -> tuple[Tensor, int]:
    """Return where documents start in the concatenated sequences, and the length of the longest document.

    The boundaries are int32 [documents + 1]; the last one is the total number of tokens.
    """
    starts = (position_ids_BT.flatten() == 0).nonzero().squeeze(1)
    end = torch.tensor([position_ids_BT.numel()], device=starts.device)
    boundaries = torch.cat([starts, end]).to(torch.int32)
    return boundaries, int(boundaries.diff().max())


def varlen_attention(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within documents, as an attention function for transformers.

    Args:
        sliding_window: number of tokens that a token attends to, including itself; None is unlimited.
        cu_seq_lens_q: boundaries from `document_starts`.
        max_length_q: upper bound of the document lengths.

    Returns:
        The output [1, S, H, D], and None in place of attention weights.

    Raises:
        ValueError: the scores are soft-capped, there are attention sinks, or the boundaries are missing.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{VARLEN} supports neither soft-capped scores nor attention sinks")
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{VARLEN} needs cu_seq_lens_q and max_length_q, which PackedCollator(varlen=True) adds")
    if not query_1HSD.is_cuda:
        return _document_by_document(query_1HSD, key_1KSD, value_1KSD, cu_seq_lens_q, scaling, sliding_window), None
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query_1HSD, key_1KSD, value_1KSD))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    # PyTorch 2.11 lacks `enable_gqa` and always accepts fewer key heads than query heads.
    is_known = "enable_gqa" in signature(varlen_attn).parameters
    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if is_known else {}
    output_SHD = varlen_attn(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        **grouped,
    )
    assert isinstance(output_SHD, Tensor)
    return output_SHD.unsqueeze(0), None


@torch.compiler.disable
def _document_by_document(
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    boundaries: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Compute causal SDPA of each document. Consecutive documents of equal length are computed together."""
    groups = [(length, len(list(run))) for length, run in groupby(boundaries.diff().tolist())]
    if key_1KSD.shape[1] != query_1HSD.shape[1]:
        repeats = query_1HSD.shape[1] // key_1KSD.shape[1]
        key_1KSD, value_1KSD = (t.repeat_interleave(repeats, dim=1) for t in (key_1KSD, value_1KSD))
    sizes = [length * count for length, count in groups]
    outputs = []
    pieces = (tensor.split(sizes, dim=2) for tensor in (query_1HSD, key_1KSD, value_1KSD))
    for (length, _), *piece in zip(groups, *pieces, strict=True):
        query, key, value = (t.squeeze(0).unflatten(1, (-1, length)).transpose(0, 1) for t in piece)
        mask = None
        if sliding_window is not None and sliding_window < length:
            distance_TT = torch.arange(length).unsqueeze(1) - torch.arange(length)
            mask = (distance_TT >= 0) & (distance_TT < sliding_window)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)


def choose_attention(
    model: PreTrainedModel,
    sequence_length: int,
    requested: str = "auto",
    autocast_dtype: torch.dtype | None = None,
) -> str:
    """Set the model's attention for packed training and return its name.

    Args:
        sequence_length: number of tokens in a sequence.
        requested: name of an attention in transformers, `elo_varlen` or `auto`. `auto` chooses `elo_varlen` if it is
            faster (on CUDA with autocast, and on a CPU for long sequences) and if a trial on this model and device
            agrees with the model's current attention. Otherwise it keeps the current one.
        autocast_dtype: dtype of autocast in training; None trains in the model's dtype.

    Raises:
        EloError: the model does not support the requested attention.
    """
    current = model.config._attn_implementation or "eager"
    if requested != "auto":
        if requested == VARLEN and not _agrees(model, sequence_length, autocast_dtype):
            raise EloError(
                f"attn_implementation: {VARLEN} does not support the attention of {model.config.model_type} "
                "(soft-capped scores, attention sinks or other masks); write auto"
            )
        try:
            model.set_attn_implementation(requested)
        except (ValueError, ImportError) as error:
            raise EloError(
                f"attn_implementation: this model cannot use {requested!r} here ({error}); write auto, sdpa or eager"
            ) from None
        return requested
    pays = autocast_dtype is not None if model.device.type == "cuda" else sequence_length >= _CPU_VARLEN_FROM
    if current in ("sdpa", "eager") and pays and _agrees(model, sequence_length, autocast_dtype):
        model.set_attn_implementation(VARLEN)
        return VARLEN
    return current


def require_own_positions(
    config: PreTrainedConfig, sequence_length: int, *, packed: bool, batch_size: int, section: str = ""
) -> None:
    """Raise EloError if rotary frequencies or sparse attention would depend on the other documents in a batch.

    Args:
        packed: whether sequences contain several documents.
        batch_size: number of sequences in a micro-batch.
        section: section of the configuration that has `per_device_train_batch_size`, for the message.
    """
    limit = rope_limit(config)
    if limit is None or sequence_length <= limit or not (packed or batch_size > 1):
        return
    size = f"{section}.per_device_train_batch_size".removeprefix(".")
    keys = [*(["data.packing: false"] if packed else []), *([f"{size}: 1"] if batch_size > 1 else [])]
    raise EloError(
        f"{'data.packing' if packed else size}: beyond {limit:,} positions the rotary embedding or sparse attention "
        f"of this {config.model_type} model depends on the whole batch, so documents in a batch affect "
        f"each other; write {' and '.join(keys)}, or data.sequence_length: {limit} or less"
    )


class _MetaValuesAreZero(TorchDispatchMode):
    """Return zero or False, instead of raising, when code reads the value of a tensor on the meta device."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def separates_documents(model: PreTrainedModel) -> bool:
    """Return whether a model on the meta device can keep packed documents apart by position ids that restart."""
    return not is_recurrent(model) and takes_position_ids(model) and not _ignores_document_starts(model)


def _ignores_document_starts(model: PreTrainedModel) -> bool:
    """Return whether a model on the meta device ignores restarting position ids in its attention mask.

    Some multimodal wrappers (Qwen2.5-VL, GLM-4V) check for restarts only in position ids of four rows, for text and
    image grids, and some older families (GPT, BioGPT) do not check at all. The model runs up to its first decoder
    layer. If it fails before, the answer is False, because training checks again with weights.
    """
    looked: list[bool] = []
    find_starts = masking_utils.find_packed_sequence_indices

    def look(position_ids: Tensor) -> None:
        looked.append(True)

    def stop(*_: Any) -> NoReturn:
        raise StopIteration

    ids, positions = torch.zeros(1, 8, dtype=torch.long), torch.arange(4).repeat(1, 2)
    hook = layers_of(model)[0].register_forward_pre_hook(stop)
    masking_utils.find_packed_sequence_indices = look
    try:
        with torch.no_grad(), _MetaValuesAreZero():
            model(input_ids=ids.to("meta"), position_ids=positions.to("meta"), use_cache=False)
    except StopIteration:
        return not looked
    except Exception:  # models can raise any type without data
        return False
    finally:
        masking_utils.find_packed_sequence_indices = find_starts
        hook.remove()
    return False


def _agrees(model: PreTrainedModel, sequence_length: int, autocast_dtype: torch.dtype | None) -> bool:
    """Run `_varlen_agrees` in the main process, because under FSDP only rank 0 has weights at this point."""
    return from_main(lambda: _varlen_agrees(model, sequence_length, autocast_dtype))


def _varlen_agrees(model: PreTrainedModel, sequence_length: int, autocast_dtype: torch.dtype | None) -> bool:
    """Return whether packed documents have the same hidden states with `elo_varlen` as with the current attention.

    This detects unusual masks and unsupported head widths. One document of the trial exceeds the sliding window, unless
    the window is as long as a sequence.
    """
    text_config = model.config.get_text_config()
    if getattr(text_config, "attention_chunk_size", None) or getattr(text_config, "attention_dropout", 0.0):
        return False
    window = getattr(text_config, "sliding_window", None) or 0
    lengths = (5, 11, window + 9 if 0 < window < sequence_length else 7)
    tolerance = 1e-3 if autocast_dtype is None else 0.03
    try:
        with evaluating(model, None, autocast_dtype) as device:
            position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
            ids = (torch.arange(sum(lengths), device=device) * 7 % text_config.vocab_size).unsqueeze(0)
            boundaries, longest = document_starts(position_ids)
            expected = model.base_model(input_ids=ids, position_ids=position_ids, use_cache=False)[0].float()
            model.set_attn_implementation(VARLEN)
            got = model.base_model(
                input_ids=ids,
                position_ids=position_ids,
                use_cache=False,
                cu_seq_lens_q=boundaries,
                cu_seq_lens_k=boundaries,
                max_length_q=longest,
                max_length_k=longest,
            )[0].float()
        return bool(((got - expected).norm() / expected.norm()).item() < tolerance)
    except (RuntimeError, ValueError, TypeError, ImportError):
        return False
