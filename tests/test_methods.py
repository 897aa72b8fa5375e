"""Training methods: what trains, what is added for it, and that it folds back into a plain model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_fixtures import LENGTH, SETTINGS, rows, tiny_llama

import elo.methods.methods
from elo.checkpoint.counting import footprint
from elo.errors import EloError
from elo.methods.methods import METHODS, Options, Setup, find_method, select_layers
from elo.surgery.in_memory import detach_layers
from elo.train.bridge import fit_bridge
from elo.train.loop import StoppedBySignalError, rows_per_step, train
from elo.train.settings import EloOptions, LisaSettings, LoraSettings

KEPT = (0, 3)
SMALL_RANK = Options(lora=LoraSettings(rank=2))
FORWARD_ONLY = Options(elo=EloOptions(stand_in="forward_only", alignment="forward_only"))
QUICK = SETTINGS.model_copy(update={"save_steps": 100})


def _rows(count=40):
    mixture = rows(count)
    return [mixture[index] for index in range(count)]


def _ready(method, phase, model=None):
    """The model of a phase with everything that the method adds, and what it was prepared with."""
    whole = model or tiny_llama()
    bridge = fit_bridge(whole, KEPT, _rows()) if phase.needs_bridge else None
    model = detach_layers(whole, list(KEPT)) if phase.detached else whole
    return model, method.prepare(model, phase, Setup(KEPT, bridge, seed=7))


def _train(model, folder, prepared, *, steps=6, settings=QUICK):
    return train(
        model,
        rows(steps * rows_per_step(LENGTH, settings)),
        settings=settings,
        output_dir=folder,
        seed=5,
        prepared=prepared,
    )


CASES = [
    (find_method(name, options), phase)
    for name in METHODS
    for options in ([Options(), FORWARD_ONLY] if name == "elo" else [SMALL_RANK])
    for phase in find_method(name, options).phases
]


@pytest.mark.parametrize(("method", "phase"), CASES, ids=lambda each: getattr(each, "middle", None) or each.name)
def test_each_phase_learns_and_leaves_a_plain_model(tmp_path, method, phase):
    model, prepared = _ready(method, phase)
    plain = detach_layers(tiny_llama(), list(KEPT)) if phase.detached else tiny_llama()
    result = _train(model, tmp_path, prepared)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    prepared.fold()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}
    everything = set(plain.state_dict())
    kept = {name for name in everything if any(f".layers.{at}." in name for at in ((0, 1) if phase.detached else KEPT))}
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    if method.name == "lisa":
        drawn = {name.split(".")[2] for name in changed if ".layers." in name}
        assert len(drawn) == method.settings.layers
        drawn_too = {name for name in everything if ".layers." not in name or name.split(".")[2] in drawn}
        assert changed == drawn_too
        return
    expected = {
        "elo": everything if phase.middle == "computed" else kept | ends,
        "elo_paper": everything if phase.middle == "computed" else kept,
        "frozen": kept | ends,
        "embeddings_first": ends if phase.name == "embeddings" else everything,
        "lora": {name for name in everything if "_proj" in name},
    }.get(method.name, everything)
    assert changed == expected


@pytest.mark.parametrize(("method", "phase"), CASES, ids=lambda each: getattr(each, "middle", None) or each.name)
def test_what_trains_agrees_with_the_count_of_flops(method, phase):
    counted = footprint(tiny_llama())
    flops = method.flops_per_token(phase, counted, KEPT, LENGTH)
    full = find_method("full").flops_per_token(phase, counted, KEPT, LENGTH)
    assert 0 < flops <= full
    if method.name not in ("full", "full_at_wall_time", "align_only") and phase.middle != "computed":
        assert flops < full


def test_flops_order_of_what_stands_for_the_middle():
    counted = footprint(tiny_llama(12))

    def flops(stand_in):
        method = find_method("elo", Options(elo=EloOptions(stand_in=stand_in)))
        return method.flops_per_token(method.phases[0], counted, (0, 11), LENGTH)

    none, bridge, forward_only = map(flops, ("none", "bridge", "forward_only"))
    assert bridge - none == 2 * 2 * 16 * 16, "one map, forward and input gradient"
    assert none < bridge < forward_only < find_method("full").flops_per_token(None, counted, (), LENGTH)


def test_elo_paper_is_as_published_whatever_the_options_say():
    method = find_method("elo_paper", Options(elo=EloOptions(stand_in="bridge", also_train=("head",), scale=0.5)))
    assert (method.also_train, method.scale) == ((), 1.0)
    assert [phase.middle for phase in method.phases] == ["absent", "computed"]


def test_lora_merges_to_what_it_computed(tmp_path):
    method = find_method("lora", Options(lora=LoraSettings(rank=4)))
    model, prepared = _ready(method, method.phases[0])
    _train(model, tmp_path, prepared)
    ids = torch.arange(1, 12).unsqueeze(0)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        prepared.fold()
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-5)


def test_lisa_draws_few_layers_again_and_again():
    method = find_method("lisa", Options(lisa=LisaSettings(layers=1, period=3)))
    model, prepared = _ready(method, method.phases[0], tiny_llama(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    drawn = []
    for step in range(30):
        prepared.before_step(step, optimizer)
        on = [i for i, layer in enumerate(model.model.layers) if next(layer.parameters()).requires_grad]
        assert len(on) == 1
        drawn += on
        model(input_ids=torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        held = {i for i, layer in enumerate(model.model.layers) if next(layer.parameters()) in optimizer.state}
        assert held == set(on), "no optimizer state is held for layers that do not train"
    turns = [set(drawn[start : start + 3]) for start in range(0, 30, 3)]
    assert all(len(turn) == 1 for turn in turns)
    assert len(set(drawn)) > 2


@pytest.mark.parametrize("name", ["lisa", "lora", "elo"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, name):
    options = Options(
        lisa=LisaSettings(layers=1, period=2), lora=LoraSettings(rank=4), elo=EloOptions(stand_in="forward_only")
    )
    method = find_method(name, options)
    phase = method.phases[0]
    whole, prepared = _ready(method, phase)
    _train(whole, tmp_path / "whole", prepared)
    prepared.fold()

    import os
    import signal

    stopped, prepared = _ready(method, phase)

    def stop_at_three(step, optimizer, then=prepared.before_step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if then:
            then(step, optimizer)

    with pytest.raises(StoppedBySignalError):
        _train(stopped, tmp_path / "stopped", replace(prepared, before_step=stop_at_three))
    resumed, prepared = _ready(method, phase)
    _train(resumed, tmp_path / "stopped", prepared)
    prepared.fold()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


@pytest.mark.parametrize("stand_in", ["forward_only", "bridge"])
def test_recomputed_activations_give_the_same(tmp_path, stand_in):
    method = find_method("elo", Options(elo=EloOptions(stand_in=stand_in)))
    losses = []
    for recompute in (False, True):
        model, prepared = _ready(method, method.phases[0])
        settings = QUICK.model_copy(update={"activation_checkpointing": recompute, "tokens_per_step": 8 * LENGTH})
        result = _train(model, tmp_path / str(recompute), prepared, settings=settings, steps=4)
        losses.append([point["loss"] for point in result.losses])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_documents_example_is_a_method(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names = vars(elo.methods.methods) | {}
    exec(code, names)
    method = names["Norms"](Options())
    model, prepared = _ready(method, method.phases[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _train(model, tmp_path, prepared)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_unknown_method_is_named():
    with pytest.raises(EloError, match="'eol' is unknown; choose one of elo, elo_paper"):
        find_method("eol")


def test_lora_says_what_it_needs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EloError, match=r"pip install 'elo-cpt\[lora\]'"):
        find_method("lora").check()
    monkeypatch.undo()
    sharded = LoraSettings(training_arguments={"fsdp": "full_shard"})
    with pytest.raises(EloError, match="leave fsdp and deepspeed out"):
        find_method("lora", Options(lora=sharded)).check()


def test_lisa_needs_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EloError, match="one process"):
        find_method("lisa").check()


def test_parts_train_and_mind_ties():
    model = tiny_llama()
    select_layers(model, [0], ["head", "norm"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lm_head.weight", "model.norm.weight"} <= trained
    assert "model.embed_tokens.weight" not in trained
    with pytest.raises(EloError, match="ties its LM head"):
        select_layers(tiny_llama(tie=True), [0], ["head"])
