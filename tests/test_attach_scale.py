"""The scale at which what was trained is attached is found in few forward passes, and leaves the base as it was."""

from itertools import pairwise

import pytest
import torch
from run_fixtures import write_base
from transformers import AutoModelForCausalLM

from elo.errors import EloError
from elo.methods import attach_scale
from elo.methods.attach_scale import lowest_scale, search_scale
from elo.surgery.in_memory import attach_layers, detach_layers


@pytest.mark.parametrize("lowest", [0.02, 0.1, 0.2, 0.3, 0.36, 0.45, 0.55, 0.6, 0.7, 0.8, 0.9, 0.96, 1.0, 1.3])
def test_the_lowest_eighth_is_found(lowest):
    best, tried = lowest_scale(lambda scale: (scale - lowest) ** 2)
    eighths = [index / 8 for index in range(1, 9)]
    assert best == min(eighths, key=lambda scale: (scale - lowest) ** 2)
    assert set(tried) <= set(eighths)
    assert len(tried) <= (5 if best < 0.5 else 4)


def test_what_is_not_a_number_is_never_the_lowest_and_not_recorded():
    best, tried = lowest_scale(lambda scale: scale if scale < 0.6 else float("nan"))
    assert best == 0.125 and max(tried) == 0.5
    with pytest.raises(EloError, match=r"not finite, at none of the scales 0\.25, 0\.375, 0\.5, 0\.75; lower"):
        lowest_scale(lambda _: float("nan"))


def test_it_is_that_of_the_attached_model_and_the_base_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(attach_scale, "_BATCH_TOKENS", 64)  # two batches of the three rows
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path, dtype=torch.float32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [
        {"input_ids": ids, "shift_labels": ids + 1, "position_ids": torch.arange(32)}
        for ids in torch.arange(40, 136).view(3, 32)
    ]
    rows[1]["position_ids"] = torch.arange(32) % 20  # two documents
    trained = detach_layers(model, (0, 3))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    best, tried = search_scale(model, trained, {"en": rows, "xx": rows[:1]})
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert len(set(tried.values())) == len(tried), "scales were attached"
    assert best == min(tried, key=tried.__getitem__)
    attach_layers(model, trained, scale=best)
    nats = [_nats(model, row) for row in rows]
    assert tried[best] == pytest.approx((sum(nats) / 3 + nats[0]) / 2, rel=1e-5)


def _nats(model, row):
    """Each document by itself."""
    starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 32]
    with torch.no_grad():
        logits = [model(input_ids=row["input_ids"][None, a:b]).logits[0] for a, b in pairwise(starts)]
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), row["shift_labels"]))
