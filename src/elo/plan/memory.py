"""Estimate the peak memory of training by part, from a footprint.

Weights, gradients, optimizer states and logits are counted. The activations that autograd saves are measured by
`elo.plan.activations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from elo.checkpoint.footprint import Footprint
from elo.methods import Method, Phase
from elo.plan.devices import Kind, Precision
from elo.plan.schema import Memory
from elo.train.settings import CHUNK, HeadLoss, TrainingSettings

OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.04,
    "adafactor": 0.02,
}
"""Bytes of optimizer state per trained parameter.

AdamW keeps two fp32 moments. 8-bit AdamW (bitsandbytes) keeps two bytes, and two fp32 scales per 256 parameters;
transformers keeps the moments of the token embedding, tied or not, in fp32. Adafactor keeps one row and one column of
each matrix. Other optimizers are assumed to need as much as AdamW."""
_ADAMW = OPTIMIZER_BYTES["adamw_torch"]

RUNTIME_BYTES = {"gpu": 700 * 2**20, "cpu": 600 * 2**20}
"""Bytes of the CUDA context, kernels and library workspaces; on a CPU, of the Python process and its libraries."""
_TOKENIZER_ROW_BYTES = 1280
"""Bytes of a tokenizer per vocabulary row, in the process that trains (measured: SmolLM2 1,024, Gemma 3 1,280)."""
_FREED_EACH_STEP = ("bf16 weight copies", "activations", "logits", "workspace")
_HELD_BY_MALLOC = 0.5
"""Memory that malloc keeps on a CPU beside the peak, as a share of these parts; fitted on SmolLM2 (dev/LOG.md)."""


@dataclass(frozen=True)
class SavedActivations:
    """What autograd saves between forward and backward, in bytes per token unless noted otherwise."""

    per_layer: tuple[float, ...]
    outside: float
    """Embedding output and final norm."""
    layer_input: float
    """Input of a layer, which is all that activation checkpointing keeps."""
    cast_weights: float
    """bf16 copies of fp32 weights that autocast makes, in bytes, independent of the number of tokens."""
    mask: float
    """Mask that CPU attention keeps, in bytes per (query, key) pair of a layer."""
    traced: bool
    """Whether the modules were traced on fake tensors; otherwise the numbers are a rule of thumb."""


def phase_memory(
    counted: Footprint,
    saved: SavedActivations,
    method: Method,
    phase: Phase,
    layers: Sequence[int],
    settings: TrainingSettings,
    *,
    sequence_length: int,
    precision: Precision,
    kind: Kind = "gpu",
    devices: int = 1,
    whole: Footprint | None = None,
) -> Memory:
    """Estimate the peak memory of one device.

    Args:
        counted: footprint of the base model, with the vocabulary rows that training computes with.
        saved: result of `saved_activations` for this phase.
        method: method of the phase. Its `module` is the part of a layer that trains. A method that redraws layers has
            fp32 weights throughout.
        phase: phase of the method.
        layers: layers that train at one time.
        settings: settings of the phase. If they shard the model (FSDP, DeepSpeed), each device holds its share of
            weights, gradients and optimizer states, one gathered layer and the gathered head.
        sequence_length: number of tokens in a sequence, which also determines the size of the mask of CPU attention.
        precision: under `bf16`, products run on bf16 copies of the weights; trained weights are always fp32.
        kind: frozen weights are bf16 on a GPU under `bf16`, and fp32 on a CPU.
        devices: number of devices.
        whole: footprint with all vocabulary rows, if training computes with only some of them. The whole embedding and
            head are then held in fp32 beside the model.

    The estimate is the largest sum over these moments of an update:

    - Loss: all activations and the logits exist.
    - Optimizer step: all gradients exist, but no activations.
    - Recomputed layer (activation checkpointing): one layer's activations exist beside the inputs of all layers.
    - First backward (no checkpointing): all activations, the head's gradient and a workspace exist.
    - End of backward: the embedding's new gradient exists beside the accumulated one. This is the peak of models with
      a large embedding.
    """
    tokens = settings.per_device_train_batch_size * sequence_length
    accumulates = settings.tokens_per_step > tokens * devices
    ranks, module = method.lora_ranks(phase, counted.num_layers), method.module
    trainable = counted.trainable(phase.middle, layers, lora_rank=ranks, also_train=phase.also_train, module=module)
    held = counted.detached(layers) if phase.detached else counted
    frozen = held.total - trainable + counted.lora_parameters(ranks, module)  # adapters are not in held
    item = 2 if precision == "bf16" else 4
    frozen_item = item if kind == "gpu" and not method.redraws_layers else 4
    trains_head = phase.middle == "trained" or "head" in phase.also_train
    trains_embedding = phase.middle == "trained" or "embedding" in phase.also_train
    maps = counted.bridge_elements(layers) if phase.middle == "bridged" else 0
    is_divided = settings.divides_model and devices > 1
    share = 1.0 / devices if is_divided else 1.0
    set_aside = whole.embedding + whole.head if whole else 0
    weights = (4 * trainable + frozen_item * frozen) * share + 4 * maps + 4 * set_aside
    gradients = 4 * trainable * share
    state_bytes = OPTIMIZER_BYTES.get(settings.optimizer_name, _ADAMW)
    states = state_bytes * trainable * share
    if settings.optimizer_name == "adamw_bnb_8bit" and trains_embedding:
        states += (_ADAMW - state_bytes) * counted.embedding * share
    copies = 0.0
    if precision == "bf16":
        copies = 2 * maps + (2 * counted.head_matmul if trains_head or kind == "cpu" else 0)
        copies += saved.cast_weights
    if is_divided:
        copies = item * max(layer.parameters for layer in held.layers) + item * counted.head_matmul
    layer_bytes = [tokens * kept for kept in saved.per_layer]
    masks = saved.mask * tokens * sequence_length
    # The final norm runs once per loss, and each time saves about as much.
    outside = tokens * saved.outside * settings.num_losses
    everything = sum(layer_bytes) + masks * len(layer_bytes) + outside
    inputs = tokens * saved.layer_input * len(layer_bytes) + outside
    one_layer = max(layer_bytes) + masks
    head = head_loss_bytes(
        counted, tokens, precision, settings.head_loss, trains_head, kind, num_losses=settings.num_losses
    )
    widest = max(layer.widest for layer in held.layers)
    workspace = 3.0 * item * tokens * widest
    kept_gradients = gradients if accumulates else 0.0
    base = {"weights": weights, "optimizer": states, "runtime": float(RUNTIME_BYTES[kind])}
    if kind == "cpu":
        base["runtime"] += _TOKENIZER_ROW_BYTES * (whole or counted).vocab_size
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
        # The two gradients of a tied embedding are summed before they are accumulated.
        made = 4 * counted.embedding * share * (int(accumulates) + int(counted.tied))
        moments["end of backward"] = base | {"gradients": gradients, "workspace": made}
    moments["optimizer step"] = base | {"gradients": gradients}
    moment, parts = max(moments.items(), key=lambda entry: sum(entry[1].values()))
    if kind == "cpu":
        freed = max(sum(each.get(name, 0.0) for name in _FREED_EACH_STEP) for each in moments.values())
        parts["held by malloc"] = _HELD_BY_MALLOC * freed
    rounded = {name: round(size) for name, size in parts.items() if size >= 1}
    return Memory(peak_bytes=sum(rounded.values()), moment=moment, parts=rounded)


def head_loss_bytes(
    counted: Footprint,
    tokens: int,
    precision: Precision,
    head_loss: HeadLoss,
    trains_head: bool,
    kind: Kind = "gpu",
    *,
    num_losses: int = 1,
) -> float:
    """Estimate the peak bytes of the LM head's cross-entropies.

    - All logits at once: PyTorch's cross-entropy saves one fp32 number per logit for each loss (the log-probability),
      and needs two more for the loss that is being differentiated.
    - Chunked: the fp32 logits of one chunk (twice with a softcap), their gradient in bf16 under `bf16`, and the hidden
      states' gradient for all tokens. A trained head adds its fp32 gradient and, under `bf16` on a CPU, a bf16 term of
      that gradient.

    Args:
        tokens: number of tokens in a micro-batch.
        num_losses: number of losses: one, and one for each supervised internal layer.
    """
    if head_loss in ("plain", "model"):
        return (4.0 * num_losses + 8.0) * tokens * counted.vocab_size
    item = 2 if precision == "bf16" else 4
    chunk = float(min(tokens, CHUNK[kind]) * counted.vocab_size)
    head = counted.head_matmul if trains_head else 0
    most = (4 if precision == "fp32" else 6) * chunk + 4 * head
    if counted.softcaps:
        most += 4 * chunk
    if precision == "bf16" and kind == "cpu":
        most += 2 * head
    return most + (2.0 if num_losses == 1 else 3.0) * item * tokens * num_losses * counted.hidden_size
