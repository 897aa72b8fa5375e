"""Methods: what trains, that its gradient is what the method claims, and that a plain model comes out."""

import re
from pathlib import Path

import pytest
import torch
from method_fixtures import CASES, FIRST_NEW_ROW, KEPT, SEED, Case, case_id, method
from peft.tuners.tuners_utils import BaseTunerLayer
from training_fixtures import LENGTH, SETTINGS, rows, tiny_llama, train_steps
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from zoo import FAMILIES, tiny_config, tiny_model

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.counting import footprint
from elo.errors import EloError
from elo.methods import METHODS, Phase, Setup, base
from elo.methods.base import select_layers
from elo.methods.frozen import topmost_block
from elo.methods.gradient_floor import GradientFloor
from elo.train.loss import install_head_loss
from elo.train.settings import TrainingSettings

QUICK = SETTINGS.model_copy(update={"save_steps": 100})
ONE_STEP = SETTINGS.model_copy(
    update={
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "evaluations": 0,
    }
)
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}


def _train(model, folder, prepared, *, steps=6, settings=QUICK):
    return train_steps(model, folder, steps=steps, settings=settings, prepared=prepared)


def _loss(model, count=4):
    """Mean nats per predicted token of the first rows, by the model's own forward."""
    mixture = rows(count)
    batch = {
        name: torch.stack([torch.from_numpy(mixture[index][name]) for index in range(count)])
        for name in ("input_ids", "position_ids", "shift_labels")
    }
    labels = batch.pop("shift_labels")
    logits = model(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _exact(case, **arguments):
    """The gradient of every parameter by autograd, of the model that the phase trains, by name."""
    model, prepared = case.ready(**arguments)
    if case.phase.middle in ("adapted", "frozen"):  # adapters begin at no change; nothing is cut off or scaled
        prepared.fold()
    model.requires_grad_(True)
    _loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _cosine(left, right):
    return float(torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_each_phase_learns_changes_what_it_may_and_leaves_a_plain_model(tmp_path, case):
    plain = case.start()
    model, prepared = case.ready()
    result = _train(model, tmp_path, prepared)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    prepared.fold()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}
    if case.method.name == "lisa":
        drawn = {int(name.split(".")[2]) for name in changed if ".layers." in name}
        allowed = case.may_change(model)
        assert allowed >= changed
        assert changed >= {name for name in allowed if ".layers." in name and int(name.split(".")[2]) in drawn}
        return
    assert changed == case.may_change(model)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", [case for case in CASES if case.phase.middle != "adapted"], ids=case_id)
def test_an_update_is_the_gradient_that_autograd_gives(tmp_path, case, tie):
    """One step of plain SGD through the training loop; what has no gradient does not move at all."""
    model, prepared = case.ready(tie=tie)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _train(model, tmp_path, prepared, steps=1, settings=ONE_STEP)
    exact = _exact(case, tie=tie)
    moved = {name: before[name] - tensor for name, tensor in model.state_dict().items()}
    moved = {name: change for name, change in moved.items() if change.any()}
    assert moved.keys() <= case.may_change(model)
    if not case.stochastic:
        assert moved.keys() == case.may_change(model)
    assert any(".layers." in name for name in moved) or case.phase.name == "embeddings"
    scale = _scale_of_the_first_update(case)
    for name, change in moved.items():
        expected = exact[name].clone()
        if prepared.first_row and name in ENDS:
            expected[: prepared.first_row] = 0
        if name in ENDS and (scale != 1 or _is_cut_off(case)):
            continue  # test_the_embedding_gets_the_heads_part_alone, test_..._is_unbiased
        factor = scale if any(f".layers.{layer}." in name for layer in (0,)) else 1.0
        assert _cosine(change, expected) > 0.999, name
        torch.testing.assert_close(change, factor * expected, rtol=1e-2, atol=1e-5, msg=name)


def _forget(parameter):
    """No optimizer state is kept here."""


def _is_cut_off(case):
    """Whether the first update computes no gradient for the embedding's input side."""
    model, prepared = case.ready()
    if prepared.before_step is None:
        return False
    prepared.before_step(0, _forget)
    _loss(model).backward()
    return model.model.embed_tokens.weight.grad is None


def _scale_of_the_first_update(case):
    share = getattr(case.method, "backward_share", 1.0)
    return 1.0 if share in (0.0, 1.0) or _is_cut_off(case) else 1 / share


@pytest.mark.parametrize("case", [case for case in CASES if case.phase.middle == "adapted"], ids=case_id)
def test_an_update_of_adapters_is_the_chain_rule(tmp_path, case):
    """With W + s B A and B = 0: one step of SGD moves W by -lr s^2 (dL/dW) A^T A."""
    model, prepared = case.ready()
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted.keys() == case.adapted(case.start())
    down = {name: module.lora_A["default"].weight.detach().clone() for name, module in adapted.items()}
    scale = next(iter(adapted.values())).scaling["default"]
    before = {name: tensor.clone() for name, tensor in case.start().state_dict().items()}
    _train(model, tmp_path, prepared, steps=1, settings=ONE_STEP)
    prepared.fold()
    exact = _exact(case)
    for name, matrix in down.items():
        change = before[f"{name}.weight"] - model.state_dict()[f"{name}.weight"]
        assert _cosine(change, scale**2 * exact[f"{name}.weight"] @ matrix.T @ matrix) > 0.999, name
    rows = slice(FIRST_NEW_ROW if case.method.needs_new_rows else 0, None)
    for name in ENDS if case.phase.also_train else ():
        assert _cosine((before[name] - model.state_dict()[name])[rows], exact[name][rows]) > 0.999, name


def _gradients(case, updates, tie=False):
    """Gradients by parameter of the same rows at updates 0, 1, ..., of a model that does not move."""
    model, prepared = case.ready(tie=tie)
    for step in range(updates):
        prepared.before_step(step, _forget)
        model.zero_grad()
        _loss(model).backward()
        yield {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_mean_of_a_share_of_backward_passes_is_the_exact_gradient(tie):
    """Each update has the exact gradient times 1/share below the topmost block, or none: unbiased, never in between."""
    share, updates = 0.5, 200
    case = Case("frozen", chosen := method("frozen", backward_share=share), chosen.phases[0])
    exact = _exact(case, tie=tie)
    total = {name: torch.zeros_like(gradient) for name, gradient in exact.items()}
    opened = 0
    for found in _gradients(case, updates, tie):
        first = found["model.layers.0.mlp.up_proj.weight"]
        opened += first is not None
        for name, gradient in found.items():
            if gradient is not None:
                total[name] += gradient
        if first is not None:
            torch.testing.assert_close(first, exact["model.layers.0.mlp.up_proj.weight"] / share, rtol=1e-3, atol=1e-7)
        top = "model.layers.3.mlp.up_proj.weight"
        torch.testing.assert_close(found[top], exact[top], rtol=1e-3, atol=1e-7)
        assert all(found[f"model.layers.{layer}.mlp.up_proj.weight"] is None for layer in (1, 2))
    standard_error = ((1 - share) / share / updates) ** 0.5
    assert abs(opened / updates / share - 1) < 3 * standard_error, f"{opened} of {updates}"
    assert opened not in (0, updates)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        ratio = float((total[name] / updates * exact[name]).sum() / exact[name].square().sum())
        assert abs(ratio - 1) < 3 * standard_error, f"{name}: {ratio:.3f}, standard error {standard_error:.3f}"
        assert _cosine(total[name], exact[name]) > 0.999
    name = "model.embed_tokens.weight"  # tied, it has the head's part in every update
    error = (total[name] / updates - exact[name]).norm() / exact[name].norm()
    assert error < 3 * standard_error, f"embedding: {error:.3f}"


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_mean_is_exact_with_losses_of_internal_layers_too(tie):
    """The share times the gradient of a whole update, plus the rest times that of another, is the gradient."""
    share, supervised = 0.25, {0: 0.5, 1: 0.7, 2: 0.9}
    case = Case("frozen", chosen := method("frozen", backward_share=share), chosen.phases[0])
    batch = {name: torch.from_numpy(value).unsqueeze(0) for name, value in rows(1)[0].items()}

    def gradients(model):
        model.zero_grad()
        model(**batch).loss.backward()
        return {
            name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in model.named_parameters()
        }

    whole = case.start(tie=tie)
    install_head_loss(whole, supervised=supervised)
    exact = gradients(whole)
    model, prepared = case.ready(tie=tie)
    install_head_loss(model, supervised=supervised, supervised_output=prepared.supervised_output)
    found = {}
    for step in range(20):
        prepared.before_step(step, _forget)
        found[model.model.layers[0].mlp.up_proj.weight.requires_grad] = gradients(model)
    for name in case.may_change(model) & exact.keys():
        mean = share * found[True][name] + (1 - share) * found[False][name]
        torch.testing.assert_close(mean, exact[name], rtol=1e-3, atol=1e-4 * float(exact[name].abs().max()), msg=name)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings", [{"name": "frozen", "backward_share": 0}, {"name": "lisa", "window": True}], ids=str
)
def test_below_the_floor_there_is_no_gradient_at_all(settings, tie):
    chosen = method(**settings)
    case = Case(chosen.name, chosen, chosen.phases[0])
    exact = _exact(case, tie=tie)
    head = _gradient_of_the_head_alone(case) if tie else None
    floors = set()
    for found in _gradients(case, 12, tie):
        trained = [layer for layer in range(4) if found[f"model.layers.{layer}.mlp.up_proj.weight"] is not None]
        floors.add(trained[0])
        assert trained == [3] if chosen.name == "frozen" else len(trained) == 2
        for layer in trained:
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            assert _cosine(found[name], exact[name]) > 0.999
        embedding = found["model.embed_tokens.weight"]
        if trained[0] == 0:
            torch.testing.assert_close(embedding, exact["model.embed_tokens.weight"], rtol=1e-3, atol=1e-7)
        elif tie:
            torch.testing.assert_close(embedding, head, rtol=1e-3, atol=1e-7)
            assert _cosine(embedding, exact["model.embed_tokens.weight"]) < 0.999, "its input side does not count"
        else:
            assert embedding is None
    assert len(floors) > 1 or chosen.name == "frozen"


def _gradient_of_the_head_alone(case):
    """By autograd, of a model whose head is a copy of the embedding that it is otherwise tied to."""
    model = case.start(tie=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    _loss(model).backward()
    return model.lm_head.weight.grad


def test_layers_below_the_floor_keep_nothing_for_a_backward_pass():
    model = tiny_llama()
    select_layers(model, [3], ["embedding", "head"])
    floor = GradientFloor(model)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out.requires_grad}))
    floor.close()
    _loss(model)
    assert seen == {0: False, 1: False, 2: False, 3: True}
    floor.open()
    _loss(model)
    assert all(seen.values())
    floor.remove()
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_floor_in_every_family(name):
    """What leaves the top layer downwards is doubled, or there is none; the top layer has its own gradient always."""
    model_type, particular = FAMILIES[name]
    model = tiny_model(tiny_config(model_type, **particular)).eval()
    layers, ids = layers_of(model), torch.arange(1, 21).unsqueeze(0)
    select_layers(model, [0, 3])

    def gradients():
        model.zero_grad()
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found = [[each.grad for each in layers[at].parameters() if each.grad is not None] for at in (0, 3)]
        return [torch.cat([gradient.flatten() for gradient in each]) if each else None for each in found]

    first, top = gradients()
    floor = GradientFloor(model)
    floor.open(3, 2.0)
    doubled, same = gradients()
    torch.testing.assert_close(doubled, 2 * first, rtol=1e-3, atol=1e-4 * float(first.abs().max()))
    torch.testing.assert_close(same, top, rtol=1e-3, atol=1e-4 * float(top.abs().max()))
    floor.close()
    layers[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    seen = []
    layers[2].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    none, same = gradients()
    assert none is None
    assert not seen[0].requires_grad, "nothing below is differentiated"
    torch.testing.assert_close(same, top, rtol=1e-3, atol=1e-4 * float(top.abs().max()))
    floor.remove()
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize(
    ("layers", "top"), [((0, 3), 3), ((0, 2, 3), 2), ((1, 2, 3), 1), ((0,), 0), ((0, 1, 5, 7, 8), 7)]
)
def test_topmost_block(layers, top):
    assert topmost_block(layers) == top


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_what_trains_agrees_with_the_count_of_flops(case):
    counted = footprint(tiny_llama())
    flops = case.method.flops_per_token(case.phase, counted, KEPT, LENGTH).total
    full = method("full").flops_per_token(method("full").phases[0], counted, KEPT, LENGTH).total
    if case.phase.middle == "trained" and case.method.module == "layer":
        assert flops == full
    elif case.method.name in ("lora", "depth_lora"):
        assert flops > 0  # adapters of rank 2 on a width of 16 are no saving
    else:
        assert 0 < flops < full or case.phase.middle == "adapted"


def test_flops_order_of_what_becomes_of_the_middle():
    counted = footprint(tiny_llama(12))

    def flops(name, **settings):
        chosen = method(name, **settings)
        return chosen.flops_per_token(chosen.phases[0], counted, (0, 11), LENGTH).total

    removed, bridged = flops("elo", middle="removed"), flops("elo")
    top, half, frozen = (flops("frozen", backward_share=share) for share in (0.0, 0.5, 1.0))
    assert bridged - removed == 2 * 2 * 16 * 16, "one map, forward and input gradient"
    assert removed < bridged < top < half < frozen < flops("full")
    assert half == pytest.approx((top + frozen) / 2)
    assert flops("lisa", window=True) < flops("lisa") < flops("full")


def test_elo_paper_is_as_published():
    paper = method("elo_paper")
    assert (paper.also_train, paper.scale, paper.share) == ((), 1.0, 0.1)
    assert [phase.middle for phase in paper.phases] == ["removed", "trained"]
    for settings in ({"middle": "bridged"}, {"also_train": ["head"]}, {"scale": 0.5}, {"alignment": "lora"}):
        with pytest.raises(ValueError):
            method("elo_paper", **settings)


def test_every_method_divides_the_whole_budget():
    for name in METHODS:
        chosen = method(name)
        parts = {phase.portion for phase in chosen.phases}
        assert parts in ({"all"}, {"pretraining", "alignment"}, {"alignment"}), name
        assert (chosen.alignment_share > 0) == ("alignment" in parts), name
        assert len({phase.name for phase in chosen.phases}) == len(chosen.phases), name
        assert chosen.label and type(chosen).__doc__


def test_lora_merges_to_what_it_computed(tmp_path):
    chosen = method("lora", rank=4)
    model, prepared = Case("lora", chosen, chosen.phases[0]).ready()
    _train(model, tmp_path, prepared)
    ids = torch.arange(1, 12).unsqueeze(0)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        prepared.fold()
        torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_plain_linear_layer_and_nothing_else(family):
    """Of the layers with fused experts too, where peft would adapt the experts in their place."""
    model_type, particular = FAMILIES[family]
    config = tiny_config(model_type, **particular)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plain = {id(each) for each in layers_of(model).modules() if type(each) in (torch.nn.Linear, Conv1D)}
    chosen = method("lora", rank=2)
    if model_type in ("falcon", "falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"):
        with pytest.raises(EloError, match=r"no linear layer would get an adapter|cannot be trained with adapters"):
            chosen.prepare(model, chosen.phases[0], Setup())
        return
    chosen.prepare(model, chosen.phases[0], Setup())
    adapted = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    assert {id(each.base_layer) for each in adapted} == plain
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert trained == footprint(config).trainable("adapted", lora_rank=2)


@pytest.mark.parametrize("window", [False, True])
def test_lisa_draws_few_layers_again_and_again(window):
    chosen = method("lisa", layers=2, period=3, window=window)
    model = tiny_llama(8)
    prepared = chosen.prepare(model, chosen.phases[0], Setup(seed=SEED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    turns = []
    for step in range(30):
        prepared.before_step(step, lambda each: optimizer.state.pop(each, None))
        on = tuple(i for i, layer in enumerate(model.model.layers) if next(layer.parameters()).requires_grad)
        assert len(on) == 2
        assert not window or on[1] == on[0] + 1
        turns += [on] if step % 3 == 0 else []
        assert turns[-1] == on
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        held = {i for i, layer in enumerate(model.model.layers) if next(layer.parameters()) in optimizer.state}
        assert held == set(on), "no optimizer state is held for layers that do not train"
    assert len(set(turns)) > 2


@pytest.mark.parametrize("name", ["elo", "frozen-half", "lisa-window", "lora"])
def test_recomputed_activations_give_the_same(tmp_path, name):
    case = next(case for case in CASES if case.name == name)
    losses = []
    for recompute in (False, True):
        model, prepared = case.ready()
        settings = QUICK.model_copy(update={"activation_checkpointing": recompute, "tokens_per_step": 8 * LENGTH})
        result = _train(model, tmp_path / str(recompute), prepared, settings=settings, steps=4)
        losses.append([point["loss"] for point in result.losses])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_documents_example_is_a_method(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0]
    names = dict(vars(base))
    try:
        exec(code, names)
        norms = names["Norms"]()
    finally:
        METHODS.pop("norms", None)
    model = tiny_llama()
    prepared = norms.prepare(model, norms.phases[0], Setup(KEPT))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _train(model, tmp_path, prepared)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "norm" in name}


@pytest.mark.parametrize("scale", [0, -1, 2.5, "best"])
def test_scales_out_of_reach(scale):
    with pytest.raises(ValueError, match=r"above 0 and at most 2|search"):
        method("full", scale=scale)


def test_parts_train_and_mind_ties():
    model = tiny_llama()
    select_layers(model, [0], ["head", "norm"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lm_head.weight", "model.norm.weight"} <= trained
    assert "model.embed_tokens.weight" not in trained
    with pytest.raises(EloError, match="ties its LM head"):
        select_layers(tiny_llama(tie=True), [0], ["head"])


def test_execution_settings_and_scale_do_not_decide_a_training():
    assert method("full", scale=0.5).decisive() == method("full").decisive()
    assert method("lora", rank=3).decisive() != method("lora").decisive()
    settings = TrainingSettings()
    assert settings.model_copy(update={"save_steps": 1}).decisive() == settings.decisive()
    assert settings.model_copy(update={"vocabulary": "corpus"}).decisive() != settings.decisive()
    assert Phase("a", "trained").decisive() != Phase("a", "frozen").decisive()


def test_ranks_follow_the_depth():
    phase = method("depth_lora").phases[0]
    u_shaped = method("depth_lora", rank=16, min_rank=4).lora_ranks(phase, 12)
    assert u_shaped == [16, 13, 10, 7, 4, 4, 4, 4, 7, 10, 13, 16]
    probed = method("depth_lora", profile="probe", rank=16, min_rank=4)
    assert probed.probe_criterion == "adaptability"
    found = probed.with_scores([0.3, 0.1, 0.2, 0.1])
    assert found.profile == (16, 4, 10, 4)
    assert found.probe_criterion is None
    with pytest.raises(EloError, match=r"method\.profile: has 4 ranks, but the model has 12"):
        found.lora_ranks(phase, 12)
    for wrong in ({"min_rank": 64}, {"profile": [0, 0]}, {"profile": [4, -1]}):
        with pytest.raises(ValueError):
            METHODS["depth_lora"].model_validate({"name": "depth_lora", **wrong})


def test_adapters_have_the_rank_of_their_layer_and_one_scale():
    case = next(case for case in CASES if case.name == "depth_lora")
    model, _ = case.ready()
    ranks = case.method.lora_ranks(case.phase, 4)
    assert len(set(ranks)) > 1
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        assert module.lora_A["default"].weight.shape[0] == ranks[int(name.split(".")[2])]
        assert module.scaling["default"] == 2.0
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == footprint(tiny_llama()).trainable("adapted", lora_rank=ranks)


@pytest.mark.parametrize("case", [case for case in CASES if case.phase.middle != "adapted"], ids=case_id)
def test_what_trains_agrees_with_the_count_of_parameters(case):
    if case.method.redraws_layers or getattr(case.method, "backward_share", 1.0) == 0.0:
        return
    model, _ = case.ready()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = case.method.layers_at_once(case.phase, KEPT, 4)
    counted = footprint(tiny_llama()).trainable(
        case.phase.middle, layers, also_train=case.phase.also_train, module=case.method.module
    )
    assert trained == counted


def test_elo_paper_trains_whole_layers():
    with pytest.raises(ValueError, match="no also_train, scale or module"):
        method("elo_paper", module="mlp")
