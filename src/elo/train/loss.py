"""Compute the LM head's cross-entropy, by default without holding all logits in memory at once.

Without the middle layers, the head and its loss are about half of the work of ELO pretraining, and the logits are most
of the activation memory.
Shapes: N tokens, C tokens of a chunk, D hidden width, V vocabulary, S losses (one for the last hidden states, and one
for each supervised internal layer).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.layer_outputs import LayerOutputs, final_norm
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError
from elo.evaluate.scoring import evaluating
from elo.store.processes import from_main
from elo.train.settings import CHUNK, HeadLoss

_SUMS_IN_FP32 = torch.__version__ >= "2.12"  # CUDA products of bf16 matrices can have fp32 output


@dataclass(frozen=True)
class LogitTransform:
    """The transform of logits after the head: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a config: the factor `logit_scale` (Cohere) or divisor `logits_scaling` (Granite)."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits_NV: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def require_transform(implementation: HeadLoss, transform: LogitTransform) -> None:
    """Raise EloError if an implementation of the head loss cannot transform the logits as a model does."""
    if implementation == "linear_cross_entropy" and transform != LogitTransform():
        raise EloError(
            "training.head_loss: linear_cross_entropy cannot scale or soft-cap logits as this model does; write chunked"
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute summed cross-entropies in nats, and their gradients, in the forward pass, one chunk of tokens at a time.

    Each chunk's logits are computed once, converted to their gradient in place and freed. The matmul FLOPs are the
    minimum: head forward, input gradient, and the weight gradient only if the head trains. Products are in the hidden
    states' dtype; the weight's gradient is summed in float32. Only one backward pass is possible.

    The hidden states are S blocks of N tokens, which share the labels. The outputs are the weighted sum of the blocks'
    losses, and the losses [S] without a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        transform: LogitTransform,
        chunk: int,
        first_row: int,
        weights: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        own_dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        weight_VD = weight_VD.to(hidden_ND.dtype)
        bias_V = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        nats_S = torch.zeros(len(weights), dtype=torch.float32, device=hidden_ND.device)
        count = labels_N.shape[0]
        for block, start in itertools.product(range(len(weights)), range(0, count, chunk)):
            stop = min(start + chunk, count)
            piece = slice(block * count + start, block * count + stop)
            hidden_CD, labels_C = hidden_ND[piece], labels_N[start:stop]
            kept_C1 = (labels_C != IGNORE_INDEX).unsqueeze(1)
            index_C1 = labels_C.clamp(min=0).unsqueeze(1)
            logits_CV = _logits(hidden_CD, weight_VD, bias_V)
            if transform.scale != 1.0:
                logits_CV *= transform.scale
            capped_CV = None
            if transform.softcap is not None:
                capped_CV = logits_CV.div_(transform.softcap).tanh_()
                logits_CV = transform.softcap * capped_CV
            target_C1 = logits_CV.gather(1, index_C1)
            largest_C1 = logits_CV.amax(-1, keepdim=True)
            grad_CV = logits_CV.sub_(largest_C1).exp_()
            mass_C1 = grad_CV.sum(-1, keepdim=True)
            nats_S[block] += torch.where(kept_C1, mass_C1.log() + largest_C1 - target_C1, 0.0).sum()
            if wants_hidden or wants_weight:
                # d(nats)/d(logits) = softmax - one-hot, then back through the softcap (1 - tanh^2) and the scale.
                factor_C1 = kept_C1 * (transform.scale * weights[block])
                grad_CV *= factor_C1 / mass_C1
                grad_CV.scatter_add_(1, index_C1, -factor_C1.to(grad_CV.dtype))
                if capped_CV is not None:
                    grad_CV *= capped_CV.square_().neg_().add_(1)
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(weight_VD.dtype)
                if grad_hidden_ND is not None:
                    torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[piece])
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD[first_row:], grad_CV[:, first_row:].t(), hidden_CD)
            del logits_CV, capped_CV, grad_CV  # free the memory before the next chunk
        # Not saved by autograd, which would keep them until the whole backward pass has ended.
        ctx.gradients = [(grad_hidden_ND, hidden_ND.dtype)]
        ctx.gradients += zip((grad_weight_VD, grad_bias_V), own_dtypes, strict=True)
        ctx.mark_non_differentiable(nats_S)
        return _weighted(nats_S, weights), nats_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = outputs[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked head loss supports only one backward pass")
        scaled = [None if each is None else each.mul_(grad_output).to(dtype) for each, dtype in gradients]
        return *scaled, None, None, None, None, None


def _weighted(nats_S: Tensor, weights: Sequence[float]) -> Tensor:
    return sum((weight * nats for weight, nats in zip(weights, nats_S, strict=True)), start=torch.zeros_like(nats_S[0]))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return a chunk's logits in float32."""
    if hidden_CD.dtype != torch.float32 and hidden_CD.is_cuda and _SUMS_IN_FP32:
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32)
        return logits_CV if bias_V is None else logits_CV.add_(bias_V)
    return F.linear(hidden_CD, weight_VD, bias_V).float()


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Compute `total += left @ right` in float32, without another [V, D] tensor if the device supports it."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif _SUMS_IN_FP32 and total_VD.is_cuda:
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=torch.float32, out=total_VD)
    else:
        total_VD += left_VC @ right_CD


def head_cross_entropies(
    hiddens_ND: Sequence[Tensor],
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    weights: Sequence[float] = (1.0,),
    bias_V: Tensor | None = None,
    transform: LogitTransform | None = None,
    implementation: HeadLoss = "chunked",
    chunk: int | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropies of next-token prediction from several hidden states, in nats.

    Args:
        hiddens_ND: hidden states after the final norm, one tensor per loss.
        weight_VD: weight of the LM head; its gradient is computed only if the weight requires one.
        labels_N: next token of each position; positions with -100 are ignored.
        weights: factor of each loss in the sum.
        bias_V: bias of the LM head, if it has one.
        transform: transform of the model's logits.
        implementation: `chunked` (see benchmarks/head_loss.py), `plain` (all logits of a loss at once) or
            `linear_cross_entropy` (of PyTorch, without softcap and scale).
        chunk: tokens per chunk of `chunked`.
        first_row: first row of the weight whose gradient is needed; `chunked` does not compute the others.

    Returns:
        The weighted sum of the losses, and the losses [S] without a gradient. All are sums over labelled tokens.

    Raises:
        EloError: `linear_cross_entropy` is to scale or soft-cap logits.
    """
    transform = transform or LogitTransform()
    device = hiddens_ND[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    hiddens_ND = [hidden.to(dtype) for hidden in hiddens_ND]
    with torch.autocast(device, enabled=False):
        if implementation == "chunked":
            chunk = chunk or CHUNK["cpu" if device == "cpu" else "gpu"]
            hidden_ND = torch.cat(list(hiddens_ND)) if len(hiddens_ND) > 1 else hiddens_ND[0]
            losses: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
                hidden_ND, weight_VD, bias_V, labels_N, transform, chunk, first_row, tuple(weights)
            )
            return losses
        weight_VD = weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        nats_S = torch.stack(
            [_loss_of_all(hidden, weight_VD, labels_N, bias_V, transform, implementation) for hidden in hiddens_ND]
        )
        return _weighted(nats_S, weights), nats_S.detach()


def _loss_of_all(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    implementation: HeadLoss,
) -> Tensor:
    if implementation == "linear_cross_entropy":
        require_transform(implementation, transform)
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            hidden_ND, weight_VD, labels_N, linear_bias=bias_V, reduction="sum", options=options
        ).float()
    logits_NV = transform(F.linear(hidden_ND, weight_VD, bias_V).float())
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


@dataclass
class HeadLossOutput(ModelOutput):
    """The output of a model with an installed head loss.

    Attributes:
        loss: loss to differentiate: the main loss, plus the weighted losses of internal layers.
        nats: the main loss and the loss of each internal layer, in nats summed over labelled tokens [S].
    """

    loss: Tensor | None = None
    nats: Tensor | None = None


def install_head_loss(
    model: PreTrainedModel,
    implementation: HeadLoss = "chunked",
    autocast_dtype: torch.dtype | None = None,
    first_row: int = 0,
    supervised: Mapping[int, float] | None = None,
    supervised_output: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden,
) -> Callable[[], None]:
    """Make `model(input_ids=..., shift_labels=...)` return the summed loss without computing all logits at once.

    The loss is computed inside `forward`, where DDP, FSDP, autocast and compilation apply. A trial compares ELO's path
    (decoder, head weight, transform) with the model's logits, with enlarged hidden states so that a softcap has an
    effect. If they differ, the loss is computed from the model's own logits, as with `implementation="model"`.

    Args:
        implementation: as for `head_cross_entropies`; `model` computes the loss from the model's own logits.
        autocast_dtype: autocast dtype of the training; frozen parts may have this dtype while others are fp32.
        first_row: first row of the head's weight whose gradient is needed.
        supervised: weight of the loss by supervised internal layer. The layer's output passes through the model's own
            final norm and head.
        supervised_output: function applied to a supervised layer's index and output before that.

    Returns:
        A function that reverts the change.

    Raises:
        EloError: `supervised` is not empty, but the model's logits are not those of its final norm and head, or
            `implementation` is `model`.
    """
    original = model.forward
    head = model.get_output_embeddings()
    decoder = model.base_model
    transform = LogitTransform.of(model.config.get_text_config())
    supervised = supervised or {}
    norm, outputs = final_norm(model), LayerOutputs(model, supervised)

    def forward(*args: Any, shift_labels: Tensor | None = None, **inputs: Any) -> Any:
        if shift_labels is None:
            return original(*args, **inputs)
        with outputs.recording() as internal:
            hidden_BTD = decoder(**inputs, use_cache=False)[0]
        hiddens = [hidden_BTD, *(norm(supervised_output(index, internal[index])) for index in supervised)]
        weights = (1.0, *supervised.values())
        loss, nats_S = _eager_head_loss(hiddens, weights, head, shift_labels, transform, implementation, first_row)
        return HeadLossOutput(loss=loss, nats=nats_S)

    def forward_model(*args: Any, shift_labels: Tensor | None = None, **inputs: Any) -> Any:
        if shift_labels is None:
            return original(*args, **inputs)
        logits_BTV = original(**inputs, use_cache=False).logits.float()
        nats = F.cross_entropy(logits_BTV.flatten(0, 1), shift_labels.flatten(), reduction="sum")
        return HeadLossOutput(loss=nats, nats=nats.detach().unsqueeze(0))

    def is_separable() -> bool:
        with evaluating(model, None, autocast_dtype):
            separable = _head_is_separable(model, original, decoder, head, transform)
            return separable and (not supervised or _norm_is_separable(model, decoder))

    # Under FSDP only rank 0 has weights at this point.
    own_path = implementation != "model" and from_main(is_separable)
    if supervised and not own_path:
        outputs.remove()
        reason = "its logits are not those of its final norm and LM head; remove deep_supervision"
        if implementation == "model":
            reason = "head_loss: model computes only the last layer's logits; write head_loss: chunked"
        raise EloError(f"training.deep_supervision: {model.config.model_type}: {reason}")
    model.forward = forward if own_path else forward_model

    def restore() -> None:
        model.forward = original
        outputs.remove()

    return restore


@torch.compiler.disable
def _eager_head_loss(
    hiddens_BTD: Sequence[Tensor],
    weights: Sequence[float],
    head: nn.Module,
    labels_BT: Tensor,
    transform: LogitTransform,
    implementation: HeadLoss,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    return head_cross_entropies(
        [hidden.flatten(0, 1) for hidden in hiddens_BTD],
        weight,
        labels_BT.flatten(),
        weights=weights,
        bias_V=bias,
        transform=transform,
        implementation=implementation,
        first_row=first_row,
    )


def _trial_ids(model: PreTrainedModel) -> Tensor:
    num_rows = model.get_output_embeddings().weight.shape[0]
    return torch.arange(8, device=model.device).unsqueeze(0) % num_rows


def _head_is_separable(
    model: PreTrainedModel,
    original: Callable[..., Any],
    decoder: nn.Module,
    head: nn.Module | None,
    transform: LogitTransform,
    enlarge: float = 50.0,
) -> bool:
    """Return whether `transform(head(decoder(ids)))` equals the model's logits, also for large hidden states."""
    weight = getattr(head, "weight", None)
    if head is None or decoder is model or not isinstance(weight, Tensor) or weight.is_meta:
        return False
    ids = _trial_ids(model)
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * enlarge, *inputs[1:]))
    try:
        theirs = original(input_ids=ids, use_cache=False).logits.float()
        hidden = decoder(input_ids=ids, use_cache=False)[0] * enlarge
        bias = getattr(head, "bias", None)
        ours = transform(F.linear(hidden.float(), weight.float(), None if bias is None else bias.float()).float())
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.std()))
    except TypeError:  # the decoder's arguments differ from the model's
        return False
    finally:
        hook.remove()


def _norm_is_separable(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Return whether the final norm of the last layer's output equals the decoder's output."""
    last = len(layers_of(model)) - 1
    outputs = LayerOutputs(model, [last])
    try:
        with outputs.recording() as found:
            theirs = decoder(input_ids=_trial_ids(model), use_cache=False)[0]
        return torch.equal(final_norm(model)(found[last]), theirs)
    finally:
        outputs.remove()
