"""The share of the trained change that predicts unseen text best is found in few forward passes, and written."""

from itertools import pairwise

import pytest
import torch
from run_fixtures import write_base
from surgery_fixtures import stored
from transformers import AutoModelForCausalLM

from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.errors import EloError
from elo.evaluate import scale_search
from elo.evaluate.scale_search import lowest_scale, search_scale
from elo.surgery.scale_change import scale_change


@pytest.mark.parametrize("lowest", [-0.3, 0.02, 0.1, 0.2, 0.3, 0.36, 0.45, 0.55, 0.6, 0.7, 0.8, 0.9, 0.96, 1.0, 1.3])
def test_the_lowest_eighth_is_found(lowest):
    best, tried = lowest_scale(lambda scale: (scale - lowest) ** 2)
    eighths = [index / 8 for index in range(9)]
    assert best == min(eighths, key=lambda scale: (scale - lowest) ** 2)
    assert set(tried) <= set(eighths)
    assert len(tried) == 5 and 0 in tried


def test_the_base_is_kept_where_it_is_best_though_the_search_ends_elsewhere():
    best, tried = lowest_scale({0.0: 1.0, 0.25: 3.0, 0.5: 2.5, 0.75: 2.0, 0.875: 1.8, 1.0: 1.5}.__getitem__)
    assert best == 0 and 1.0 in tried


def test_what_is_not_a_number_is_never_the_lowest_and_not_recorded():
    best, tried = lowest_scale(lambda scale: scale if scale < 0.6 else float("nan"))
    assert best == 0 and max(tried) == 0.5
    with pytest.raises(EloError, match=r"not finite at any of the scales 0, 0\.25, 0\.375, 0\.5, 0\.75; lower"):
        lowest_scale(lambda _: float("nan"))


def _moved(folder, **arguments):
    """A base, a copy of it that was moved, and the differences."""
    base = AutoModelForCausalLM.from_pretrained(write_base(folder, **arguments))
    trained = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "q_proj" in name or "embed_tokens" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return base, trained


@pytest.mark.parametrize("tie", [False, True])
def test_it_is_tried_on_the_whole_model_and_the_base_stays(tmp_path, monkeypatch, tie):
    monkeypatch.setattr(scale_search, "_BATCH_TOKENS", 64)  # two batches of the three rows
    base, trained = _moved(tmp_path, dtype=torch.float32, tie=tie)
    before, after = ({n: t.clone() for n, t in model.state_dict().items()} for model in (base, trained))
    rows = [
        {"input_ids": ids, "shift_labels": ids + 1, "position_ids": torch.arange(32)}
        for ids in torch.arange(40, 136).view(3, 32)
    ]
    rows[1]["position_ids"] = torch.arange(32) % 20  # two documents
    best, tried = search_scale(base, trained, {"en": rows, "xx": rows[:1]})
    assert all(before[name].equal(tensor) for name, tensor in base.state_dict().items())
    assert len(set(tried.values())) == len(tried), "the model is another at each scale"
    assert best == min(tried, key=tried.__getitem__)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(before[name] + best * (after[name] - before[name]))
    nats = [_nats(base, row) for row in rows]
    assert tried[best] == pytest.approx((sum(nats) / 3 + nats[0]) / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 1.5])
def test_what_is_written_is_base_and_a_share_of_the_change(tmp_path, scale, dtype):
    _, trained = _moved(tmp_path / "base", dtype=dtype)
    setattr(trained.config, VOCABULARY_KEY, {"rows": {"start": 300, "stop": trained.config.vocab_size}})
    trained.save_pretrained(tmp_path / "trained")
    scale_change(tmp_path / "base", tmp_path / "trained", tmp_path / "out", scale)
    old, new, out = (stored(tmp_path / name) for name in ("base", "trained", "out"))
    assert out.keys() == new.keys()
    for name, tensor in out.items():
        expected = (old[name].double() + scale * (new[name].double() - old[name].double())).to(dtype)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor[300:], new[name][300:]), "new rows are taken as trained"
            tensor, expected = tensor[:300], expected[:300]
        assert tensor.dtype == dtype
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=name)
        if torch.equal(old[name], new[name]) and "embed" not in name:
            assert torch.equal(out[name], old[name]), f"{name}: did not change"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == trained.config.vocab_size


def test_another_base_is_refused(tmp_path):
    write_base(tmp_path / "base", layers=3)
    write_base(tmp_path / "trained")
    with pytest.raises(EloError, match=r"layers\.3.*is missing.*give the base of the trained checkpoint"):
        scale_change(tmp_path / "base", tmp_path / "trained", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def _nats(model, row):
    """Each document by itself."""
    starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 32]
    with torch.no_grad():
        logits = [model(input_ids=row["input_ids"][None, a:b]).logits[0] for a, b in pairwise(starts)]
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), row["shift_labels"]))
