"""Peak memory of training, by part, from a footprint alone.

Weights, gradients, optimizer states and logits are counted; what autograd keeps for the backward is measured
(elo.plan.activations).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elo.checkpoint.footprint import Footprint
from elo.methods import Phase
from elo.plan.schema import Memory
from elo.train.settings import CHUNK, HeadLoss, TrainingSettings

Precision = Literal["bf16", "fp32"]
Kind = Literal["gpu", "cpu"]

OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.04,
    "adafactor": 0.02,
}
"""Bytes of state for one trained parameter. AdamW: two fp32 moments. 8-bit AdamW: two bytes and two fp32 scales for
each 256 (bitsandbytes), but for the token embedding, tied or not, whose moments transformers keeps in fp32. Adafactor:
a row and a column of each matrix, so next to nothing. Others are taken to be AdamW."""
_ADAMW = OPTIMIZER_BYTES["adamw_torch"]

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


def phase_memory(
    counted: Footprint,
    saved: SavedActivations,
    phase: Phase,
    layers: Sequence[int],
    settings: TrainingSettings,
    *,
    sequence_length: int,
    precision: Precision,
    kind: Kind = "gpu",
    devices: int = 1,
    fp32_throughout: bool = False,
    set_aside: int = 0,
) -> Memory:
    """Peak memory of one device.

    Args:
        counted: the base model's footprint, with as many vocabulary rows as training computes with.
        saved: as `saved_activations` measured it for this phase. Adapters are given what full training keeps.
        layers: that train at one time.
        settings: of the phase. Where they divide the model (FSDP, DeepSpeed), each device holds its share of weights,
            gradients and optimizer states, one gathered layer and the gathered head.
        sequence_length: T; sizes the mask of CPU attention.
        precision: trained weights are fp32 always; under `bf16` products run on bf16 copies.
        kind: frozen weights are bf16 on a GPU under `bf16`, fp32 on a CPU.
        fp32_throughout: frozen weights are in fp32 on a GPU too.
        set_aside: fp32 parameters held beside the model: the whole embedding and head, where some rows train.

    Two moments can be the peak. At the loss all activations and the logits exist. At the optimizer step all gradients
    exist and no activation does. Between the two, under activation checkpointing, one layer's activations are back
    beside the layer inputs; that is the larger of the two where a layer keeps more than the head. The end of the
    backward, where the embedding's gradient is made before it is added to what is there, can pass them where much of
    the model is embedding.
    """
    tokens = settings.per_device_train_batch_size * sequence_length
    accumulates = settings.tokens_per_step > tokens * devices
    trainable = counted.trainable(phase.middle, layers, lora_rank=phase.lora_rank, also_train=phase.also_train)
    held = counted.detached(layers) if phase.detached else counted
    frozen = held.total - trainable + counted.lora_parameters(phase.lora_rank)  # adapters are not in held
    item = 2 if precision == "bf16" else 4
    frozen_item = item if kind == "gpu" and not fp32_throughout else 4
    trains_head = phase.middle == "trained" or "head" in phase.also_train
    trains_embedding = phase.middle == "trained" or "embedding" in phase.also_train
    maps = counted.bridge_elements(layers) if phase.middle == "bridged" else 0
    is_divided = settings.divides_model and devices > 1
    share = 1.0 / devices if is_divided else 1.0
    weights = (4 * trainable + frozen_item * frozen) * share + 4 * maps + 4 * set_aside
    gradients = 4 * trainable * share
    state_bytes = OPTIMIZER_BYTES.get(settings.optimizer_name, _ADAMW)
    states = state_bytes * trainable * share
    if settings.optimizer_name == "adamw_bnb_8bit" and trains_embedding:
        states += (_ADAMW - state_bytes) * counted.embedding * share
    copies = 0.0
    if precision == "bf16":
        copies = 2 * maps + (2 * counted.head_matmul if trains_head or kind == "cpu" else 0)
        # Adapters' own copies are next to nothing, and what is frozen is in bf16 on a GPU.
        copies += saved.cast_weights if phase.middle != "adapted" or kind == "cpu" else 0.0
    if is_divided:
        copies = item * max(layer.parameters for layer in held.layers) + item * counted.head_matmul
    layer_bytes = [tokens * kept for kept in saved.per_layer]
    masks = saved.mask * tokens * sequence_length
    if phase.middle == "adapted":
        layer_bytes = [kept + tokens * item * phase.lora_rank * 8 for kept in layer_bytes]
    everything = sum(layer_bytes) + masks * len(layer_bytes) + tokens * saved.outside
    inputs = tokens * (saved.layer_input * len(layer_bytes) + saved.outside)
    one_layer = max(layer_bytes) + masks
    head = head_loss_bytes(counted, tokens, precision, settings.head_loss, trains_head, kind)
    widest = max(layer.widest for layer in held.layers)
    workspace = 3.0 * item * tokens * widest
    kept_gradients = gradients if accumulates else 0.0
    base = {"weights": weights, "optimizer": states, "runtime": float(RUNTIME_BYTES[kind])}
    moments: dict[str, dict[str, float]] = {}
    at_loss = base | {"gradients": kept_gradients, "bf16 weight copies": copies}
    if settings.activation_checkpointing:
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
    return Memory(peak_bytes=sum(whole.values()), moment=moment, parts=whole)


def head_loss_bytes(
    counted: Footprint,
    tokens: int,
    precision: Precision,
    head_loss: HeadLoss,
    trains_head: bool,
    kind: Kind = "gpu",
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
