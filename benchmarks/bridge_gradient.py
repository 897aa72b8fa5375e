"""Compare the gradient past the middle with what a bridge's Jacobian would make of it, on a real model.

    python benchmarks/bridge_gradient.py COMPARISON.yaml --layers first:1,last:1 --output results/bridge_gradient.json

Fits a bridge as ELO does, then takes one batch through the whole model. The gradient of the loss where the middle is
left is mapped to where it is entered, by the bridge's Jacobian and by the identity, and compared with autograd's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elo.budget import divide_budget
from elo.checkpoint.architecture import layers_of
from elo.checkpoint.layers import parse_layers
from elo.config import contestant_run, load_comparison
from elo.evaluate.loading import load_model
from elo.run import open_run, prepare_data
from elo.train.bridge import RIDGES, fit_bridge

FIT_TOKENS, BATCH_TOKENS = 9216, 1024


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine between two tensors taken as vectors."""
    return float(torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="comparison whose model and text are used")
    parser.add_argument("--layers", default="first:1,last:1")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    comparison = load_comparison(arguments.comparison)
    name = next(iter(comparison.contestants))
    run = contestant_run(comparison, name, Path(comparison.output), learning_rates={}, tokens=10**6, seed=1)
    with open_run(run) as inputs:
        sequences = divide_budget(run, prepare_data(inputs), lambda _: None)
        model: Any = load_model(str(inputs.base.path), device="cpu", dtype=torch.float32)
        layers = parse_layers(arguments.layers, len(layers_of(model)))
        rows = sequences.first(FIT_TOKENS + BATCH_TOKENS)
    num_batch = BATCH_TOKENS // run.data.sequence_length
    fitted, batch = range(len(rows) - num_batch), range(len(rows) - num_batch, len(rows))
    kept: dict[str, Tensor] = {}

    def keep(where: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden.retain_grad()
            kept[where] = hidden

        return hook

    bridges = {ridge: fit_bridge(model, layers, (rows[i] for i in fitted), ridges=(ridge,)) for ridge in RIDGES}
    (gap,) = bridges[RIDGES[0]].gaps
    for where, index in (("entered", gap.start), ("left", gap.stop)):
        layers_of(model)[index].register_forward_pre_hook(keep(where), with_kwargs=True)
    inputs_BT, positions_BT, labels_BT = (
        torch.stack([torch.as_tensor(rows[i][key]) for i in batch])
        for key in ("input_ids", "position_ids", "shift_labels")
    )
    logits = model(input_ids=inputs_BT, position_ids=positions_BT, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten()).backward()
    true, above = kept["entered"].grad, kept["left"].grad
    assert true is not None and above is not None
    record = {
        "model": run.model,
        "layers": list(layers),
        "batch_tokens": inputs_BT.numel(),
        "identity_cosine": cosine(true, above),
        "bridges": [
            {
                "ridge": ridge,
                "explained": bridge.explained[0],
                "gradient_cosine": cosine(true, above + above @ bridge.weights[0]),
            }
            for ridge, bridge in bridges.items()
        ],
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
