"""Attention that never crosses a document boundary inside a packed row.

On CPU (and wherever nothing better is there) transformers' own SDPA path does it: from `position_ids` that restart at
each document it builds the block-diagonal causal mask. On CUDA that T x T mask costs the flash kernel, so packed rows
are laid end to end instead and `torch.nn.attention.varlen` is told where each document starts.
Shapes: B rows, T tokens a row, S = B x T, H heads, K key-value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from elo.errors import EloError

VARLEN = "elo_varlen"


def document_starts(position_ids_BT: Tensor) -> tuple[Tensor, int]:
    """Cumulative document lengths (int32, documents + 1) of rows laid end to end, and the longest document."""
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
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers attention function over `torch.nn.attention.varlen`; returns [1, S, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{VARLEN} needs cu_seq_lens_q and max_length_q, as PackedCollator(varlen=True) makes them")
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query_1HSD, key_1KSD, value_1KSD))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
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
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output_SHD, Tensor)
    return output_SHD.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)


def choose_attention(model: PreTrainedModel, requested: str = "auto") -> str:
    """Set the model's attention for packed training and return the name of what was set.

    `auto` takes `elo_varlen` on CUDA when a trial on this model and device gives what SDPA gives, SDPA elsewhere;
    models that only have an eager path keep it.

    Raises:
        EloError: the model does not have the attention that was asked for by name.
    """
    current = model.config._attn_implementation or "eager"
    if requested != "auto":
        try:
            model.set_attn_implementation(requested)
        except (ValueError, ImportError) as error:
            raise EloError(
                f"attn_implementation: this model cannot use {requested!r} here ({error}); write auto, sdpa or eager"
            ) from None
        return requested
    if current in ("sdpa", "eager") and model.device.type == "cuda" and _varlen_agrees(model):
        model.set_attn_implementation(VARLEN)
        return VARLEN
    return current


@torch.no_grad()
def _varlen_agrees(model: PreTrainedModel) -> bool:
    """Whether two packed documents give the same hidden states through `elo_varlen` as through the present path.

    Soft-capped scores, attention sinks and head widths that the kernel does not take all show here.
    """
    before = model.config._attn_implementation
    device = model.device
    position_ids = torch.cat([torch.arange(5), torch.arange(11)]).unsqueeze(0).to(device)
    ids = (torch.arange(16, device=device) * 7 % model.config.get_text_config().vocab_size).unsqueeze(0)
    boundaries, longest = document_starts(position_ids)
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16):
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
        return bool(((got - expected).norm() / expected.norm()).item() < 0.03)
    except (RuntimeError, ValueError, TypeError, ImportError):
        return False
    finally:
        model.set_attn_implementation(before)
        model.train(training)
