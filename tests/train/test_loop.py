"""Training: what is frozen stays bit-identical, a restart changes nothing, packed documents stay apart."""

import copy
import signal
import sys

import pytest
import torch
from training_fixtures import LENGTH, SETTINGS, VOCAB, corpus, rows, tiny_llama, train_steps

from elo.data.mixture import Mixture
from elo.data.packing import PaddedStream
from elo.errors import EloError, StoppedBySignalError, TrainingDivergedError
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.log import Progress
from elo.methods.base import select_layers
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.train.arguments import check_settings, sequences_per_step
from elo.train.checkpoints import MANIFEST, check_checkpoint, latest_checkpoint
from elo.train.loop import train
from elo.train.loss import install_head_loss
from elo.train.phase import freeze_in

STEPS = 8


def _train(model, folder, *, steps=STEPS, **options):
    return train_steps(model, folder, steps=steps, **options)


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _detached(width=16):
    model = detach_layers(tiny_llama(width=width), [0, 3])
    select_layers(model, [0, 1])
    return model


def test_elo_pretraining_trains_the_layers_and_nothing_else(tmp_path):
    model = _detached()
    before = _weights(model)
    result = _train(model, tmp_path)
    for name, after in model.state_dict().items():
        changed = not torch.equal(after, before[name])
        assert changed == (".layers." in name), name
    assert result.trainable_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert result.tokens == STEPS * SETTINGS.tokens_per_step
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    assert [point["tokens"] for point in result.losses] == [
        SETTINGS.tokens_per_step * step for step in range(1, STEPS + 1)
    ]


def test_optimizer_has_no_state_for_what_is_frozen(tmp_path):
    model = _detached()
    _train(model, tmp_path)
    checkpoint, _ = latest_checkpoint(tmp_path, print)
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    held = sum(entry["exp_avg"].numel() for entry in state["state"].values())
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_8_bit_state_is_what_the_plan_counts_whatever_was_trained_before(tmp_path):
    # bitsandbytes has 32-bit state below 4,096 elements: of a width of 64 the matrices are just large enough.
    settings = SETTINGS.model_copy(update={"optim": "adamw_8bit"})

    def bits(model, folder):
        _train(model, folder, settings=settings, steps=2)
        checkpoint, _ = latest_checkpoint(folder, print)
        state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
        moments = [entry["__bnb_optimizer_quant_state__"]["state1"] for entry in state.values()]
        return sorted((tuple(moment.shape), 8 * moment.element_size()) for moment in moments if moment.ndim == 2)

    def of_layers(count):  # keys and values are too small
        each = [((32, 64), 32)] * 2 + [((64, 64), 8)] * 2 + [((64, 96), 8)] + [((96, 64), 8)] * 2
        return count * each

    embedding, head = ((128, 64), 32), ((128, 64), 8)
    whole = tiny_llama(width=64, vocab=128)
    assert bits(whole, tmp_path / "whole") == sorted([*of_layers(4), embedding, head])
    # Its first matrix stands where the embedding stood in the optimizer before.
    model = detach_layers(whole, [0, 3])
    select_layers(model, [0, 1])
    assert bits(model, tmp_path / "after") == sorted(of_layers(2))


@pytest.mark.parametrize(
    ("further", "arguments", "message"),
    [
        ({"optim": "adamw_8bit"}, {"fsdp": True}, "adamw_8bit does not support weights"),
        ({}, {"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "version: got 1; only FSDP2"),
        ({}, {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "state_dict_type: is set by ELO"),
        ({}, {"fsdp": True, "fsdp_config": "fsdp.json"}, "fsdp_config: got 'fsdp.json'; write a mapping"),
        (
            {"activation_checkpointing": True},
            {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
            "is on here and in fsdp_config",
        ),
    ],
)
def test_what_fsdp_cannot_do_is_told_before_any_work(further, arguments, message):
    settings = SETTINGS.model_copy(update={**further, "training_arguments": arguments})
    with pytest.raises(EloError, match=f"full.*{message}"):
        check_settings(settings, LENGTH, "full")
    off = SETTINGS.model_copy(update={"training_arguments": {**arguments, "fsdp": False}})
    assert not off.divides_model


def test_an_optimizer_that_is_not_installed_is_told_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = SETTINGS.model_copy(update={"optim": "adamw_8bit"})
    with pytest.raises(
        EloError, match=r"full\.optim: adamw_8bit needs bitsandbytes.*pip install 'elo-cpt\[adamw8bit\]'"
    ):
        check_settings(settings, LENGTH, "full")


class _StopError(Exception):
    pass


def _at_step(model, step, action):
    """Call `action` once, when the first micro-step of update `step` (from 1) begins."""
    micro_steps = SETTINGS.tokens_per_step // LENGTH // SETTINGS.per_device_train_batch_size
    calls = []

    def count(_, args, inputs):
        if "shift_labels" in inputs:
            calls.append(1)
            if len(calls) == (step - 1) * micro_steps + 1:
                action()

    model.register_forward_pre_hook(count, with_kwargs=True)


@pytest.mark.parametrize(
    ("stop_at", "optim", "make"),
    [
        (1, "adamw", _detached),
        (4, "adamw", _detached),
        (7, "adamw", _detached),
        (4, "adafactor", _detached),
        (4, "adamw_8bit", lambda: _detached(64)),
        (4, "adamw_8bit", lambda: tiny_llama(width=64, vocab=128)),  # the embedding's state is 32-bit, the head's 8-bit
    ],
)
def test_restarted_equals_uninterrupted(tmp_path, stop_at, optim, make):
    settings = SETTINGS.model_copy(update={"optim": optim})
    uninterrupted = make()
    whole = _train(uninterrupted, tmp_path / "whole", settings=settings)

    victim = make()

    def die():
        raise _StopError

    _at_step(victim, stop_at + 1, die)
    with pytest.raises(_StopError):
        _train(victim, tmp_path / "victim", settings=settings)

    restarted = make()
    result = _train(restarted, tmp_path / "victim", settings=settings)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, restarted.state_dict()[name]), name
    assert [point["loss"] for point in result.losses] == [point["loss"] for point in whole.losses]


def test_damaged_checkpoint_is_dropped_and_the_one_before_taken(tmp_path):
    _train(_detached(), tmp_path)
    newest, _ = latest_checkpoint(tmp_path, print)
    assert newest.name == f"checkpoint-{STEPS}"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    warnings = []
    found, state = latest_checkpoint(tmp_path, warnings.append)
    assert found.name == "checkpoint-6"
    assert state["seconds"] > 0
    assert "checkpoint-8 is removed" in warnings[0]
    (found / MANIFEST).unlink()
    assert latest_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1, "an unfinished checkpoint is nothing to warn of"


def test_checkpoints_are_rotated_after_the_newest_is_sealed(tmp_path):
    _train(_detached(), tmp_path)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-6", "checkpoint-8"]
    for name in names:
        check_checkpoint(tmp_path / name)


def test_accumulation_does_not_change_the_gradient(tmp_path):
    losses = []
    for micro in (1, 2, 4):
        settings = SETTINGS.model_copy(update={"per_device_train_batch_size": micro})
        result = _train(_detached(), tmp_path / str(micro), settings=settings, steps=4)
        losses.append([point["loss"] for point in result.losses])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"tokens_per_step": 100}, "full.tokens_per_step: 100 is not a multiple"),
        ({"training_arguments": {"bogus": 1}}, "TrainingArguments has no 'bogus'"),
        ({"training_arguments": {"learning_rate": 1}}, "ELO sets 'learning_rate'"),
        ({"training_arguments": {"max_steps": 1}}, "ELO sets 'max_steps'"),
    ],
)
def test_settings_are_checked_before_any_work(update, said):
    with pytest.raises(EloError) as error:
        check_settings(SETTINGS.model_copy(update=update), LENGTH, "full")
    assert said in str(error.value)


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    results = []
    for switched in (False, True):
        settings = SETTINGS.model_copy(update={"activation_checkpointing": switched})
        results.append(_train(_detached(), tmp_path / str(switched), settings=settings, steps=4))
    assert [p["loss"] for p in results[0].losses] == pytest.approx([p["loss"] for p in results[1].losses], abs=1e-6)
    assert results[1].losses[-1]["loss"] < results[1].losses[0]["loss"]


def test_adafactor_is_a_choice(tmp_path):
    settings = SETTINGS.model_copy(update={"optim": "adafactor"})
    result = _train(_detached(), tmp_path, settings=settings)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]


def test_tokens_per_step_must_fit():
    with pytest.raises(EloError, match=r"tokens_per_step: 100 is not a multiple .* = 32; write .* 96"):
        sequences_per_step(LENGTH, SETTINGS.model_copy(update={"tokens_per_step": 100}))


def test_frozen_in_bf16_as_on_a_gpu(tmp_path):
    """On a GPU frozen parameters are held in bf16 while the layers train in fp32 under bf16 autocast."""
    stored = tiny_llama().to(torch.bfloat16)
    model = detach_layers(stored, [0, 3]).float()
    select_layers(model, [0, 1])
    freeze_in(model, {id(each): torch.bfloat16 for each in model.parameters()})
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    settings = SETTINGS.model_copy(update={"bf16": True, "head_loss": "chunked"})
    held = corpus(9, 10)

    def evaluate(model):
        measured = bits_per_byte(model, held, sequence_length=LENGTH, autocast_dtype=torch.bfloat16)
        return {"bpb": {"xx": measured.bits_per_byte}}

    result = _train(model, tmp_path, settings=settings, evaluate=evaluate)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in model.model.layers.parameters())
    assert torch.equal(model.lm_head.weight, stored.lm_head.weight)
    attach_layers(stored, model.to(torch.bfloat16))


def test_head_loss_is_recognised_under_autocast():
    model = detach_layers(tiny_llama().to(torch.bfloat16), [0, 3]).float()
    select_layers(model, [0, 1])
    freeze_in(model, {id(each): torch.bfloat16 for each in model.parameters()})
    install_head_loss(model, "chunked", torch.bfloat16)
    assert "forward_model" not in model.forward.__qualname__


def test_logged_loss_is_the_mean_over_predicted_tokens(tmp_path):
    model = _detached()
    total, count = 0.0, 0
    for row in (rows(4)[i] for i in range(4)):
        ids, positions, labels = (
            torch.from_numpy(row[key]).unsqueeze(0) for key in ("input_ids", "position_ids", "shift_labels")
        )
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += int((labels != -100).sum())
    assert count < 4 * LENGTH, "some position must have no label, or the test shows nothing"
    result = _train(model, tmp_path)
    assert result.losses[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_packed_documents_do_not_see_each_other():
    model = tiny_llama(2).eval()
    ids = torch.arange(1, 17).unsqueeze(0)
    positions = torch.cat([torch.arange(6), torch.arange(10)]).unsqueeze(0)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    logits[0, 6:].sum().backward()
    assert torch.all(embedded.grad[0, :6] == 0)
    assert torch.all(embedded.grad[0, 6:].abs().sum(-1) > 0)


def test_bits_per_byte_is_logged_while_training(tmp_path):
    held = corpus(9, 10)
    measured = []

    def evaluate(model):
        assert not model.training
        measured.append(bits_per_byte(model, held, sequence_length=LENGTH).bits_per_byte)
        return {"bpb": {"xx": measured[-1]}}

    model = _detached()
    result = _train(model, tmp_path, evaluate=evaluate)
    assert [point["tokens"] // SETTINGS.tokens_per_step for point in result.evaluations] == [4, 8]
    assert [point["bpb"]["xx"] for point in result.evaluations] == measured
    assert measured[-1] == bits_per_byte(model, held, sequence_length=LENGTH).bits_per_byte


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    model = _detached()

    def poison():
        with torch.no_grad():
            next(model.model.layers.parameters()).fill_(float("nan"))

    _at_step(model, 6, poison)
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 6 .*checkpoint-3.*learning_rate"):
        _train(model, tmp_path)
    checkpoint, _ = latest_checkpoint(tmp_path, print)
    assert checkpoint.name == "checkpoint-3"


def test_spike_stops_the_run(tmp_path):
    settings = SETTINGS.model_copy(update={"max_loss_spike_nats": 1.0})
    model = _detached()

    def spoil():
        with torch.no_grad():
            model.lm_head.weight.mul_(200)

    _at_step(model, 13, spoil)
    with pytest.raises(TrainingDivergedError, match="recent median"):
        _train(model, tmp_path, settings=settings, steps=20)


def test_logged_means_do_not_span_a_checkpoint(tmp_path):
    settings = SETTINGS.model_copy(update={"logging_steps": 2, "save_steps": 3})
    whole = _train(_detached(), tmp_path / "whole", settings=settings)

    def die():
        raise _StopError

    victim = _detached()
    _at_step(victim, 5, die)
    with pytest.raises(_StopError):
        _train(victim, tmp_path / "victim", settings=settings)
    restarted = _train(_detached(), tmp_path / "victim", settings=settings)
    assert [point["loss"] for point in restarted.losses] == [point["loss"] for point in whole.losses]


def test_signal_writes_a_checkpoint_first(tmp_path):
    model = _detached()
    _at_step(model, 5, lambda: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignalError, match="SIGTERM at step 5"):
        _train(model, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert latest_checkpoint(tmp_path, print)[0].name == "checkpoint-5"
    _same_as_uninterrupted(tmp_path)


@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_a_signal_after_the_update_writes_a_checkpoint_too(step, tmp_path, monkeypatch):
    update = Progress.update

    def update_and_signal(self, done, note=""):
        update(self, done, note)
        if self.done == step * self.total // STEPS:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", update_and_signal)
    stops_at = min(step + 1, STEPS)
    with pytest.raises(StoppedBySignalError, match=f"SIGTERM at step {stops_at};"):
        _train(_detached(), tmp_path)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path, print)[0].name == f"checkpoint-{stops_at}"
    _same_as_uninterrupted(tmp_path)


def _same_as_uninterrupted(folder):
    uninterrupted, restarted = _detached(), _detached()
    _train(uninterrupted, folder / "whole")
    _train(restarted, folder)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, restarted.state_dict()[name]), name


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tmp_path):
    pytest.importorskip("torch._inductor")
    if not _has_compiler():
        pytest.skip("no C++ compiler here")
    plain, compiled = _detached(), _detached()
    expected = _train(plain, tmp_path / "plain", steps=4)
    settings = SETTINGS.model_copy(update={"torch_compile": True})
    got = _train(compiled, tmp_path / "compiled", settings=settings, steps=4)
    assert [p["loss"] for p in got.losses] == pytest.approx([p["loss"] for p in expected.losses], abs=1e-4)
    assert set(compiled.state_dict()) == set(plain.state_dict())


def _has_compiler():
    import shutil

    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def test_a_model_that_is_trained_again_runs_under_autocast_again(tmp_path):
    model = _detached()
    settings = SETTINGS.model_copy(update={"bf16": True})
    dtypes = []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, output: dtypes.append((module.training, output.dtype))
    )
    for turn in range(2):
        dtypes.clear()
        _train(model, tmp_path / str(turn), settings=settings, steps=2)
        assert {dtype for training, dtype in dtypes if training} == {torch.bfloat16}, turn


def test_training_leaves_forward_and_attention_as_they_were(tmp_path):
    model = _detached()
    copied = copy.deepcopy(model)
    _train(model, tmp_path, settings=SETTINGS.model_copy(update={"attn_implementation": "elo_varlen"}))
    assert model.config._attn_implementation == copied.config._attn_implementation
    ids = torch.arange(5).unsqueeze(0)
    assert model(input_ids=ids).logits.shape == copied(input_ids=ids).logits.shape


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_models_that_cannot_isolate_documents_train_unpacked_only(tmp_path, family):
    from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

    torch.manual_seed(0)
    config = {
        "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=3, n_head=2),
        "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, state_size=4),
    }[family]
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(True)
    with pytest.raises(EloError, match=r"data\.packing: false"):
        _train(model, tmp_path / "packed")
    stream = PaddedStream(corpus(1), LENGTH, 1)
    unpacked = Mixture([("xx", 1.0, stream)]).sequences(0, 6 * 4)
    result = train(model, unpacked, settings=SETTINGS, output_dir=tmp_path / "unpacked", seed=0)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
