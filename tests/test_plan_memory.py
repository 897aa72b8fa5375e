"""Planned memory against what real training keeps and allocates."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from elo.methods.methods import select_layers
from elo.model import activations, memory
from plan_fixtures import LiveBytes, known_configs, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from elo.checkpoint.counting import footprint
from elo.checkpoint.layers import gaps_between
from elo.errors import EloError
from elo.plan.activations import saved_activations
from elo.plan.memory import check_optimizer, stage_memory
from elo.surgery.in_memory import detach_layers
from elo.train import loss as losses
from elo.train.bridge import Bridge, install_bridge, pass_forward_only

GIB = 2**30
_TRACED, _AS_STORED = "under autocast", "in bf16 throughout"


def build(config: PretrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def kept_for_backward(model: PreTrainedModel, tokens: int, precision: str) -> int:
    """Bytes that a real forward of the decoder keeps besides its parameters."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.base_model(input_ids=torch.arange(tokens).unsqueeze(0) % 512, use_cache=False)
    return sum(saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_activations_are_what_a_forward_keeps(config: PretrainedConfig, precision: Any) -> None:
    tokens = 96
    planned = saved_activations(config, footprint(config), precision=precision)
    assert planned.traced
    expected = tokens * (sum(planned.per_layer) + planned.outside) + planned.cast_weights
    assert expected == pytest.approx(kept_for_backward(build(config), tokens, precision), rel=0.02)


def test_a_frozen_embedding_saves_in_the_first_layer() -> None:
    config, layers = tiny_llama(), (0, 4)
    planned = saved_activations(config, footprint(config), layers, precision="fp32")
    model = detach_layers(build(config), layers)
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    expected = 64 * (sum(planned.per_layer) + planned.outside)
    assert expected == pytest.approx(kept_for_backward(model, 64, "fp32"), rel=0.02)
    assert planned.per_layer[0] < planned.per_layer[1]


@pytest.mark.parametrize(("layers", "also_train"), [((0, 4), ()), ((0, 4), ("embedding",)), ((2, 4), ())])
def test_a_frozen_middle_keeps_what_its_input_gradients_need(layers: Any, also_train: Any) -> None:
    config, tokens = tiny_llama(), 96
    planned = saved_activations(
        config, footprint(config), layers, precision="fp32", also_train=also_train, in_place=True
    )
    model = build(config)
    select_layers(model, layers, also_train)
    expected = tokens * (sum(planned.per_layer) + planned.outside)
    assert expected == pytest.approx(kept_for_backward(model, tokens, "fp32"), rel=0.02)
    assert planned.per_layer[3] < planned.per_layer[4], "a frozen layer needs less"
    if layers == (2, 4):
        assert planned.per_layer[:2] == (0.0, 0.0), "no gradient reaches these"


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=8
        ),
        Qwen3MoeConfig(
            vocab_size=512, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        ),
    ],
    ids=["gemma2", "qwen3 moe"],
)  # fmt: skip
def test_other_families_are_traced_too(config: PretrainedConfig) -> None:
    counted = footprint(config)
    bf16, fp32 = (saved_activations(config, counted, precision=precision) for precision in ("bf16", "fp32"))
    assert bf16.traced and fp32.traced
    assert bf16.cast_weights == pytest.approx(2 * sum(layer.matmul for layer in counted.layers), rel=0.03)
    assert fp32.cast_weights == 0 < bf16.per_layer[0] < fp32.per_layer[0]


def allocated_at_peak(
    config: PretrainedConfig,
    method: Any,
    layers: Sequence[int],
    *,
    also_train: Sequence[Any] = (),
    bridge: bool = False,
    rows: int,
    length: int,
    micro_steps: int,
    checkpointing: bool,
    head_loss: Any,
) -> int:
    """Most bytes of tensors alive at once in two real optimizer steps on a CPU, weights included."""
    torch.manual_seed(0)
    model = build(config)
    width = config.hidden_size
    gaps = tuple(gaps_between(layers, config.num_hidden_layers))
    maps = Bridge(gaps, tuple(torch.zeros(width, width) for _ in gaps), tuple(torch.zeros(width) for _ in gaps), ())
    if method == "elo":
        model = detach_layers(model, layers)
        select_layers(model, range(len(layers)), also_train)
        if bridge:
            install_bridge(model, maps)
    elif method == "forward_only":
        select_layers(model, layers, also_train)
        pass_forward_only(model, maps)
    elif method == "frozen":
        select_layers(model, layers, also_train)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses.install_head_loss(model, head_loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    position_ids = torch.arange(length).repeat(rows, 1) % (length // 2)
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        for _ in range(2):
            for _ in range(micro_steps):
                ids = torch.randint(0, 512, (rows, length))
                model(input_ids=ids, shift_labels=ids, position_ids=position_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def planned_and_measured(
    config: PretrainedConfig,
    method: Any,
    *,
    also_train: Sequence[Any] = (),
    bridge: bool = False,
    checkpointing: bool = False,
    head_loss: Any = "chunked",
    micro_steps: int = 1,
) -> tuple[memory.StageMemory, int]:
    layers, rows, length = (0, config.num_hidden_layers - 1), 4, 128
    counted = footprint(config)
    kept = None if method == "full" else layers
    planned = stage_memory(
        counted,
        saved_activations(
            config, counted, kept, precision="fp32", kind="cpu", also_train=also_train, in_place=method == "frozen"
        ),
        method,
        layers,
        tokens=rows * length,
        sequence_length=length,
        precision="fp32",
        kind="cpu",
        activation_checkpointing=checkpointing,
        head_loss=head_loss,
        accumulates=micro_steps > 1,
        also_train=also_train,
        bridge=bridge,
    )
    measured = allocated_at_peak(
        config,
        method,
        layers,
        also_train=also_train,
        bridge=bridge,
        rows=rows,
        length=length,
        micro_steps=micro_steps,
        checkpointing=checkpointing,
        head_loss=head_loss,
    )
    return planned, measured


SMALL = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
ENDS = ("embedding", "head")


@pytest.mark.parametrize(
    ("method", "checkpointing", "head_loss", "micro_steps"),
    [
        ("elo", False, "chunked", 1),
        ("elo", False, "plain", 2),
        ("elo", True, "chunked", 2),
        ("full", False, "chunked", 2),
        ("full", False, "plain", 1),
        ("full", True, "plain", 2),
        ("full", True, "chunked", 1),
    ],
)
def test_peak_memory_is_within_a_tenth(method: Any, checkpointing: bool, head_loss: Any, micro_steps: int) -> None:
    planned, measured = planned_and_measured(
        tiny_llama(**SMALL), method, checkpointing=checkpointing, head_loss=head_loss, micro_steps=micro_steps
    )
    assert planned.peak - memory.RUNTIME_BYTES["cpu"] == pytest.approx(measured, rel=0.10), planned


def test_a_softcap_keeps_the_logits_twice() -> None:
    size = SMALL | {"vocab_size": 32768, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32}
    for softcap in (None, 30.0):
        config = Gemma3TextConfig(**size, num_key_value_heads=2, final_logit_softcapping=softcap)
        planned, measured = planned_and_measured(config, "elo")
        assert planned.peak - memory.RUNTIME_BYTES["cpu"] == pytest.approx(measured, rel=0.10), planned


@pytest.mark.parametrize(
    ("method", "also_train", "changes", "settings"),
    [
        ("forward_only", ENDS, {}, {}),
        ("forward_only", ENDS, {}, {"head_loss": "plain", "micro_steps": 2}),
        ("forward_only", ENDS, {}, {"checkpointing": True}),
        ("forward_only", ENDS, {"num_hidden_layers": 12}, {"micro_steps": 2}),
        ("forward_only", ENDS, {"vocab_size": 16384, "tie_word_embeddings": True}, {"checkpointing": True}),
        ("forward_only", (), {}, {"micro_steps": 2}),
        ("forward_only", ("embedding",), {"vocab_size": 16384}, {"checkpointing": True, "micro_steps": 2}),
        ("elo", ENDS, {}, {"micro_steps": 2}),
        ("elo", ENDS, {}, {"bridge": True, "checkpointing": True, "head_loss": "plain"}),
        ("elo", ("head", "norm"), {}, {"bridge": True}),
        ("frozen", ENDS, {}, {"micro_steps": 2}),
        ("frozen", ENDS, {"num_hidden_layers": 12}, {}),
        ("frozen", (), {}, {"checkpointing": True}),
    ],
)
def test_peak_memory_of_what_a_run_can_choose_is_within_a_tenth(
    method: Any, also_train: Any, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    planned, measured = planned_and_measured(tiny_llama(**SMALL | changes), method, also_train=also_train, **settings)
    assert planned.peak - memory.RUNTIME_BYTES["cpu"] == pytest.approx(measured, rel=0.10), planned


@pytest.mark.parametrize("fails", [(_TRACED,), (_TRACED, _AS_STORED)], ids=["in bf16", "not at all"])
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_what_is_not_traced_copies_what_is_in_fp32_alone(
    fails: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = activations._trace

    def failing(config: Any, layers: Any, precision: Any, *rest: Any) -> Any:
        if (_TRACED if precision else _AS_STORED) in fails:
            raise NotImplementedError
        return trace(config, layers, precision, *rest)

    monkeypatch.setattr(activations, "_trace", failing)
    config = tiny_llama()
    counted = footprint(config)
    saved = saved_activations(config, counted, (0, 4), kind=kind, in_place=True)
    assert saved.traced == (len(fails) == 1) and len(saved.per_layer) == counted.num_layers
    copied = range(counted.num_layers) if kind == "cpu" else (0, 4)
    assert saved.cast_weights == 2 * sum(counted.layers[index].matmul for index in copied)


def test_hidden_states_are_in_fp32_behind_an_embedding_that_trains() -> None:
    config = tiny_llama()
    frozen, trained = (
        saved_activations(config, footprint(config), (0, 4), also_train=also_train) for also_train in ((), ENDS)
    )
    assert (frozen.layer_input, trained.layer_input) == (2 * 64, 4 * 64)
    assert trained.per_layer[0] > frozen.per_layer[0]


@cache
def saved_8b(layers: tuple[int, ...] | None) -> memory.SavedActivations:
    config = known_configs()["Llama-3.1-8B"]
    return saved_activations(config, footprint(config), layers)


def plan_8b(method: Any, **arguments: Any) -> memory.StageMemory:
    counted = footprint(known_configs()["Llama-3.1-8B"])
    layers = (0, 31)
    saved = saved_8b(layers if method == "elo" else None)
    length = arguments.pop("sequence_length", 8192)
    return stage_memory(
        counted, saved, method, layers, tokens=length, sequence_length=length, precision="bf16", **arguments
    )


def test_an_8b_model_trains_its_ends_on_a_24_gib_card_but_not_itself_on_80() -> None:
    elo, full = plan_8b("elo"), plan_8b("full", activation_checkpointing=True)
    assert elo.parts["weights"] == 4 * 436_224_000 + 2 * (2 * 128256 * 4096 + 4096)
    assert elo.parts["optimizer"] == 8 * 436_224_000
    assert elo.peak < 22 * GIB
    assert full.peak > 120 * GIB


def test_parts_add_up_and_each_setting_helps() -> None:
    plain = plan_8b("full")
    assert sum(plain.parts.values()) == plain.peak
    for arguments in (
        {"activation_checkpointing": True},
        {"optimizer": "adamw_8bit"},
        {"sharded_over": 8},
        {"sequence_length": 4096},
        {"accumulates": False},
    ):
        assert plan_8b("full", **arguments).peak < plain.peak, arguments
    assert plan_8b("full", head_loss="plain").peak > plain.peak
    assert plan_8b("lora").peak < plain.peak


@pytest.mark.parametrize("tied", [False, True])
def test_8_bit_adamw_keeps_the_embedding_in_32_bits(tied: bool) -> None:
    config = tiny_llama(tie_word_embeddings=tied)
    counted = footprint(config)
    saved = saved_activations(config, counted, precision="fp32")

    def states(method: Any, *also_train: str) -> int:
        return stage_memory(
            counted, saved, method, (0, 4), tokens=64, sequence_length=64, precision="fp32", optimizer="adamw_8bit",
            also_train=also_train,
        ).parts["optimizer"]  # fmt: skip

    assert states("full") == round(2.04 * (counted.total - counted.embedding) + 8 * counted.embedding)
    layers = sum(counted.layers[index].parameters for index in (0, 4))
    assert states("elo") == round(2.04 * layers)
    assert states("forward_only", "embedding", "head") == round(2.04 * (layers + counted.head) + 8 * counted.embedding)


def test_an_unknown_optimizer_is_told() -> None:
    with pytest.raises(EloError, match="optim: 'sgd' is unknown; choose one of adamw, adamw_8bit, adafactor"):
        check_optimizer("sgd")
