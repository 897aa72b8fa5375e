"""Peak memory of training, by part, before anything is loaded.

Weights, gradients and optimizer states are counted; what autograd keeps for the backward is measured: the real modules
run on fake tensors (shapes without memory), and every storage they save is added up. So it holds for any family, with
what its norms upcast and its activation function keeps.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from elo.errors import EloError
from elo.model.architecture import find_architecture, layers_of
from elo.model.config_surgery import with_layers
from elo.model.footprint import Footprint, Method, text_config

Precision = Literal["bf16", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor"]
HeadLoss = Literal["auto", "chunked", "plain", "linear_cross_entropy", "model"]

OPTIMIZER_BYTES: dict[str, float] = {"adamw": 8.0, "adamw_8bit": 2.04, "adafactor": 0.02}
"""Bytes of state for one trained parameter. AdamW: two fp32 moments. 8-bit AdamW: two bytes and two fp32 scales for
each 256 (bitsandbytes), but for the token embedding, tied or not, whose moments transformers keeps in fp32. Adafactor:
a row and a column of each matrix, so next to nothing."""

RUNTIME_BYTES = {"gpu": 700 * 2**20, "cpu": 600 * 2**20}
"""CUDA context, kernels and library workspaces; on a CPU the Python process with its libraries."""

# What elo.training.losses does; tests compare.
SMALL_LOGITS = 4_000_000
CHUNK = {"gpu": 2048, "cpu": 256}

_PROBE = "elo_footprint"
_LENGTHS = (32, 64)
_OUTSIDE, _INPUT = -1, -2


@dataclass(frozen=True)
class SavedActivations:
    """What autograd keeps between forward and backward; bytes for one token unless it says otherwise."""

    per_layer: tuple[float, ...]
    outside: float
    """Embedding output and final norm."""
    layer_input: float
    """What activation checkpointing keeps of a layer."""
    cast_weights: float
    """Bytes, whatever the number of tokens: bf16 copies of fp32 weights that autocast makes."""
    mask: float
    """Bytes for one (query, key) pair of a layer: the mask that CPU attention keeps."""
    traced: bool
    """False: the modules could not be run on fake tensors, and a rule of thumb stands in."""


@dataclass(frozen=True)
class StageMemory:
    """Peak memory of one device in one stage; `parts` (bytes) are what is there at that moment and add up to it."""

    peak: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)


class _SavedByAttention(torch.autograd.Function):
    """Keeps what a flash kernel keeps: query, key, value, output and one fp32 number a head and position."""

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
    if getattr(module, "elo_repeats_keys", False):  # with a mask, SDPA gets keys and values repeated for each head
        groups = query_BHTD.shape[1] // key_BKTD.shape[1]
        if groups > 1:
            key_BKTD, value_BKTD = (kept.repeat_interleave(groups, dim=1) for kept in (key_BKTD, value_BKTD))
    if torch.is_autocast_enabled("cpu"):  # attention is on autocast's list: rotated queries and keys are cast back
        dtype = torch.get_autocast_dtype("cpu")
        query_BHTD, key_BKTD, value_BKTD = (each.to(dtype) for each in (query_BHTD, key_BKTD, value_BKTD))
    return _SavedByAttention.apply(query_BHTD, key_BKTD, value_BKTD), None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)


def saved_activations(
    config: PretrainedConfig,
    counted: Footprint,
    layers: Sequence[int] | None = None,
    *,
    precision: Precision = "bf16",
    kind: Literal["gpu", "cpu"] = "gpu",
    also_train: Collection[str] = (),
    in_place: bool = False,
) -> SavedActivations:
    """Measure what a training forward keeps, on fake tensors.

    Args:
        config: the base model's.
        counted: its footprint.
        layers: the layers that train, all else frozen, and no other keeps anything (they are detached, or computed
            without a graph); the whole model, all of it trained, when None.
        precision: `bf16` is bf16 autocast over fp32 weights.
        kind: on a GPU packed attention keeps no mask and frozen weights are in bf16 under `bf16`; on a CPU a mask is
            kept, grouped keys and values are repeated, and all weights are fp32.
        also_train: parts that train with `layers`: embedding, norm, head. An embedding that trains is in fp32 on a GPU
            too, and so are all hidden states after it.
        in_place: the other layers, frozen, are computed and differentiated too.
    """
    chosen = list(range(counted.num_layers) if layers is None or in_place else layers)
    trained = set(chosen if layers is None else layers)
    lowest = -1 if layers is None or "embedding" in also_train else min(trained)
    # One layer of each kind is enough: what it keeps depends on whether it trains, and whether its input needs a
    # gradient.
    kinds: dict[Any, int] = {}
    key_of = [
        (position == 0, index in trained, index > lowest, counted.layers[index])
        for position, index in enumerate(chosen)
    ]
    for key, index in zip(key_of, chosen, strict=True):
        kinds.setdefault(key, index)
    representatives = list(kinds.values())
    item = 2 if precision == "bf16" else 4
    mask = float(item) if kind == "cpu" else 0.0
    for as_trained, attention in ((True, _PROBE), (False, _PROBE), (True, None), (False, None)):
        try:
            with _quiet():
                frozen_but_for = None if layers is None else (trained, also_train)
                short, long = _trace(
                    config, representatives, precision if as_trained else None, kind, attention, frozen_but_for
                )
        except Exception:
            # Any family may do what fake tensors cannot (data-dependent shapes, kernels of its own): try the next way.
            continue
        # Traced with bf16 weights instead: fp32 takes twice that, and the copies that autocast makes are not in it.
        scale = 2.0 if precision == "fp32" and not as_trained else 1.0
        span = _LENGTHS[1] - _LENGTHS[0]
        slope = {i: scale * (long[i] - short.get(i, 0.0)) / span for i in long}
        constant = {i: max(0.0, scale * short[i] - slope[i] * _LENGTHS[0]) for i in short}
        by_kind = {key: (slope.get(i, 0.0), constant.get(i, 0.0)) for i, key in enumerate(kinds)}
        if precision == "bf16" and not as_trained:
            by_kind = {key: (kept, 2.0 * key[-1].matmul) for key, (kept, _) in by_kind.items()}
        return SavedActivations(
            per_layer=tuple(by_kind[key][0] for key in key_of),
            outside=slope.get(_OUTSIDE, 0.0),
            layer_input=slope[_INPUT],
            cast_weights=sum(by_kind[key][1] for key in key_of) if precision == "bf16" else 0.0,
            mask=mask,
            traced=True,
        )
    return _rule_of_thumb(counted, chosen, item, mask)


def _rule_of_thumb(counted: Footprint, chosen: Sequence[int], item: int, mask: float) -> SavedActivations:
    """Inputs and outputs of every product once, and four norms' worth of fp32."""
    per_layer = []
    for index in chosen:
        layer = counted.layers[index]
        density = layer.active_matmul / max(1, layer.matmul)
        width = max(layer.lora_width, density * layer.matmul / counted.hidden_size)
        per_layer.append(item * width + 16.0 * counted.hidden_size)
    copies = 2.0 * sum(counted.layers[index].matmul for index in chosen) if item == 2 else 0.0
    return SavedActivations(tuple(per_layer), 8.0 * counted.hidden_size, 4.0 * counted.hidden_size, copies, mask, False)


def _trace(
    config: PretrainedConfig,
    layers: Sequence[int],
    precision: Precision | None,
    kind: str,
    attention: str | None,
    frozen_but_for: tuple[Collection[int], Collection[str]] | None,
) -> list[dict[int, float]]:
    """For each of _LENGTHS: bytes saved by `layers` (by position), outside them, and the size of a layer's input.

    `precision` None traces a model in bf16 throughout; `frozen_but_for` None one that trains as a whole, otherwise one
    that trains those of `layers` and these parts.
    """
    mode = FakeTensorMode()
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    arguments["dtype"] = torch.float32 if precision else torch.bfloat16
    with mode, torch.device("cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(with_layers(text_config(config), layers), **arguments)
    model.train()
    architecture = find_architecture(model)
    kept = layers_of(model)
    if frozen_but_for is not None:
        model.requires_grad_(False)
        trained, also_train = frozen_but_for
        for layer, index in zip(kept, layers, strict=True):
            layer.requires_grad_(index in trained)
        paths = {
            "embedding": architecture.embedding_path,
            "norm": architecture.norm_path,
            "head": architecture.head_path,
        }
        for part in also_train:
            path = paths[part]
            if path is not None:
                model.get_submodule(path).requires_grad_(True)
        if precision == "bf16" and kind == "gpu":
            # As training does: what is frozen is kept in bf16.
            with mode, torch.device("cpu"):
                for module in list(model.modules()):
                    for name, weight in list(module.named_parameters(recurse=False)):
                        if not weight.requires_grad:
                            lower = torch.empty(weight.shape, dtype=torch.bfloat16)
                            setattr(module, name, nn.Parameter(lower, requires_grad=False))
    for module in model.modules():
        module.elo_repeats_keys = kind == "cpu"  # type: ignore[assignment]
    with mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        return [_saved_bytes(model, kept, length) for length in _LENGTHS]


def _saved_bytes(model: PreTrainedModel, layers: nn.ModuleList, length: int) -> dict[int, float]:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    inside = [_OUTSIDE]
    saved: dict[int, tuple[int, int]] = {}
    alive: list[Tensor] = []  # a freed storage's address could be taken by another
    found: dict[int, float] = {_INPUT: 0.0}

    def enter(position: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inside[0] = position
            hidden = arguments[0] if arguments else keywords.get("hidden_states")
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
    """Without the warnings of a forward that is only asked for its shapes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def stage_memory(
    counted: Footprint,
    saved: SavedActivations,
    method: Method,
    layers: Sequence[int],
    *,
    tokens: int,
    sequence_length: int,
    precision: Precision,
    kind: Literal["gpu", "cpu"] = "gpu",
    optimizer: Optimizer = "adamw",
    activation_checkpointing: bool = False,
    head_loss: HeadLoss = "auto",
    accumulates: bool = True,
    sharded_over: int = 1,
    lora_rank: int = 16,
    also_train: Collection[str] = (),
    bridge: bool = False,
) -> StageMemory:
    """Peak memory of one device.

    Args:
        counted: the base model's footprint.
        saved: as `saved_activations` measured it for this stage (a LoRA keeps what full training keeps, and
            `forward_only` what `elo` keeps; for `frozen` with `in_place`).
        method: `elo`, `forward_only`, `full` (also layer alignment), `frozen` or `lora`.
        layers: the layers that `elo`, `forward_only` and `frozen` train.
        tokens: in one micro-step of one device.
        sequence_length: T; sizes the mask of CPU attention.
        precision: trained weights are fp32 always; under `bf16` products run on bf16 copies.
        kind: frozen weights are bf16 on a GPU under `bf16`, fp32 on a CPU.
        accumulates: gradients stay from one micro-step to the next; otherwise none is there when the loss is computed.
        sharded_over: devices that share weights, gradients and optimizer states (FSDP); each then also holds one
            gathered layer and the gathered head.
        also_train: parts that train with `layers`: embedding, norm, head.
        bridge: for `elo`: a linear bridge stands in each gap. `forward_only` has one always.

    Two moments can be the peak. At the loss all activations and the logits exist. At the optimizer step all gradients
    exist and no activation does. Between the two, under activation checkpointing, one layer's activations are back
    beside the layer inputs; that is the larger of the two where a layer keeps more than the head. The end of the
    backward, where the embedding's gradient is made before it is added to what is there, can pass them where much of
    the model is embedding. What the middle of `forward_only` needs while it is computed (one layer's workspace beside
    the activations of the layers below) is never more than the first backward needs.
    """
    trainable = counted.trainable(method, layers, lora_rank=lora_rank, also_train=also_train)
    held = counted.detached(layers) if method == "elo" else counted
    frozen = counted.total if method == "lora" else held.total - trainable
    item = 2 if precision == "bf16" else 4
    trains_head = method == "full" or "head" in also_train
    trains_embedding = method == "full" or "embedding" in also_train
    maps = counted.bridge_elements(layers) if method == "forward_only" or bridge else 0
    share = 1.0 / sharded_over
    weights = (4 * trainable + (item if kind == "gpu" else 4) * frozen) * share + 4 * maps
    gradients = 4 * trainable * share
    states = OPTIMIZER_BYTES[optimizer] * trainable * share
    if optimizer == "adamw_8bit" and trains_embedding:
        states += (OPTIMIZER_BYTES["adamw"] - OPTIMIZER_BYTES["adamw_8bit"]) * counted.embedding * share
    copies = 0.0
    if precision == "bf16" and method != "lora":
        copies = saved.cast_weights + (2 * counted.head_matmul if trains_head or kind == "cpu" else 0)
        copies += 2 * maps if bridge else 0
    if sharded_over > 1:
        copies = item * max(layer.parameters for layer in held.layers) + item * counted.head_matmul
    layer_bytes = [tokens * kept for kept in saved.per_layer]
    masks = saved.mask * tokens * sequence_length
    if method == "lora":
        layer_bytes = [kept + tokens * item * lora_rank * 8 for kept in layer_bytes]
    everything = sum(layer_bytes) + masks * len(layer_bytes) + tokens * saved.outside
    inputs = tokens * (saved.layer_input * len(layer_bytes) + saved.outside)
    one_layer = max(layer_bytes) + masks
    head = head_loss_bytes(counted, tokens, precision, head_loss, trains_head, kind)
    widest = max(layer.widest for layer in held.layers)
    workspace = 3.0 * item * tokens * widest
    kept_gradients = gradients if accumulates else 0.0
    base = {"weights": weights, "optimizer": states, "runtime": float(RUNTIME_BYTES[kind])}
    moments: dict[str, dict[str, float]] = {}
    at_loss = base | {"gradients": kept_gradients, "bf16 weight copies": copies}
    if activation_checkpointing:
        moments["loss"] = at_loss | {"activations": inputs, "logits": head}
        moments["recomputed layer"] = base | {
            "gradients": gradients if accumulates else gradients / 2,
            "bf16 weight copies": copies / max(1, len(layer_bytes)),
            "activations": inputs + one_layer,
            "workspace": workspace,
        }
    else:
        moments["loss"] = at_loss | {"activations": everything, "logits": head}
        heads_gradient = 4 * counted.head_matmul * share if trains_head else 0.0
        moments["first backward"] = at_loss | {
            "gradients": max(kept_gradients, heads_gradient),
            "activations": everything,
            "workspace": workspace,
        }
    if trains_embedding:
        # A tied embedding's two gradients are added up before they are added to what is there.
        made = 4 * counted.embedding * share * (int(accumulates) + int(counted.tied))
        moments["end of backward"] = base | {"gradients": gradients, "workspace": made}
    moments["optimizer step"] = base | {"gradients": gradients}
    moment, parts = max(moments.items(), key=lambda entry: sum(entry[1].values()))
    whole = {name: round(size) for name, size in parts.items() if size >= 1}
    return StageMemory(sum(whole.values()), moment, whole)


def head_loss_bytes(
    counted: Footprint,
    tokens: int,
    precision: Precision,
    head_loss: HeadLoss,
    trains_head: bool,
    kind: Literal["gpu", "cpu"] = "gpu",
) -> float:
    """Bytes of the LM head's cross-entropy at its largest.

    All logits at once: three fp32 numbers each (log-probabilities and two gradients), as PyTorch's cross-entropy keeps
    them. Chunked: one chunk's fp32 logits and what logsumexp makes of them, and the hidden states' gradient for all
    tokens. A head that trains has its fp32 gradient beside them, then also a chunk's part of it, and in the backward,
    when no logits are left, a scaled copy.
    """
    logits = tokens * counted.vocab_size
    if head_loss == "auto":
        head_loss = "plain" if logits <= SMALL_LOGITS else "chunked"
    if head_loss in ("plain", "model"):
        return 12.0 * logits
    item = 2 if precision == "bf16" else 4
    chunk = float(min(tokens, CHUNK[kind]) * counted.vocab_size)
    head = counted.head_matmul if trains_head else 0
    most = max(8 * chunk + 4 * head, (8 - item) * chunk + (4 + item) * head, 8 * head)
    return most + 2.0 * item * tokens * counted.hidden_size


def check_optimizer(optimizer: str) -> Optimizer:
    """`optimizer` if its memory is known.

    Raises:
        EloError: it is not.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise EloError(f"optim: {optimizer!r} is unknown; choose one of {', '.join(OPTIMIZER_BYTES)}")
    return optimizer  # type: ignore[return-value]


def check_head_loss(head_loss: str) -> HeadLoss:
    """`head_loss` if its memory is known.

    Raises:
        EloError: it is not.
    """
    if head_loss not in get_args(HeadLoss):
        raise EloError(f"head_loss: {head_loss!r} is unknown; choose one of {', '.join(get_args(HeadLoss))}")
    return head_loss  # type: ignore[return-value]
