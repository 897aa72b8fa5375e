"""What this machine really reaches on a given model: one decoder layer trained for some seconds."""

import time

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from elo.checkpoint.counting import footprint, text_config
from elo.plan.devices import Device
from elo.surgery.layer_config import with_layers

_VOCABULARY = 1024
_MOST_FLOPS = 2e12
"""FLOPs of one trial at most, so that a large model on a slow machine still takes seconds."""


def measure_utilisation(
    config: PretrainedConfig,
    device: Device,
    *,
    layer: int = 0,
    tokens: int = 2048,
    sequence_length: int = 2048,
    seconds: float = 3.0,
) -> float:
    """Share of the measured matrix-product rate that a forward and backward of one real decoder layer reaches here.

    The layer has the model's own shapes and random weights; the vocabulary is cut to 1,024. So norms, activations,
    attention and the cost of small products are in the figure; the optimizer is not.

    Args:
        config: the model's.
        device: what `measure_matmul_rate` found.
        layer: which decoder layer.
        tokens: of a micro-step; fewer are taken where that would take too long.
        sequence_length: T.
        seconds: how long to go on measuring; the fastest trial counts.

    Returns:
        Above 0; may pass 1 where the layer's products run faster than the square ones that were measured.
    """
    small = with_layers(text_config(config), [layer])
    small.vocab_size = min(_VOCABULARY, small.vocab_size)
    small.pad_token_id = None
    where = torch.device("cuda" if device.kind == "gpu" else "cpu")
    counted = footprint(small)
    length = min(sequence_length, tokens)
    per_token = counted.flops_per_token("trained", sequence_length=length).total
    while length > 64 and length * per_token > _MOST_FLOPS:
        length //= 2
    rows = max(1, min(tokens // length, int(_MOST_FLOPS / per_token / length)))
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        with where:
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).train()
        ids_BT = torch.randint(0, small.vocab_size, (rows, length), device=where)
    flops = counted.flops_per_token("trained", sequence_length=length).total * rows * length
    fastest, began = float("inf"), time.perf_counter()
    for trial in range(1000):
        start = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16, enabled=device.precision == "bf16"):
            hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False)[0]
            head = model.get_output_embeddings()
            assert head is not None
            loss = head(hidden_BTD).float().logsumexp(-1).sum()
        loss.backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if trial:  # the first one sets up
            fastest = min(fastest, now - start)
            if now - began > seconds:
                break
        model.zero_grad(set_to_none=True)
    return flops / fastest / device.matmul_flops
