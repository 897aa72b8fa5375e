"""Training new rows alone: old rows bit for bit, whatever the optimizer does; own learning rates; restarts."""

import signal
from dataclasses import replace

import pytest
import torch
from training_fixtures import SETTINGS, VOCAB, rows, tiny_llama, train_steps

from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.errors import EloError, StoppedBySignalError
from elo.methods import METHODS, Setup
from elo.surgery.in_memory import detach_layers
from elo.train.arguments import training_arguments
from elo.train.bridge import fit_bridge
from elo.train.optimizer import make_optimizer

FIRST = 40
KEPT = (0, 3)
STEPS = 6


def extended_llama(*, tie: bool = False, seed: int = 0):
    model = tiny_llama(tie=tie, seed=seed)
    setattr(model.config, VOCABULARY_KEY, {"rows": {"start": FIRST, "stop": VOCAB}})
    return model


def prepared(method, model):
    phase = method.phases[0]
    bridge = None
    if phase.middle == "bridged":
        mixture = rows(40)
        bridge = fit_bridge(model, KEPT, [mixture[index] for index in range(40)])
    if phase.detached:
        model = detach_layers(model, list(KEPT))
    return model, method.prepare(model, phase, Setup(KEPT, bridge))


def find_method(name, **settings):
    return METHODS[name].model_validate({"name": name, **settings})


def new_rows(middle="removed", **settings):
    """A method that trains new rows alone with the chosen layers."""
    if middle == "frozen":
        return find_method("frozen", embedding_rows="new", **settings)
    return find_method("elo", middle=middle, embedding_rows="new", **settings)


def run(model, ready, folder, settings=SETTINGS, before_step=None):
    ready = replace(ready, before_step=before_step) if before_step else ready
    return train_steps(model, folder, steps=STEPS, settings=settings, prepared=ready)


@pytest.mark.parametrize("head_loss", ["chunked", "plain", "model"])
def test_the_head_loss_makes_no_difference(tmp_path, head_loss):
    model, ready = prepared(new_rows(), extended_llama())
    result = run(model, ready, tmp_path / "one", SETTINGS.model_copy(update={"head_loss": head_loss}))
    other, ready = prepared(new_rows(), extended_llama())
    expected = run(other, ready, tmp_path / "other")
    assert result.losses[-1]["loss"] == pytest.approx(expected.losses[-1]["loss"], rel=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "adamw_8bit"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("middle", ["removed", "bridged", "frozen"])
def test_old_rows_stay_bit_for_bit_and_new_ones_learn(tmp_path, middle, tie, optim):
    model, ready = prepared(new_rows(middle), extended_llama(tie=tie))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = SETTINGS.model_copy(update={"weight_decay": 0.1, "optim": optim})
    result = run(model, ready, tmp_path, settings)
    ready.fold()
    after = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:FIRST], before[name][:FIRST]), name
        assert not torch.equal(after[name][FIRST:], before[name][FIRST:]), name
    weights = model.model.embed_tokens.weight.numel() // VOCAB * (VOCAB - FIRST) * (1 if tie else 2)
    layers = [model.model.layers[index] for index in (KEPT if middle == "frozen" else range(2))]
    assert result.trainable_parameters == weights + sum(p.numel() for layer in layers for p in layer.parameters())
    if tie:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_optimizer_holds_no_state_for_old_rows(tmp_path):
    model, ready = prepared(new_rows(), extended_llama())
    run(model, ready, tmp_path)
    state = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.bin", weights_only=True)["state"]
    elements = sum(moments["exp_avg"].numel() for moments in state.values())
    layers = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    assert elements == layers + 2 * (VOCAB - FIRST) * 16


def test_new_rows_learn_what_training_them_by_hand_gives(tmp_path):
    """Against AdamW on all rows with the old ones put back after each update."""
    quick = SETTINGS.model_copy(update={"max_grad_norm": 0.0})
    model, ready = prepared(new_rows(), extended_llama())
    run(model, ready, tmp_path / "new", quick)
    other, plain = prepared(find_method("elo", middle="removed"), extended_llama())
    names = ("model.embed_tokens.weight", "lm_head.weight")
    old = {name: other.state_dict()[name][:FIRST].clone() for name in names}

    def put_back(*_):
        with torch.no_grad():
            for name in names:
                other.state_dict()[name][:FIRST] = old[name]

    run(other, plain, tmp_path / "all", quick, before_step=put_back)
    put_back()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], atol=1e-7), name


def test_clipping_does_not_count_what_old_rows_would_have_wanted(tmp_path):
    model, ready = prepared(new_rows(), extended_llama())
    run(model, ready, tmp_path)
    inputs = torch.arange(1, 17).unsqueeze(0)
    model(input_ids=inputs, labels=inputs).loss.backward()
    assert not model.lm_head.weight.grad[:FIRST].any(), "the norm that clipping takes is that of what moves"
    assert model.lm_head.weight.grad[FIRST:].any()


@pytest.mark.parametrize("tie", [False, True])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tie):
    def start():
        return prepared(new_rows("frozen"), extended_llama(tie=tie))

    settings = SETTINGS.model_copy(update={"embedding_learning_rate": 1e-2, "save_steps": 2})
    whole, ready = start()
    run(whole, ready, tmp_path / "whole", settings)
    ready.fold()

    def stop(step, _):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    broken, ready = start()
    with pytest.raises(StoppedBySignalError):
        run(broken, ready, tmp_path / "broken", settings, before_step=stop)
    again, ready = start()
    run(again, ready, tmp_path / "broken", settings)
    ready.fold()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("first", ["new", "all"])
def test_embedding_and_head_have_their_own_learning_rate(tmp_path, first):
    settings = SETTINGS.model_copy(
        update={"embedding_learning_rate": 7e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    )
    model, ready = prepared(find_method("elo", middle="removed", embedding_rows=first), extended_llama())
    optimizer = make_optimizer(model, settings, training_arguments(settings, 1, tmp_path), ready.first_row)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = {id(p) for layer in model.model.layers for p in layer.parameters()}
    assert {rate for key, rate in rates.items() if key in layers} == {3e-3}
    assert {rate for key, rate in rates.items() if key not in layers} == {7e-3}
    assert len(rates) == len(layers) + 2


def test_a_model_without_new_rows_is_refused():
    with pytest.raises(EloError, match=r"no record of new rows.*elo vocab extend"):
        prepared(new_rows(), tiny_llama())


@pytest.mark.parametrize(("alignment", "middle"), [("full", "trained"), ("lora", "adapted")])
def test_old_rows_stay_and_new_ones_learn_in_alignment_too(tmp_path, alignment, middle):
    method = new_rows("bridged", alignment=alignment)
    assert [phase.middle for phase in method.phases] == ["bridged", middle]
    model = extended_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = method.prepare(model, method.phases[1], Setup(KEPT))
    run(model, ready, tmp_path)
    ready.fold()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (middle == "adapted" and "norm" in name), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name][:FIRST], before[name][:FIRST])


def test_new_rows_of_nothing_are_refused():
    with pytest.raises(ValueError, match="name one in also_train"):
        new_rows(also_train=("norm",))


def test_embeddings_first_begins_with_new_rows_alone(tmp_path):
    method = find_method("embeddings_first")
    model = extended_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = method.prepare(model, method.phases[0], Setup())
    run(model, ready, tmp_path)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(model.state_dict()[name][:FIRST], before[name][:FIRST]) for name in changed)
    ready = method.prepare(model, method.phases[1], Setup())
    assert ready.first_row == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_embeddings_first_without_new_rows_trains_all_of_them(tmp_path):
    method = find_method("embeddings_first")
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    ready = method.prepare(model, method.phases[0], Setup())
    run(model, ready, tmp_path)
    assert not torch.equal(model.lm_head.weight[:FIRST], before[:FIRST])


def test_lora_can_train_embedding_and_head_beside_its_adapters(tmp_path):
    pytest.importorskip("peft")
    method = find_method("lora", rank=2, also_train=("embedding", "head"))
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = method.prepare(model, method.phases[0], Setup())
    run(model, ready, tmp_path)
    ready.fold()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
