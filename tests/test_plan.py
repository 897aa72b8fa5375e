"""`elo plan` as users call it: from a config alone, with what fits, what would make it fit, and mistakes told."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from elo.methods.methods import Options, find_method
from plan_fixtures import LLAMA_8B, tiny_llama
from rich.console import Console

from elo.checkpoint.counting import footprint, read_config
from elo.errors import EloError, UnsupportedArchitectureError
from elo.plan.devices import DEVICES, find_device, measure_matmul_rate
from elo.plan.plan import plan
from elo.plan.stage import Choices
from elo.plan.table import render_plan
from elo.train.settings import EloOptions

PUBLISHED: dict[str, Any] = {"stand_in": "none", "also_train": ()}


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def shown(result: dict[str, Any], width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render_plan(result))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_an_8b_config_is_planned_in_two_seconds(llama_8b: Path) -> None:
    plan(tiny_llama())  # imports
    start = time.process_time()
    result = plan(llama_8b, sequence_length=8192, **PUBLISHED)
    assert time.process_time() - start < 2
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    parameters = result["parameters"]
    assert parameters["total"] == 8_030_261_248
    assert parameters["trainable"] == 2 * 218_112_000
    assert parameters["detached"] == parameters["total"] - 30 * 218_112_000
    assert result["stages"]["elo_pretraining"]["memory"]["fits"]
    assert not result["stages"]["layer_alignment"]["memory"]["fits"]


def test_a_folder_its_config_file_and_a_config_are_planned_alike(llama_8b: Path) -> None:
    folder, file = plan(llama_8b), plan(str(llama_8b / "config.json"))
    assert {key: value for key, value in folder.items() if key != "model"} == {
        key: value for key, value in file.items() if key != "model"
    }
    assert folder["device"]["name"] == "H100"


def test_the_whole_run_is_the_sum_of_its_stages(llama_8b: Path) -> None:
    result = plan(llama_8b, tokens=10_000_000, alignment_share=0.25, price_per_hour=3.0, devices=2, **PUBLISHED)
    pretraining, alignment = result["stages"].values()
    assert (pretraining["tokens"], alignment["tokens"]) == (7_500_000, 2_500_000)
    elo = result["elo"]
    for key in ("flops", "seconds", "cost", "device_hours"):
        assert elo[key] == pytest.approx(pretraining[key] + alignment[key])
    assert elo["cost"] == pytest.approx(3.0 * elo["device_hours"]) == pytest.approx(3.0 * 2 * elo["seconds"] / 3600)
    for stage in (pretraining, alignment):
        assert stage["seconds"] == pytest.approx(stage["tokens"] / stage["tokens_per_second"])
        assert stage["tokens_per_hour"] == pytest.approx(3600 * stage["tokens_per_second"])
    assert elo["peak_memory_bytes"] == alignment["memory"]["peak"]


def test_speed_ups_are_ratios_at_equal_tokens(llama_8b: Path) -> None:
    result = plan(llama_8b, activation_checkpointing=True, **PUBLISHED)
    baselines, speed_up = result["baselines"], result["speed_up"]
    for name, baseline in baselines.items():
        for kind in ("flops", "seconds"):
            assert speed_up["whole_run"][name][kind] == pytest.approx(baseline[kind] / result["elo"][kind])
            per_token = result["stages"]["elo_pretraining"][kind] / result["stages"]["elo_pretraining"]["tokens"]
            expected = baseline[kind] / baseline["tokens"] / per_token
            assert speed_up["elo_pretraining"][name][kind] == pytest.approx(expected)
    # The published arithmetic, with attention scores at 2048 tokens: whole run against a baseline that recomputes too.
    assert speed_up["whole_run"]["full_recompute"]["flops"] == pytest.approx(5.8, rel=0.03)
    assert 1 < speed_up["elo_pretraining"]["lora"]["flops"] < speed_up["elo_pretraining"]["full"]["flops"]


def test_without_alignment_there_is_one_stage(llama_8b: Path) -> None:
    for arguments in ({}, PUBLISHED | {"alignment_share": 0.0}, {"stand_in": "bridge", "alignment": "none"}):
        result = plan(llama_8b, **arguments)
        assert list(result["stages"]) == ["elo_pretraining"]
        assert result["stages"]["elo_pretraining"]["tokens"] == result["settings"]["tokens"]
        assert result["settings"]["alignment_share"] == 0.0
        assert result["speed_up"]["whole_run"] == result["speed_up"]["elo_pretraining"]


def test_the_default_is_the_forward_only_middle_by_hand(llama_8b: Path) -> None:
    result = plan(llama_8b, sequence_length=2048)
    assert result["settings"]["stand_in"] == "forward_only"
    assert result["settings"]["also_train"] == ["embedding", "head"]
    stage, full = result["stages"]["elo_pretraining"], result["baselines"]["full"]
    assert stage["label"] == "ELO pretraining, forward-only"
    layer, head, width = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336, 128256 * 4096, 4096
    scores = 2 * 2 * 32 * 128 * 2049 / 2  # queries see 1 to 2048 keys
    forward = 32 * (2 * layer + scores) + 2 * head
    backward = 2 * (4 * layer + 2 * scores) + 4 * head + 2 * width * width
    assert stage["flops_per_token"]["forward"] == pytest.approx(forward, rel=1e-12)
    assert stage["flops_per_token"]["backward"] == pytest.approx(backward, rel=1e-12)
    assert 1 / 3 < stage["flops_per_token"]["total"] / full["flops_per_token"]["total"] < 1 / 2
    trained = 2 * (layer + 2 * width) + 2 * head
    assert stage["trainable_parameters"] == result["parameters"]["trainable"] == trained
    parts = stage["memory"]["parts"]
    assert parts["weights"] == 4 * trained + 2 * (result["parameters"]["total"] - trained) + 4 * width * width
    assert (parts["optimizer"], parts["gradients"]) == (8 * trained, 4 * trained)
    assert stage["memory"]["peak"] < full["memory"]["peak"] / 3
    assert stage["memory"]["fits"] and not full["memory"]["fits"]


def test_a_plan_counts_the_flops_that_a_run_reports(llama_8b: Path) -> None:
    counted = footprint(read_config(llama_8b))
    for stand_in in ("none", "bridge", "forward_only"):
        elo = EloOptions(stand_in=stand_in, also_train=("head",), alignment="forward_only")
        method = find_method("elo", Options(elo=elo))
        stages = plan(llama_8b, stand_in=stand_in, also_train=("head",), alignment="forward_only")["stages"]
        for phase, stage in zip(method.phases, stages.values(), strict=True):
            expected = method.flops_per_token(phase, counted, (0, 31), 2048)
            assert stage["flops_per_token"]["total"] == pytest.approx(expected, rel=1e-12)


def test_what_stands_in_and_trains_besides_shows_in_cost_and_memory(llama_8b: Path) -> None:
    def stage(**arguments: Any) -> dict[str, Any]:
        return plan(llama_8b, **arguments)["stages"]["elo_pretraining"]

    published, ends, bridge, forward_only = (
        stage(**PUBLISHED), stage(stand_in="none"), stage(stand_in="bridge"), stage()
    )  # fmt: skip
    for kind in ("flops_per_token", "memory"):
        key = "total" if kind == "flops_per_token" else "peak"
        costs = [each[kind][key] for each in (published, ends, bridge, forward_only)]
        assert costs == sorted(set(costs)), kind
    assert ends["trainable_parameters"] - published["trainable_parameters"] == 2 * 128256 * 4096


def test_a_tied_head_trains_once() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    parameters = plan(tied)["parameters"]
    layers = parameters["layers"]
    assert parameters["trainable"] == layers[0] + layers[-1] + 512 * 64
    with pytest.raises(EloError, match="ties its LM head to its embedding"):
        plan(tied, also_train=("head",))


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "H100", "sequence_length": 8192} | PUBLISHED,
        {"device": "RTX-4090", "sequence_length": 8192, "per_device_train_batch_size": 8} | PUBLISHED,
        {"device": "B200", "per_device_train_batch_size": 16, "head_loss": "plain"} | PUBLISHED,
        {"device": "L4", "devices": 8} | PUBLISHED,
        {"device": "A100-40GB"},
        {"device": "RTX-4090", "also_train": ()},
        {"device": "L4", "devices": 8},
    ],
    ids=lambda arguments: f"{arguments['device']} {arguments.get('stand_in', 'forward_only')}",
)
def test_the_change_that_is_named_makes_it_fit(llama_8b: Path, arguments: dict[str, Any]) -> None:
    result = plan(llama_8b, **arguments)
    changed = {stage["name"]: stage["change"] for stage in result["stages"].values()}
    assert any(changed.values()), "nothing was too large, so nothing is tested"
    for name, change in changed.items():
        if change is None:
            continue
        assert change["peak"] is not None
        again = dict(arguments) | {key: change[key] for key in ("device", "devices") if change[key]}
        for key, value in change["set"].items():
            prefix = {"layer_alignment": "alignment_", "elo_pretraining": ""}[name]
            key = {
                "per_device_train_batch_size": f"{prefix}per_device_train_batch_size",
                "optim": f"{prefix}optim",
                "activation_checkpointing": "activation_checkpointing"
                if name == "layer_alignment"
                else "pretraining_activation_checkpointing",
            }.get(key, key)
            again[key] = value
        memory = plan(llama_8b, **again)["stages"][name]["memory"]
        assert memory["fits"], change
        assert memory["peak"] == change["peak"]


def test_where_the_whole_model_is_too_large_it_is_to_be_detached(llama_8b: Path) -> None:
    stage = plan(llama_8b, device="L4", optim="adafactor", sequence_length=512)["stages"]["elo_pretraining"]
    assert not stage["memory"]["fits"]
    assert stage["change"]["set"] == {"stand_in": "bridge", "alignment": "none"}


def test_one_change_is_preferred_to_two(llama_8b: Path) -> None:
    assert plan(llama_8b, sequence_length=8192)["baselines"]["lora"]["change"]["set"] == {
        "activation_checkpointing": True
    }


def test_what_cannot_fit_says_so() -> None:
    huge = tiny_llama(hidden_size=65536, intermediate_size=4 * 65536, num_attention_heads=512, vocab_size=512000)
    change = plan(huge, device="L4")["stages"]["elo_pretraining"]["change"]
    assert change["device"] or change["devices"] or change["text"] == "no setting or device known here fits it"
    enormous = tiny_llama(hidden_size=2**19, intermediate_size=2**21, num_attention_heads=512, vocab_size=512000)
    change = plan(enormous, device="L4")["stages"]["elo_pretraining"]["change"]
    assert change["text"] == "no setting or device known here fits it"


def test_tables_say_what_they_assume(llama_8b: Path) -> None:
    text = shown(plan(llama_8b, sequence_length=8192, price_per_hour=2.0, **PUBLISHED))
    for words in (
        "8.03B parameters",
        "detached: 1.49B parameters in memory, 436M of them train: layers 0, 31",
        "ELO pretraining",
        "layer alignment does not fit. Smallest change: ",
        "Speed-up (equal tokens): of FLOPs / of wall time",
        "989 TFLOP/s bf16 (data sheet, dense) x 40% used",
        "the kept layers are joined end to end; all but the layers is frozen",
        "activations of layer alignment and LoRA are not recomputed",
        "cost",
    ):
        assert words in text
    text = shown(plan(llama_8b))
    for words in (
        "whole: 8.03B parameters in memory, 1.49B of them train: layers 0, 31, embedding, head",
        "ELO pretraining, forward-only",
        "the other layers are computed without a graph",
    ):
        assert words in text
    assert "layer alignment" not in text
    assert "cost" not in shown(plan(tiny_llama())).split("Peak memory")[0].replace("Time and cost", "")
    assert "max_position_embeddings 64" in shown(plan(tiny_llama(max_position_embeddings=64)))


MISTAKES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: plan(path / "none"), "no such file or folder"),
    (lambda path: plan(path), "holds no config.json"),
    (lambda path: plan(path / "broken.json"), "its config cannot be read"),
    (lambda path: plan(path / "strange.json"), "its config cannot be read"),
    (lambda path: plan(path / "zero.json"), "its config cannot be read"),
    (lambda path: plan(tiny_llama(), layers="first:5"), "selects all 5 layers"),
    (lambda path: plan(tiny_llama(), layers="7"), "names layer 7, but the model has 5 decoder layers"),
    (
        lambda path: plan(tiny_llama(), device="TPU"),
        r"device: 'TPU' is not known; choose one of A100-40GB, .*--measure",
    ),
    (lambda path: plan(tiny_llama(), device="H100", measure=True), "not both"),
    (lambda path: plan(tiny_llama(), optim="lion"), "optim: 'lion' is unknown"),
    (lambda path: plan(tiny_llama(), head_loss="fast"), "head_loss: 'fast' is unknown"),
    (lambda path: plan(tiny_llama(), stand_in="nothing"), "stand_in: got 'nothing'; .*'none', 'bridge'"),
    (lambda path: plan(tiny_llama(), also_train=("heads",)), "also_train: got 'heads'; .*'embedding'"),
    (lambda path: plan(tiny_llama(), alignment="some"), "alignment: got 'some'; "),
    (lambda path: plan(tiny_llama(), tokens=0), "tokens: got 0"),
    (lambda path: plan(tiny_llama(), devices=0), "devices: got 0"),
    (lambda path: plan(tiny_llama(), alignment_share=1.0), "alignment_share: got 1.0"),
    (lambda path: plan(tiny_llama(), utilisation=40.0), "utilisation: got 40.0"),
    (lambda path: plan(tiny_llama(), price_per_hour=float("nan")), "price_per_hour: got nan"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_are_told(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "strange.json").write_text('{"model_type": "unheard_of"}')
    (tmp_path / "zero.json").write_text(json.dumps(LLAMA_8B | {"num_attention_heads": 0}))
    with pytest.raises(EloError, match=message):
        call(tmp_path)


def test_a_family_that_cannot_be_detached_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text", "num_hidden_layers": 4}))
    with pytest.raises(UnsupportedArchitectureError):
        plan(tmp_path)


def test_devices_are_found_by_any_spelling() -> None:
    for name in DEVICES:
        assert find_device(name.lower().replace("-", " ")).name == name
    assert find_device("NVIDIA A100 80GB").name == "A100-80GB"
    assert find_device("4090").name == "RTX-4090"
    assert find_device("h100").matmul_flops == 989e12


def test_this_machine_is_measured() -> None:
    measured = measure_matmul_rate(0.1, precision="fp32", size=256)
    assert measured.measured and measured.precision == "fp32"
    assert 1e8 < measured.matmul_flops < 1e16
    assert 1e8 < measured.bandwidth < 1e14
    assert measured.memory_bytes > 2**28


def test_a_plan_for_this_machine_uses_its_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measure_matmul_rate(0.1, precision="fp32", size=256)
    monkeypatch.setattr("elo.plan.plan._this_machine", lambda: seen)
    result = plan(tiny_llama(), tokens=10_000, sequence_length=64, tokens_per_step=256, measure=True)
    device = result["device"]
    assert device["measured"] and device["matmul_flops"] == seen.matmul_flops
    assert 0 < device["utilisation"] < 3
    pretraining = result["stages"]["elo_pretraining"]
    compute = pretraining["flops_per_token"]["total"] / (device["utilisation"] * device["matmul_flops"])
    assert pretraining["seconds"] > compute * pretraining["tokens"] > 0
    assert "(measured on one layer of this model)" in shown(result)


def test_plan_is_imported_without_torch() -> None:
    code = "import sys, elo.plan.plan; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_are_keys_of_the_configuration() -> None:
    from elo.train.settings import TrainingSettings

    elsewhere = {"sequence_length", "sharded"}  # data.sequence_length; training_arguments.fsdp
    assert set(Choices.__dataclass_fields__) - elsewhere <= set(TrainingSettings.model_fields)
