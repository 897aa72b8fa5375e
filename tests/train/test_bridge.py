"""The linear bridge: it is the best affine map, it goes where the middle was, and it leaves nothing behind."""

import copy

import pytest
import torch
from run_fixtures import write_base
from training_fixtures import SETTINGS, rows, tiny_llama, train_steps
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from zoo import FAMILIES, tiny_config, tiny_model

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.layers import Gap, gaps_between
from elo.errors import EloError, MethodFailedError
from elo.methods.base import select_layers
from elo.run import bridge_tokens
from elo.surgery.in_memory import detach_layers
from elo.train import bridge as train_bridge
from elo.train.bridge import RIDGES, Bridge, fit_bridge, install_bridge


def _rows(count=80):
    mixture = rows(count)
    return [mixture[index] for index in range(count)]


def _inputs(row):
    return {name: torch.from_numpy(row[name]).unsqueeze(0) for name in ("input_ids", "position_ids")}


def _linear_middle(model):
    """Make the middle of a Llama an affine function of what enters it: attention off, MLP off."""
    for layer in model.model.layers[1:3]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


@pytest.mark.parametrize(
    ("layers", "gaps"),
    [
        ([0, 3], [(1, 1, 3)]),
        ([0, 1, 2, 3], []),
        ([0, 2, 5], [(1, 1, 2), (2, 3, 5)]),
        ([1, 3], [(0, 0, 1), (1, 2, 3)]),
        ([0], [(1, 1, 4)]),
    ],
)
def test_gaps_are_the_runs_left_out(layers, gaps):
    assert gaps_between(layers, max(4, layers[-1] + 1)) == [Gap(*gap) for gap in gaps]


def test_a_middle_that_does_nothing_is_bridged_exactly():
    model = _linear_middle(tiny_llama())
    bridge = fit_bridge(model, [0, 3], _rows())
    assert bridge.weights[0].abs().max() < 1e-4
    detached = detach_layers(model, [0, 3])
    install_bridge(detached, bridge)
    inputs = {**_inputs(_rows(1)[0]), "use_cache": False}
    torch.testing.assert_close(detached(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_fit_is_weighted_least_squares():
    model = tiny_llama()
    found = fit_bridge(model, [0, 3], _rows(), ridges=(0.0,))
    entering, leaving = [], []
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model.model.layers[3].register_forward_pre_hook(lambda _, inputs: leaving.append(inputs[0]))
    with torch.no_grad():
        for row in _rows():
            model(**_inputs(row), use_cache=False)
    x, y = torch.cat(entering, 1)[0].double(), torch.cat(leaving, 1)[0].double()
    size = y.square().mean(-1, keepdim=True).sqrt()
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    expected = torch.linalg.lstsq(design / size, (y - x) / size).solution
    # 80 rows of 16 tokens are one batch, on which everything is fitted.
    torch.testing.assert_close(found.weights[0].double(), expected[:-1].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.biases[0].double(), expected[-1], atol=1e-3, rtol=1e-3)
    assert 0 < found.explained[0] < 1


def test_explained_is_measured_on_tokens_that_were_not_fitted():
    torch.manual_seed(0)
    few = fit_bridge(tiny_llama(), [0, 3], _rows(1), ridges=(0.0,)).explained[0]
    assert few > 0.99  # 16 tokens, 17 unknowns a dimension: fits them by heart
    noisy = [
        {"input_ids": torch.randint(0, 61, (512,)).numpy(), "position_ids": (torch.arange(512) % 64).numpy()}
        for _ in range(16)
    ]
    checked = fit_bridge(tiny_llama(), [0, 3], noisy).explained[0]
    fitted = fit_bridge(tiny_llama(), [0, 3], noisy[:8]).explained[0]
    assert checked < fitted


def test_bridge_is_closer_to_the_whole_model_than_nothing():
    model = tiny_llama(8)
    for layer in model.model.layers:  # a middle that does something
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    detached = detach_layers(model, [0, 7])
    row = {**_inputs(_rows(90)[-1]), "use_cache": False}
    with torch.no_grad():
        whole = model(**row).logits
        apart = (detached(**row).logits - whole).square().mean()
        undo = install_bridge(detached, fit_bridge(model, [0, 7], _rows()))
        bridged = (detached(**row).logits - whole).square().mean()
        assert bridged < 0.8 * apart
        undo()
        assert (detached(**row).logits - whole).square().mean() == apart


def test_installing_leaves_no_trace_in_what_is_saved(tmp_path):
    model = tiny_llama()
    detached = detach_layers(model, [0, 3])
    names, before = set(detached.state_dict()), copy.deepcopy(dict(detached.named_parameters()))
    undo = install_bridge(detached, fit_bridge(model, [0, 3], _rows()))
    assert set(detached.state_dict()) == names
    assert dict(detached.named_parameters()).keys() == before.keys()
    undo()
    assert not [name for name, _ in detached.named_buffers() if "elo" in name]
    assert not [m for m in detached.modules() if m._forward_pre_hooks]


def test_bridge_is_frozen_and_its_layers_learn(tmp_path):
    model = tiny_llama()
    bridge = fit_bridge(model, [0, 3], _rows())
    detached = detach_layers(model, [0, 3])
    select_layers(detached, [0, 1])
    install_bridge(detached, bridge)
    held = detached.model.layers[1].elo_bridge_weight.clone()
    settings = SETTINGS.model_copy(update={"save_steps": 100})
    result = train_steps(detached, tmp_path, steps=8, settings=settings)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    assert torch.equal(detached.model.layers[1].elo_bridge_weight, held)
    assert torch.equal(held, bridge.weights[0])


def _noisy(count=16, length=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(0, 61, (length,), generator=generator).numpy(),
            "position_ids": (torch.arange(length) % 64).numpy(),
        }
        for _ in range(count)
    ]


def _active_middle(layers=4):
    model = tiny_llama(layers)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    return model


def test_the_ridge_that_explains_most_of_unseen_tokens_is_taken(monkeypatch):
    monkeypatch.setattr(train_bridge, "_BATCH_TOKENS", 256)
    rows = _noisy(9, 256)  # nine batches, of which two are checked
    chosen = fit_bridge(_active_middle(), [0, 3], rows)
    each = {ridge: fit_bridge(_active_middle(), [0, 3], rows, ridges=(ridge,)) for ridge in RIDGES}
    best = max(each, key=lambda ridge: each[ridge].explained[0])
    assert chosen.ridge == (best,)
    assert chosen.explained == each[best].explained
    assert torch.equal(chosen.weights[0], each[best].weights[0])
    assert 0 < chosen.cosine[0] <= 1


def test_explained_is_that_of_the_tokens_it_was_not_fitted_on(monkeypatch):
    """Against the share computed by hand on the second batch, which is the one that is checked."""
    monkeypatch.setattr(train_bridge, "_BATCH_TOKENS", 256)
    model = _active_middle()
    rows = _noisy(3, 256)
    bridge = fit_bridge(model, [0, 3], rows, ridges=(0.1,))
    seen: dict[str, torch.Tensor] = {}
    for name, layer in (("x", 1), ("y", 3)):
        model.model.layers[layer].register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0][0]}))
    with torch.no_grad():
        model(**_inputs(rows[1]), use_cache=False)
    x, y = seen["x"].double(), seen["y"].double()
    weight = y.square().mean(-1, keepdim=True).rsqrt()
    change = (y - x) * weight
    found = (x @ bridge.weights[0].double().T + bridge.biases[0].double()) * weight
    mean = (weight * change).sum(0) / weight.square().sum() * weight
    explained = 1 - (change - found).square().sum() / (change - mean).square().sum()
    assert bridge.explained[0] == pytest.approx(float(explained), abs=1e-3)
    cosine = torch.nn.functional.cosine_similarity(change.flatten(), found.flatten(), dim=0)
    assert bridge.cosine[0] == pytest.approx(float(cosine), abs=1e-3)


@pytest.mark.parametrize("length", [16, 4096, 8192, 32768])
def test_a_run_measures_a_bridge_on_tokens_that_it_does_not_fit(length):
    row = {"input_ids": torch.zeros(length, dtype=torch.int64)}
    rows = [row] * -(-bridge_tokens(64, length) // length)
    assert len(list(train_bridge._batches(rows, tiny_llama().config))) > 1


def test_a_bridge_that_explains_little_is_refused():
    bridge = fit_bridge(_active_middle(), [0, 3], _rows())
    bridge.require(min(0.0, bridge.explained[0]))
    with pytest.raises(
        MethodFailedError, match=r"layers 1 to 2 explains .*cosine .*less than 100%; choose more layers"
    ):
        bridge.require(1.0)


def test_round_trip_through_a_file(tmp_path):
    bridge = fit_bridge(tiny_llama(6), [0, 2, 5], _rows())
    bridge.save(tmp_path / "elo_bridge.safetensors")
    again = Bridge.load(tmp_path / "elo_bridge.safetensors")
    assert again.gaps == bridge.gaps and again.explained == bridge.explained
    assert again.cosine == bridge.cosine and again.ridge == bridge.ridge and len(again.ridge) == 2
    for ours, theirs in zip((*bridge.weights, *bridge.biases), (*again.weights, *again.biases), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "b.safetensors").write_bytes(content)
    with pytest.raises(EloError, match=r"b\.safetensors: cannot be read as a bridge"):
        Bridge.load(tmp_path / "b.safetensors")


def test_a_bridge_beside_a_checkpoint_does_not_disturb_transformers(tmp_path):
    write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    bridge = fit_bridge(model, [0, 3], _small_rows(model.config.vocab_size))
    detach_layers(model, [0, 3]).save_pretrained(tmp_path / "detached")
    bridge.save(tmp_path / "detached" / "elo_bridge.safetensors")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "detached", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def _small_rows(vocab):
    return [{"input_ids": torch.arange(32).numpy() % vocab, "position_ids": torch.arange(32).numpy()}]


def _gemma3():
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=8,
        )
    )  # fmt: skip


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=4, n_head=2, n_positions=64))


@pytest.mark.parametrize("build", [_gemma3, _gpt2])
@pytest.mark.parametrize("kept", [[0, 3], [0, 1], [1, 2]])
def test_other_families_and_ends(build, kept):
    torch.manual_seed(0)
    model = build().eval()
    bridge = fit_bridge(model, kept, _rows())
    detached = detach_layers(model, kept)
    install_bridge(detached, bridge)
    inputs = {"input_ids": torch.arange(12).unsqueeze(0)}
    loss = detached(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_bridged(name):
    """What crosses the bridge is what the fit promises, the first layer has a gradient, and nothing of it stays."""
    model_type, particular = FAMILIES[name]
    model = tiny_model(tiny_config(model_type, **particular)).eval()
    ids = torch.arange(1, 21).unsqueeze(0)
    padded = [{"input_ids": ids[0], "attention_mask": torch.ones(20, dtype=torch.int64)}] * 4
    bridge = fit_bridge(model, [0, 3], padded)
    assert all(torch.isfinite(weight).all() for weight in bridge.weights)
    detached = detach_layers(model, [0, 3]).eval()
    plain = detached(input_ids=ids, use_cache=False).logits.detach()
    select_layers(detached, [0, 1])
    undo = install_bridge(detached, bridge)
    crossed: dict[str, torch.Tensor] = {}
    layers_of(detached)[1].register_forward_pre_hook(
        lambda _, x, k: crossed.update(after=x[0] if x else k["hidden_states"]), with_kwargs=True
    )
    layers_of(detached)[0].register_forward_hook(
        lambda _, __, out: crossed.update(before=out[0] if isinstance(out, tuple) else out)
    )
    logits = detached(input_ids=ids, use_cache=False).logits
    before, after = crossed["before"], crossed["after"]
    expected = before + before @ bridge.weights[0].T + bridge.biases[0]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))
    logits.square().sum().backward()
    layers = layers_of(detached)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layers[0].parameters())
    undo()
    assert torch.equal(detached(input_ids=ids, use_cache=False).logits, plain)
    assert not [name for name, _ in detached.named_buffers() if "elo" in name]


def test_nothing_left_out_has_nothing_to_bridge():
    with pytest.raises(EloError, match=r"method\.middle: bridged: every layer is chosen"):
        fit_bridge(tiny_llama(), [0, 1, 2, 3], _rows(2))
