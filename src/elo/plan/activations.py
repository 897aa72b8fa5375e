"""Measure what autograd saves between forward and backward, without allocating memory.

The real modules run on fake tensors (shapes without memory), and the sizes of all saved storages are added. The result
therefore includes the upcasts in a family's norms and the tensors that its activation function saves.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.footprint import Footprint, LayerFootprint
from elo.checkpoint.layer_outputs import entering
from elo.checkpoint.model_config import text_config_of
from elo.methods import Method, Phase
from elo.methods.base import select_layers, train_all
from elo.methods.lora import Lora, add_adapters
from elo.plan.devices import Kind, Precision
from elo.plan.memory import SavedActivations
from elo.surgery.layer_config import with_layers

_PROBE = "elo_footprint"
_LENGTHS = (32, 64)
_OUTSIDE, _INPUT = -1, -2


class _SavedByAttention(torch.autograd.Function):
    """Save what a flash kernel saves: query, key, value, output and one fp32 number per head and position."""

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        batch, heads, length, _ = query_BHTD.shape
        output_BTHD = query_BHTD.new_empty(batch, length, heads, value_BKTD.shape[-1])
        normaliser_BHT = query_BHTD.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD, output_BTHD, normaliser_BHT)
        return output_BTHD

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise AssertionError("only the forward is traced")


def _probe_attention(
    module: nn.Module, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Any, None]:
    if getattr(module, "elo_repeats_keys", False):  # with a mask, SDPA repeats keys and values for each head
        groups = query_BHTD.shape[1] // key_BKTD.shape[1]
        if groups > 1:
            key_BKTD, value_BKTD = (kept.repeat_interleave(groups, dim=1) for kept in (key_BKTD, value_BKTD))
    if torch.is_autocast_enabled("cpu"):  # autocast casts the inputs of attention, such as rotated queries and keys
        dtype = torch.get_autocast_dtype("cpu")
        query_BHTD, key_BKTD, value_BKTD = (each.to(dtype) for each in (query_BHTD, key_BKTD, value_BKTD))
    return _SavedByAttention.apply(query_BHTD, key_BKTD, value_BKTD), None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)


def saved_activations(
    config: PretrainedConfig,
    counted: Footprint,
    method: Method,
    phase: Phase,
    layers: Sequence[int],
    *,
    precision: Precision = "bf16",
    kind: Kind = "gpu",
) -> SavedActivations:
    """Measure on fake tensors what the forward pass of a phase saves for the backward pass.

    If tracing fails, the result is a rule of thumb (`SavedActivations.traced` is False).

    Args:
        config: configuration of the base model.
        counted: footprint of the base model.
        method: method of the phase.
        phase: phase to trace.
        layers: indices of the layers that train at one time; not used if `phase.middle` is `adapted`. Layers below the
            lowest trained part save nothing.
        precision: `bf16` means bf16 autocast over fp32 weights.
        kind: kind of device. On a GPU, attention saves no mask, and under `bf16` frozen weights are bf16 unless the
            method redraws layers. On a CPU, attention saves a mask and repeats grouped keys and values, and all weights
            are fp32.
    """
    chosen = list(layers) if phase.detached else list(range(counted.num_layers))
    trained = set() if phase.middle == "adapted" else set(layers)
    ranks = method.lora_ranks(phase, counted.num_layers)
    fp32_throughout = kind == "cpu" or method.redraws_layers
    from_embedding = phase.middle == "trained" or "embedding" in phase.also_train
    lowest = -1 if from_embedding else min(index for index in chosen if index in trained or ranks[index])
    # Tracing one layer of each kind is enough. What a layer saves depends on its shape, whether it is the first one,
    # whether it trains, the rank of its adapters and whether its input needs a gradient.
    kinds: dict[Any, int] = {}
    key_of = [
        (position == 0, index in trained, ranks[index], index > lowest, counted.layers[index])
        for position, index in enumerate(chosen)
    ]
    for key, index in zip(key_of, chosen, strict=True):
        kinds.setdefault(key, index)
    representatives = list(kinds.values())

    def prepare(model: PreTrainedModel) -> None:
        if phase.middle == "trained":
            train_all(model, method.module)
        elif phase.middle == "adapted":
            dropout = method.dropout if isinstance(method, Lora) else 0.0
            own = [ranks[index] for index in representatives]
            add_adapters(model, phase, 0, own, 1.0, module=method.module, dropout=dropout)
        else:
            positions = [position for position, index in enumerate(representatives) if index in trained]
            select_layers(model, positions, phase.also_train, method.module)

    item = 2 if precision == "bf16" else 4
    mask = float(item) if kind == "cpu" else 0.0
    for as_trained, attention in ((True, _PROBE), (False, _PROBE), (True, None), (False, None)):
        try:
            with _quiet():
                short, long = _trace(
                    config,
                    representatives,
                    prepare,
                    precision if as_trained else None,
                    kind,
                    attention,
                    fp32_throughout,
                )
        except Exception:
            # Fake tensors do not support data-dependent shapes or custom kernels. Try the next way of tracing.
            continue
        # A model traced in bf16 takes half the bytes of fp32, and has none of autocast's copies.
        scale = 2.0 if precision == "fp32" and not as_trained else 1.0
        span = _LENGTHS[1] - _LENGTHS[0]
        slope = {i: scale * (long[i] - short.get(i, 0.0)) / span for i in long}
        constant = {i: max(0.0, scale * short[i] - slope[i] * _LENGTHS[0]) for i in short}
        by_kind = {key: (slope.get(i, 0.0), constant.get(i, 0.0)) for i, key in enumerate(kinds)}
        if precision == "bf16" and not as_trained:
            by_kind = {key: (kept, _copies(key, fp32_throughout)) for key, (kept, _) in by_kind.items()}
        return SavedActivations(
            per_layer=tuple(by_kind[key][0] for key in key_of),
            outside=slope.get(_OUTSIDE, 0.0),
            layer_input=slope[_INPUT],
            cast_weights=sum(by_kind[key][1] for key in key_of) if precision == "bf16" else 0.0,
            mask=mask,
            traced=True,
        )
    copies = sum(_copies(key, fp32_throughout) for key in key_of) if precision == "bf16" else 0.0
    return _rule_of_thumb(counted, chosen, item, mask, copies)


def _copies(key: tuple[bool, bool, int, bool, LayerFootprint], fp32_throughout: bool) -> float:
    """Return the bytes of the bf16 copies that autocast makes of a layer's fp32 weights."""
    return 2.0 * key[-1].matmul if key[1] or fp32_throughout else 0.0


def _rule_of_thumb(
    counted: Footprint, chosen: Sequence[int], item: int, mask: float, copies: float
) -> SavedActivations:
    """Estimate activations as the inputs and outputs of every matrix product plus four fp32 norms."""
    per_layer = []
    for index in chosen:
        layer = counted.layers[index]
        density = layer.active_matmul / max(1, layer.matmul)
        width = max(layer.lora_width, density * layer.matmul / counted.hidden_size)
        per_layer.append(item * width + 16.0 * counted.hidden_size)
    return SavedActivations(tuple(per_layer), 8.0 * counted.hidden_size, 4.0 * counted.hidden_size, copies, mask, False)


def _trace(
    config: PretrainedConfig,
    layers: Sequence[int],
    prepare: Callable[[PreTrainedModel], None],
    precision: Precision | None,
    kind: str,
    attention: str | None,
    fp32_throughout: bool,
) -> list[dict[int, float]]:
    """Return the bytes that `_saved_bytes` finds for each of _LENGTHS tokens in a model of `layers`.

    Args:
        prepare: function that sets which parameters of that model train, and adds adapters.
        precision: None traces a model in bf16 throughout.
    """
    mode = FakeTensorMode()
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    arguments["dtype"] = torch.float32 if precision else torch.bfloat16
    with mode, torch.device("cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            with_layers(text_config_of(config), layers), **arguments
        )
        model.train()
        kept = layers_of(model)
        with torch.device("meta"):  # peft moves adapters to the weights' device, which fake tensors do not support
            prepare(model)
        keeps_bf16 = precision == "bf16" and not fp32_throughout  # training keeps frozen weights in bf16
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.is_meta or (keeps_bf16 and not weight.requires_grad):
                    dtype = arguments["dtype"] if weight.requires_grad else torch.bfloat16
                    replaced = nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
                    setattr(module, name, replaced)
    for module in model.modules():
        module.elo_repeats_keys = kind == "cpu"  # type: ignore[assignment]
    with mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        return [_saved_bytes(model, kept, length) for length in _LENGTHS]


def _saved_bytes(model: PreTrainedModel, layers: nn.ModuleList, length: int) -> dict[int, float]:
    """Return the bytes saved by each layer (by position) and outside the layers (_OUTSIDE), and the size of a layer's
    input (_INPUT), for one sequence of `length` tokens.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    inside = [_OUTSIDE]
    saved: dict[int, tuple[int, int]] = {}
    alive: list[Tensor] = []  # another storage could reuse the address of a freed one
    found: dict[int, float] = {_INPUT: 0.0}

    def enter(position: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inside[0] = position
            hidden = entering(arguments, keywords)
            if isinstance(hidden, Tensor):
                found[_INPUT] = float(hidden.numel() * hidden.element_size())

        return hook

    def leave(*_: Any) -> None:
        inside[0] = _OUTSIDE

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, (inside[0], storage.nbytes()))
        return tensor

    hooks = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids_BT = torch.zeros(1, length, dtype=torch.long)
        model.base_model(input_ids=ids_BT, position_ids=torch.arange(length).unsqueeze(0), use_cache=False)
    for handle in hooks:
        handle.remove()
    for position, size in saved.values():
        found[position] = found.get(position, 0.0) + size
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the traced forward."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
