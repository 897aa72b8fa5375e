"""Measure the rate that this machine reaches on a model, by training one decoder layer for a few seconds."""

import time

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from elo.checkpoint.counting import footprint
from elo.checkpoint.model_config import text_config_of
from elo.plan.devices import Device
from elo.surgery.layer_config import with_layers

_VOCABULARY = 1024
_MOST_FLOPS = 2e12
"""Maximum FLOPs of one trial, so that a large model on a slow machine takes only seconds."""


def measure_utilisation(
    config: PretrainedConfig,
    device: Device,
    *,
    layer: int = 0,
    tokens: int = 2048,
    sequence_length: int = 2048,
    seconds: float = 3.0,
) -> float:
    """Measure the share of the matrix-product rate that forward and backward of one decoder layer reach.

    The layer has the model's shapes and random weights; the vocabulary is cut to 1,024. The share includes norms,
    activations, attention and the cost of small products, but not the optimizer.

    Args:
        config: configuration of the model.
        device: result of `measure_matmul_rate`.
        layer: index of the decoder layer.
        tokens: number of tokens in a micro-step; reduced if a trial would take too long.
        sequence_length: T.
        seconds: duration of the measurement, in seconds; the fastest trial counts.

    Returns:
        A share above 0. It can exceed 1 if the layer's products are faster than the square products of `device`.
    """
    small = with_layers(text_config_of(config), [layer])
    small.vocab_size = min(_VOCABULARY, small.vocab_size)
    small.pad_token_id = None
    where = torch.device("cuda" if device.kind == "gpu" else "cpu")
    counted = footprint(small)
    length = min(sequence_length, tokens)
    per_token = counted.flops_per_token("trained", sequence_length=length).total
    while length > 64 and length * per_token > _MOST_FLOPS:
        length //= 2
    num_sequences = max(1, min(tokens // length, int(_MOST_FLOPS / per_token / length)))
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        with where:
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).train()
        ids_BT = torch.randint(0, small.vocab_size, (num_sequences, length), device=where)
    flops = counted.flops_per_token("trained", sequence_length=length).total * num_sequences * length
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
        if trial:  # the first trial includes set-up
            fastest = min(fastest, now - start)
            if now - began > seconds:
                break
        model.zero_grad(set_to_none=True)
    return flops / fastest / device.matmul_flops
