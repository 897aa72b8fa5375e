"""Peak memory of training, by part, before anything is loaded.

Weights, gradients, optimizer states and logits are counted; what autograd keeps for the backward is measured
(elo.plan.activations). Neither torch nor transformers is imported here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from elo.checkpoint.footprint import Footprint, Middle
from elo.errors import EloError
from elo.train.settings import CHUNK, HeadLoss

Precision = Literal["bf16", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor"]

OPTIMIZER_BYTES: dict[str, float] = {"adamw": 8.0, "adamw_8bit": 2.04, "adafactor": 0.02}
"""Bytes of state for one trained parameter. AdamW: two fp32 moments. 8-bit AdamW: two bytes and two fp32 scales for
each 256 (bitsandbytes), but for the token embedding, tied or not, whose moments transformers keeps in fp32. Adafactor:
a row and a column of each matrix, so next to nothing."""

RUNTIME_BYTES = {"gpu": 700 * 2**20, "cpu": 600 * 2**20}
"""CUDA context, kernels and library workspaces; on a CPU the Python process with its libraries."""


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


def stage_memory(
    counted: Footprint,
    saved: SavedActivations,
    method: Middle,
    layers: Sequence[int],
    *,
    tokens: int,
    sequence_length: int,
    precision: Precision,
    kind: Literal["gpu", "cpu"] = "gpu",
    optimizer: Optimizer = "adamw",
    activation_checkpointing: bool = False,
    head_loss: HeadLoss = "chunked",
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
    them. Chunked: one chunk's fp32 logits, twice under a softcap, under bf16 their gradient once more, and the hidden
    states' gradient for all tokens. A head that trains has its fp32 gradient beside them; a CPU also makes a chunk's
    part of it in bf16.
    """
    if head_loss in ("plain", "model"):
        return 12.0 * tokens * counted.vocab_size
    item = 2 if precision == "bf16" else 4
    chunk = float(min(tokens, CHUNK[kind]) * counted.vocab_size)
    head = counted.head_matmul if trains_head else 0
    most = (4 if precision == "fp32" else 6) * chunk + 4 * head
    if counted.softcaps:
        most += 4 * chunk
    if precision == "bf16" and kind == "cpu":
        most += 2 * head
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
