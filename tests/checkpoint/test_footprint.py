"""Parameter counts and FLOPs from a config alone, against real models and against PyTorch's own FLOP counter."""

from typing import Any

import pytest
import torch
from plan_fixtures import known_configs, tiny_gpt2, tiny_llama
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from zoo import tiny_config

from elo.checkpoint.counting import footprint, read_config
from elo.errors import EloError
from elo.methods import METHODS, Setup
from elo.train.loss import install_head_loss

# ELO pretraining over full CPT per token, the same when full CPT recomputes, LM head's share, whole run both ways.
PUBLISHED = {
    "Llama-3.1-8B": (9.5, 12.5, 0.45, 5.2, 5.8),
    "Qwen3-8B": (9.5, 12.3, 0.52, 5.1, 5.8),
    "Gemma-3-4B": (6.1, 7.8, 0.70, 4.0, 4.6),
    "Llama-3.2-1B": (4.2, 5.3, 0.59, 3.2, 3.7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_arithmetic_of_known_models(name: str) -> None:
    counted = footprint(known_configs()[name])
    elo = counted.flops_per_token("removed", (0, counted.num_layers - 1))
    full, recomputed = (counted.flops_per_token("trained", activation_checkpointing=c).total for c in (False, True))

    def whole_run(baseline: float) -> float:
        return 10 * baseline / (9 * elo.total + baseline)

    got = (full / elo.total, recomputed / elo.total, elo.head / elo.total, whole_run(full), whole_run(recomputed))
    assert got == pytest.approx(PUBLISHED[name], rel=0.015)


def test_parameters_of_known_models() -> None:
    totals = {name: footprint(config).total for name, config in known_configs().items()}
    assert totals["Llama-3.1-8B"] == 8_030_261_248
    assert totals["Llama-3.2-1B"] == 1_235_814_400
    assert totals["Qwen3-8B"] == 8_190_735_360


def test_experts_count_as_far_as_they_are_used() -> None:
    counted = footprint(
        Qwen3MoeConfig(  # Qwen3-30B-A3B
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        )
    )
    assert counted.total == pytest.approx(30.5e9, rel=0.005)
    assert counted.active == pytest.approx(3.35e9, rel=0.01)
    layer = counted.layers[0]
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048
    assert layer.active_matmul == attention + 128 * 2048 + 8 * 3 * 2048 * 768


FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "llama tied": tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2(),
    "mixtral": tiny_config("mixtral"),
    "deepseek": tiny_config("deepseek_v3", num_key_value_heads=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_real_model(family: str) -> None:
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config)
    counted = footprint(config)
    layers = [layer.parameters for layer in counted.layers]
    parts = counted.embedding + counted.head + counted.norm + counted.other + sum(layers)
    assert parts == counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.tied == (counted.head == 0)
    chosen = (0, counted.num_layers - 1)
    assert counted.trainable("removed", chosen) == layers[0] + layers[-1]
    assert counted.detached(chosen).total == counted.total - sum(layers[1:-1])
    assert footprint(model) == counted, "a model and its config count the same"


def measured_flops(
    config: PretrainedConfig, trains: list[int] | None, *, checkpointing: bool = False, supervised: tuple[int, ...] = ()
) -> float:
    """FLOPs of the weights' products for a token, counted while a real model trains; None: all of it."""
    model = AutoModelForCausalLM.from_config(config).train()
    if trains is not None:
        model.requires_grad_(False)
        for index in trains:
            model.get_submodule("model.layers" if hasattr(model, "model") else "transformer.h")[index].requires_grad_(
                True
            )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return measured_flops_of(model, supervised)


def measured_flops_of(model: PreTrainedModel, supervised: tuple[int, ...] = ()) -> float:
    """The same for a model of which some parameters require gradients."""
    ids = torch.arange(48).unsqueeze(0)
    if supervised:
        install_head_loss(model, "plain", supervised=dict.fromkeys(supervised, 0.5))
    with FlopCounterMode(display=False) as counter:
        if supervised:
            model(input_ids=ids, shift_labels=ids).loss.backward()
        else:
            model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in products) / ids.numel()


@pytest.mark.parametrize(
    "config", [tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_gpt2()], ids=["untied", "tied", "gpt2"]
)
def test_flops_are_what_training_computes(config: PretrainedConfig) -> None:
    last = config.num_hidden_layers - 1
    counted = footprint(config)
    assert measured_flops(config, None) == counted.flops_per_token("trained").total
    recomputing = counted.flops_per_token("trained", activation_checkpointing=True).total
    with set_checkpoint_early_stop(False):
        assert measured_flops(config, None, checkpointing=True) == recomputing
    # As it is by default, PyTorch leaves out each layer's last product, whose output nothing keeps.
    assert 0.9 * recomputing < measured_flops(config, None, checkpointing=True) < recomputing
    assert measured_flops(config, [0, last]) == counted.flops_per_token("frozen", (0, last)).total
    assert measured_flops(config, [2]) == counted.flops_per_token("frozen", (2,)).total, "nothing flows below layer 2"


def test_each_supervised_layer_costs_one_more_head() -> None:
    counted = footprint(tiny_llama())
    for trains, middle in ((None, "trained"), ([0, 4], "frozen")):
        flops = counted.flops_per_token(middle, trains, num_losses=3)
        assert measured_flops(tiny_llama(), trains, supervised=(1, 3)) == flops.total
        assert flops.head == 3 * counted.flops_per_token(middle, trains).head


@pytest.mark.parametrize("also_train", [(), ("head",), ("embedding", "head")])
def test_a_bridge_costs_a_product_each_way(also_train: tuple[str, ...]) -> None:
    counted = footprint(tiny_llama())
    bridged, removed = (
        counted.flops_per_token(middle, (0, 4), sequence_length=96, also_train=also_train)
        for middle in ("bridged", "removed")
    )
    product = 2 * 64 * 64
    assert bridged.forward - removed.forward == bridged.backward - removed.backward == product


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_what_each_of_its_phases_trains(name: str) -> None:
    counted, method = footprint(tiny_llama()), METHODS[name].model_validate({"name": name})
    for phase in method.phases:
        layers = method.layers_at_once(phase, (0, 4), counted.num_layers)
        trainable = counted.trainable(phase.middle, layers, lora_rank=phase.lora_rank, also_train=phase.also_train)
        flops = method.flops_per_token(phase, counted, (0, 4), 96)
        assert trainable > 0 and 0 < flops.head < flops.total
        assert flops.total <= counted.flops_per_token("trained", sequence_length=96).total or phase.lora_rank


def test_what_also_trains_is_counted_once() -> None:
    untied, tied = footprint(tiny_llama()), footprint(tiny_llama(tie_word_embeddings=True))
    layers = untied.trainable("removed", (0, 4))
    ends = ("embedding", "head")
    assert untied.trainable("frozen", (0, 4), also_train=ends) == layers + 2 * 512 * 64
    assert tied.trainable("frozen", (0, 4), also_train=ends) == layers + 512 * 64
    assert untied.trainable("removed", (0, 4), also_train=("norm",)) == layers + 64
    assert untied.bridge_elements((0, 4)) == 64 * 64 == untied.bridge_elements((3, 4))
    assert untied.bridge_elements((1, 3)) == 3 * 64 * 64


@pytest.mark.parametrize("tied", [False, True])
def test_more_rows_count_as_in_a_model_that_has_them(tied: bool) -> None:
    small, large = (footprint(tiny_llama(vocab_size=rows, tie_word_embeddings=tied)) for rows in (512, 640))
    assert small.with_vocabulary(640) == large
    assert small.with_vocabulary(640).total == large.total


def test_flops_of_a_detached_model() -> None:
    detached = tiny_llama(num_hidden_layers=2)
    measured = measured_flops(detached, [0, 1])
    assert measured == footprint(detached).flops_per_token("removed").total
    base = footprint(tiny_llama())
    assert measured == base.flops_per_token("removed", (0, base.num_layers - 1)).total


def test_a_first_layer_without_input_norm_costs_no_more_than_two_percent_less() -> None:
    config = Olmo2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    planned = footprint(config).flops_per_token("removed").total
    assert 0 < planned - measured_flops(config, [0, 1]) == 2 * 3 * 64 * 64


def test_adapters_cost_six_flops_a_parameter_and_save_the_weight_gradient() -> None:
    counted = footprint(tiny_llama())
    weights = sum(layer.active_matmul for layer in counted.layers)
    lora = counted.flops_per_token("adapted", lora_rank=4)
    assert lora.total == 4 * weights + 6 * counted.trainable("adapted", lora_rank=4) + 4 * counted.head_matmul
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    assert counted.lora_parameters(4) == 5 * 4 * sum(rows + columns for rows, columns in shapes)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "slam"},
        {"name": "frozen", "module": "attention", "also_train": ()},
        {"name": "lora", "rank": 4, "module": "mlp"},
        {"name": "depth_lora", "profile": (0, 8, 0, 2, 4)},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_parts_of_layers_and_ranks_by_depth_cost_what_training_computes(fields: dict[str, Any]) -> None:
    """The count has all of the lowest trained layer's input gradient, of which training computes what is needed."""
    counted, method = footprint(tiny_llama()), METHODS[fields["name"]].model_validate(fields)
    (phase,), model = method.phases, AutoModelForCausalLM.from_config(tiny_llama()).train()
    method.prepare(model, phase, Setup((1, 3)))
    planned, lowest = method.flops_per_token(phase, counted, (1, 3), 0).total, counted.layers[1]
    unneeded = planned - measured_flops_of(model)
    assert 0 <= unneeded <= 2 * lowest.active_matmul + 2 * 8 * lowest.lora_width
    assert unneeded < 0.1 * planned


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_attention_scores_are_half_a_square(window: int | None) -> None:
    length = 40
    layer = footprint(tiny_llama()).layers[0]
    layer = type(layer)(**(vars(layer) | {"window": window}))
    attended = sum(min(position + 1, window or length) for position in range(length))
    heads, width = 4, 16
    assert layer.score_flops(length) == pytest.approx(2 * 2 * heads * width * attended / length)
    assert layer.score_flops(0) == 0


def test_scores_have_a_backward_of_twice_their_forward() -> None:
    counted = footprint(tiny_llama())
    scores = sum(layer.score_flops(128) for layer in counted.layers)
    with_scores, without = (counted.flops_per_token("trained", sequence_length=length) for length in (128, 0))
    assert with_scores.forward - without.forward == pytest.approx(scores)
    assert with_scores.backward - without.backward == pytest.approx(2 * scores)


def test_sliding_windows_are_found() -> None:
    counted = footprint(known_configs()["Gemma-3-4B"])
    assert [layer.window for layer in counted.layers[:6]] == [4096] * 5 + [None]


def test_chunks_count_as_windows() -> None:
    chunked, whole = "chunked_attention", "full_attention"
    config = tiny_config("llama4_text", attention_chunk_size=16, layer_types=[chunked, chunked, chunked, whole])
    assert [layer.window for layer in footprint(config).layers] == [16, 16, 16, None]


def test_mistakes_are_told() -> None:
    with pytest.raises(EloError, match="no such file or folder"):
        read_config("nowhere/config.json")
    with pytest.raises(EloError, match="no causal language model can be built"):
        footprint(tiny_llama(hidden_act="nonsense"))
    with pytest.raises(EloError, match="no causal language model can be built from this 'clip_text_model' config"):
        footprint(CLIPTextConfig())
