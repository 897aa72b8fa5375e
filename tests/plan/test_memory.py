"""Planned memory against what real training keeps and allocates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from plan_fixtures import LiveBytes, known_configs, tiny_gpt2, tiny_llama
from training_fixtures import supervision
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
from elo.methods import METHODS, Method, Phase, Setup
from elo.methods.base import select_layers
from elo.plan import activations, memory
from elo.plan.activations import saved_activations
from elo.plan.memory import phase_memory
from elo.plan.schema import Memory
from elo.surgery.in_memory import detach_layers
from elo.train import loss as losses
from elo.train.bridge import Bridge
from elo.train.settings import TrainingSettings

GIB = 2**30
FULL = METHODS["full"]()
TRAINED = Phase("p", "trained")
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
    planned = saved_activations(config, footprint(config), FULL, TRAINED, range(5), precision=precision)
    assert planned.traced
    expected = tokens * (sum(planned.per_layer) + planned.outside) + planned.cast_weights
    assert expected == pytest.approx(kept_for_backward(build(config), tokens, precision), rel=0.02)


def test_a_frozen_embedding_saves_in_the_first_layer() -> None:
    config, layers = tiny_llama(), (0, 4)
    planned = saved_activations(config, footprint(config), FULL, Phase("p", "removed"), layers, precision="fp32")
    model = detach_layers(build(config), layers)
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    expected = 64 * (sum(planned.per_layer) + planned.outside)
    assert expected == pytest.approx(kept_for_backward(model, 64, "fp32"), rel=0.02)
    assert planned.per_layer[0] < planned.per_layer[1]


@pytest.mark.parametrize(("layers", "also_train"), [((0, 4), ()), ((0, 4), ("embedding",)), ((2, 4), ())])
def test_a_frozen_middle_keeps_what_its_input_gradients_need(layers: Any, also_train: Any) -> None:
    config, tokens = tiny_llama(), 96
    phase = Phase("p", "frozen", also_train=also_train)
    planned = saved_activations(config, footprint(config), FULL, phase, layers, precision="fp32")
    model = build(config)
    select_layers(model, layers, also_train)
    expected = tokens * (sum(planned.per_layer) + planned.outside)
    assert expected == pytest.approx(kept_for_backward(model, tokens, "fp32"), rel=0.02)
    assert planned.per_layer[3] < planned.per_layer[4], "a frozen layer needs less"
    if layers == (2, 4):
        assert planned.per_layer[:2] == (0.0, 0.0), "no gradient reaches these"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (tiny_llama(num_key_value_heads=4), {"name": "lora", "rank": 8}),
        (tiny_llama(num_key_value_heads=4), {"name": "lora", "rank": 8, "module": "attention"}),
        (tiny_llama(num_key_value_heads=4), {"name": "lora", "rank": 8, "dropout": 0.1}),
        (tiny_llama(num_key_value_heads=4), {"name": "lora", "also_train": ("embedding", "head")}),
        (tiny_llama(num_key_value_heads=4), {"name": "depth_lora", "profile": (0, 8, 0, 4, 8)}),
        (tiny_llama(num_key_value_heads=4), {"name": "elo", "alignment": "lora", "alignment_rank": 8}),
        (tiny_llama(num_key_value_heads=4), {"name": "slam"}),
        (tiny_gpt2(), {"name": "lora", "rank": 8}),
    ],
    ids=lambda each: " ".join(map(str, each.values())) if isinstance(each, dict) else each.model_type,
)
def test_adapters_and_parts_of_layers_keep_what_a_forward_keeps(
    config: PretrainedConfig, fields: dict[str, Any], kind: Any, precision: Any
) -> None:
    tokens, layers = 96, (2, 4)
    method = METHODS[fields["name"]].model_validate(fields)
    phase = method.phases[-1]
    planned = saved_activations(config, footprint(config), method, phase, layers, precision=precision, kind=kind)
    assert planned.traced
    model = build(config)
    method.prepare(model, phase, Setup(layers))
    if kind == "gpu" and precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    expected = tokens * (sum(planned.per_layer) + planned.outside) + planned.cast_weights
    assert expected == pytest.approx(kept_for_backward(model, tokens, precision), rel=0.001)
    lowest = {"depth_lora": 1, "slam": 2}.get(method.name, 0)
    assert [kept > 0 for kept in planned.per_layer] == [index >= lowest for index in range(5)]


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
    bf16, fp32 = (
        saved_activations(config, counted, FULL, TRAINED, range(3), precision=precision)
        for precision in ("bf16", "fp32")
    )
    assert bf16.traced and fp32.traced
    assert bf16.cast_weights == pytest.approx(2 * sum(layer.matmul for layer in counted.layers), rel=0.03)
    assert fp32.cast_weights == 0 < bf16.per_layer[0] < fp32.per_layer[0]


@dataclass(frozen=True)
class Case:
    """A phase of a method with the settings that it trains with."""

    method: Method
    checkpointing: bool = False
    head_loss: Any = "chunked"
    micro_steps: int = 1
    supervised: int = 0

    ROWS: ClassVar[int] = 4
    LENGTH: ClassVar[int] = 128

    @property
    def phase(self) -> Phase:
        return self.method.phases[0]

    @property
    def settings(self) -> TrainingSettings:
        return TrainingSettings(
            per_device_train_batch_size=self.ROWS,
            tokens_per_step=self.ROWS * self.LENGTH * self.micro_steps,
            activation_checkpointing=self.checkpointing,
            head_loss=self.head_loss,
            deep_supervision=supervision(range(self.supervised)),
        )


def allocated_at_peak(config: PretrainedConfig, case: Case, layers: Sequence[int]) -> int:
    """Most bytes of tensors alive at once in two real optimizer steps on a CPU, weights included."""
    torch.manual_seed(0)
    model = build(config)
    width = config.hidden_size
    gaps = tuple(gaps_between(layers, config.num_hidden_layers))
    maps = Bridge(gaps, tuple(torch.zeros(width, width) for _ in gaps), tuple(torch.zeros(width) for _ in gaps), ())
    if case.phase.detached:
        model = detach_layers(model, layers)
    prepared = case.method.prepare(model, case.phase, Setup(layers, maps))
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses.install_head_loss(model, case.head_loss, supervised=dict.fromkeys(range(case.supervised), 0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    position_ids = torch.arange(case.LENGTH).repeat(case.ROWS, 1) % (case.LENGTH // 2)
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        for step in range(2):
            if prepared.before_step is not None:
                prepared.before_step(step, lambda each: optimizer.state.pop(each, None))
            for _ in range(case.micro_steps):
                ids = torch.randint(0, 512, (case.ROWS, case.LENGTH))
                model(input_ids=ids, shift_labels=ids, position_ids=position_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def planned_and_measured(config: PretrainedConfig, name: str, **arguments: Any) -> tuple[Memory, int]:
    """Planned memory of a method's first phase, and what two updates take."""
    fields = {
        key: arguments.pop(key) for key in ("also_train", "middle", "module", "rank", "layers") if key in arguments
    }
    case = Case(METHODS[name].model_validate({"name": name, **fields}), **arguments)
    ends = (0, config.num_hidden_layers - 1)
    counted, phase = footprint(config), case.phase
    layers = case.method.layers_at_once(phase, ends, counted.num_layers)
    planned = phase_memory(
        counted,
        saved_activations(config, counted, case.method, phase, layers, precision="fp32", kind="cpu"),
        case.method,
        phase,
        layers,
        case.settings,
        sequence_length=case.LENGTH,
        precision="fp32",
        kind="cpu",
    )
    return planned, allocated_at_peak(config, case, ends)


SMALL = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
ENDS = ("embedding", "head")


def assert_within_a_tenth(planned: Memory, measured: int) -> None:
    in_use = planned.peak_bytes - planned.parts["runtime"] - planned.parts["held by malloc"]
    assert in_use == pytest.approx(measured, rel=0.10), planned


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("elo_paper", {}),
        ("elo_paper", {"head_loss": "plain", "micro_steps": 2}),
        ("elo_paper", {"checkpointing": True, "micro_steps": 2}),
        ("full", {"micro_steps": 2}),
        ("full", {"head_loss": "plain"}),
        ("full", {"checkpointing": True, "head_loss": "plain", "micro_steps": 2}),
        ("full", {"checkpointing": True}),
        ("elo", {"middle": "removed", "micro_steps": 2}),
        ("elo", {"checkpointing": True, "head_loss": "plain"}),
        ("elo", {"also_train": ("head", "norm")}),
        ("frozen", {"micro_steps": 2}),
        ("frozen", {"also_train": (), "checkpointing": True}),
        ("embeddings_first", {}),
        ("lisa", {"layers": 2}),
        ("lisa", {"layers": 2, "micro_steps": 2}),
        ("full", {"supervised": 3}),
        ("full", {"supervised": 2, "checkpointing": True, "head_loss": "plain"}),
        ("elo_paper", {"supervised": 1, "micro_steps": 2}),
        ("frozen", {"supervised": 3, "micro_steps": 2}),
        ("lora", {"rank": 8}),
        ("lora", {"rank": 8, "also_train": ("embedding", "head"), "micro_steps": 2}),
        ("lora", {"rank": 8, "module": "mlp"}),
        ("depth_lora", {"rank": 8}),
        ("slam", {"micro_steps": 2}),
        ("frozen", {"module": "attention"}),
    ],
    ids=str,
)
def test_peak_memory_is_within_a_tenth(name: str, arguments: dict[str, Any]) -> None:
    assert_within_a_tenth(*planned_and_measured(tiny_llama(**SMALL), name, **arguments))


@pytest.mark.parametrize(
    ("name", "changes", "arguments"),
    [
        ("frozen", {"num_hidden_layers": 12}, {}),
        ("elo", {"vocab_size": 16384, "tie_word_embeddings": True}, {"checkpointing": True}),
        ("elo", {"vocab_size": 16384}, {"also_train": ("embedding",), "checkpointing": True, "micro_steps": 2}),
    ],
    ids=str,
)
def test_peak_memory_of_other_shapes_is_within_a_tenth(
    name: str, changes: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert_within_a_tenth(*planned_and_measured(tiny_llama(**SMALL | changes), name, **arguments))


def test_a_process_on_a_cpu_holds_its_tokenizer_and_half_of_what_an_update_frees() -> None:
    planned, _ = planned_and_measured(tiny_llama(**SMALL), "full")
    parts = planned.parts
    assert parts["runtime"] == memory.RUNTIME_BYTES["cpu"] + 1280 * SMALL["vocab_size"]
    assert parts["held by malloc"] >= 0.5 * (parts["activations"] + parts.get("logits", 0)) > 0
    assert sum(parts.values()) == planned.peak_bytes
    assert "held by malloc" not in plan_8b("trained").parts, "GPU"


def test_a_softcap_keeps_the_logits_twice() -> None:
    size = SMALL | {"vocab_size": 32768, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32}
    for softcap in (None, 30.0):
        config = Gemma3TextConfig(**size, num_key_value_heads=2, final_logit_softcapping=softcap)
        assert_within_a_tenth(*planned_and_measured(config, "elo_paper"))


@pytest.mark.parametrize("fails", [(_TRACED,), (_TRACED, _AS_STORED)], ids=["in bf16", "not at all"])
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_what_is_not_traced_copies_what_is_in_fp32_alone(
    fails: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = activations._trace

    def failing(config: Any, layers: Any, prepare: Any, precision: Any, *rest: Any) -> Any:
        if (_TRACED if precision else _AS_STORED) in fails:
            raise NotImplementedError
        return trace(config, layers, prepare, precision, *rest)

    monkeypatch.setattr(activations, "_trace", failing)
    config = tiny_llama()
    counted = footprint(config)
    saved = saved_activations(config, counted, FULL, Phase("p", "frozen"), (0, 4), kind=kind)
    assert saved.traced == (len(fails) == 1) and len(saved.per_layer) == counted.num_layers
    copied = range(counted.num_layers) if kind == "cpu" else (0, 4)
    assert saved.cast_weights == 2 * sum(counted.layers[index].matmul for index in copied)


def test_hidden_states_are_in_fp32_behind_an_embedding_that_trains() -> None:
    config = tiny_llama()
    frozen, trained = (
        saved_activations(config, footprint(config), FULL, Phase("p", "removed", also_train=also_train), (0, 4))
        for also_train in ((), ENDS)
    )
    assert (frozen.layer_input, trained.layer_input) == (2 * 64, 4 * 64)
    assert trained.per_layer[0] > frozen.per_layer[0]


@cache
def saved_8b(middle: str) -> memory.SavedActivations:
    config = known_configs()["Llama-3.1-8B"]
    layers = range(32) if middle == "trained" else (0, 31)
    return saved_activations(config, footprint(config), FULL, MIDDLES[middle], layers)


MIDDLES = {
    "removed": Phase("p", "removed"),
    "trained": TRAINED,
    "adapted": Phase("p", "adapted", lora_rank=16),
}


def plan_8b(middle: str, *, sequence_length: int = 8192, devices: int = 1, **settings: Any) -> Memory:
    layers = (0, 31)
    return phase_memory(
        footprint(known_configs()["Llama-3.1-8B"]),
        saved_8b(middle),
        FULL,
        MIDDLES[middle],
        layers,
        TrainingSettings(**{"tokens_per_step": 2**20} | settings),
        sequence_length=sequence_length,
        precision="bf16",
        devices=devices,
    )


def test_an_8b_model_trains_its_ends_on_a_24_gib_card_but_not_itself_on_80() -> None:
    ends, full = plan_8b("removed"), plan_8b("trained", activation_checkpointing=True)
    assert ends.parts["weights"] == 4 * 436_224_000 + 2 * (2 * 128256 * 4096 + 4096)
    assert ends.parts["optimizer"] == 8 * 436_224_000
    assert ends.peak_bytes < 22 * GIB
    assert full.peak_bytes > 120 * GIB


def test_parts_add_up_and_each_setting_helps() -> None:
    plain = plan_8b("trained")
    assert sum(plain.parts.values()) == plain.peak_bytes
    for arguments in (
        {"activation_checkpointing": True},
        {"optim": "adamw_8bit"},
        {"devices": 8, "training_arguments": {"fsdp": True}},
        {"sequence_length": 4096},
        {"tokens_per_step": 8192},
    ):
        assert plan_8b("trained", **arguments).peak_bytes < plain.peak_bytes, arguments
    assert plan_8b("trained", head_loss="plain").peak_bytes > plain.peak_bytes
    assert plan_8b("adapted").peak_bytes < plain.peak_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_8_bit_adamw_keeps_the_embedding_in_32_bits(tied: bool) -> None:
    config = tiny_llama(tie_word_embeddings=tied)
    counted = footprint(config)
    saved = saved_activations(config, counted, FULL, TRAINED, range(5), precision="fp32")

    def states(middle: Any, *also_train: Any) -> int:
        return phase_memory(
            counted, saved, FULL, Phase("p", middle, also_train=also_train), (0, 4),
            TrainingSettings(optim="adamw_8bit"), sequence_length=64, precision="fp32",
        ).parts["optimizer"]  # fmt: skip

    assert states("trained") == round(2.04 * (counted.total - counted.embedding) + 8 * counted.embedding)
    layers = sum(counted.layers[index].parameters for index in (0, 4))
    assert states("removed") == round(2.04 * layers)
    assert states("frozen", "embedding", "head") == round(2.04 * (layers + counted.head) + 8 * counted.embedding)


def test_weights_of_layers_that_are_drawn_later_are_in_fp32() -> None:
    config = tiny_llama()
    counted = footprint(config)
    phase = Phase("p", "frozen", also_train=ENDS)
    saved = {
        method.redraws_layers: saved_activations(config, counted, method, phase, (0, 1))
        for method in (FULL, METHODS["lisa"]())
    }

    def planned(method: Method) -> Memory:
        kept = saved[method.redraws_layers]
        return phase_memory(
            counted, kept, method, phase, (0, 1), TrainingSettings(), sequence_length=64, precision="bf16"
        )

    stays, drawn = planned(FULL), planned(METHODS["lisa"]())
    assert drawn.parts["weights"] == 4 * counted.total > stays.parts["weights"]
    assert drawn.parts["optimizer"] == stays.parts["optimizer"] < 8 * counted.total
    assert saved[True].cast_weights == pytest.approx(2 * sum(each.matmul for each in counted.layers), rel=0.01)
    assert saved[True].cast_weights > saved[False].cast_weights
