"""`elo plan` as users call it: from a run's configuration or a model alone, without weights."""

import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input_fixtures import change
from plan_fixtures import LLAMA_8B, tiny_llama
from rich.console import Console
from run_fixtures import write_world

import elo.plan.plan
from elo.budget import divide_sequences
from elo.checkpoint.counting import footprint, read_config
from elo.cli import main
from elo.config import load_config
from elo.data.shards import PreparedData
from elo.errors import EloError, UnsupportedArchitectureError
from elo.methods import METHODS
from elo.plan import measure
from elo.plan.devices import DEVICES, find_device, this_machine
from elo.plan.phase import USABLE_MEMORY, Timing
from elo.plan.plan import COMMON_METHODS, plan, planned_run
from elo.plan.schema import Plan
from elo.plan.table import render_plan
from elo.run import run
from elo.train.arguments import wants_bf16
from elo.train.loop import TrainingResult, train
from elo.train.settings import TrainingSettings
from elo.train.vocabulary_cut import choose_rows


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny"))


def saved(folder: Path, **changes: Any) -> Path:
    tiny_llama(**changes).save_pretrained(folder)
    return folder


def planned(model: Path, *overrides: str, method: str | None = None, **arguments: Any) -> Plan:
    named = any(each.startswith("method=") for each in overrides)
    method = method or (None if named else "elo")
    return plan(planned_run(model, overrides, method=method), **{"compare_with": (), **arguments})


def shown(result: Plan, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render_plan(result))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_an_8b_config_is_planned_in_two_seconds(llama_8b: Path, tiny: Path) -> None:
    planned(tiny)  # what is imported late
    start = time.process_time()
    result = planned(llama_8b, "data.sequence_length=8192", method="elo_paper")
    assert time.process_time() - start < 2
    assert result.model.total_parameters == 8_030_261_248
    pretraining, alignment = result.run.phases
    assert pretraining.trainable_parameters == 2 * 218_112_000
    assert pretraining.fits and not alignment.fits and not result.run.fits


def test_what_is_written_is_read_back(tiny: Path) -> None:
    result = plan(tiny, price_per_hour=2.0)
    written = json.dumps(result.model_dump(mode="json"), allow_nan=False)
    assert Plan.model_validate_json(written) == result
    assert json.loads(written)["run"]["seconds"] == result.run.seconds


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_has_the_phases_tokens_and_flops_of_the_run(llama_8b: Path, name: str) -> None:
    result = planned(llama_8b, "tokens=100e6", "training.activation_checkpointing=true", method=name)
    config = load_config(result.config)
    counted = footprint(read_config(llama_8b))
    pretraining, alignment = divide_sequences(config, 100_000_000 // 2048)
    sequences = {"pretraining": pretraining, "alignment": alignment, "all": pretraining + alignment}
    for phase, found in zip(config.method.phases, result.run.phases, strict=True):
        flops = config.method.flops_per_token(phase, counted, (0, 31), 2048, activation_checkpointing=True)
        assert (found.name, found.middle) == (phase.name, phase.middle)
        assert found.tokens == sequences[phase.portion] * 2048
        assert found.flops_per_token.total == flops.total and found.flops == flops.total * found.tokens


def test_each_phase_is_planned_with_its_own_settings(llama_8b: Path) -> None:
    plain = planned(llama_8b)
    changed = planned(llama_8b, "training.phases.layer_alignment={activation_checkpointing: true, optim: adafactor}")
    assert changed.run.phases[0] == plain.run.phases[0]
    assert changed.run.phases[1].flops_per_token.recompute > 0 == plain.run.phases[1].flops_per_token.recompute
    assert changed.run.phases[1].memory.parts["optimizer"] < plain.run.phases[1].memory.parts["optimizer"] / 100


def test_the_whole_run_is_the_sum_of_its_phases(llama_8b: Path) -> None:
    run = planned(llama_8b, method="elo_paper", price_per_hour=3.0, devices=2).run
    pretraining, alignment = run.phases
    assert alignment.tokens / run.tokens == pytest.approx(0.1, rel=0.01)
    for key in ("tokens", "flops", "seconds", "cost", "device_hours"):
        assert getattr(run, key) == pytest.approx(getattr(pretraining, key) + getattr(alignment, key))
    assert run.cost == pytest.approx(3.0 * run.device_hours) == pytest.approx(3.0 * 2 * run.seconds / 3600)
    assert run.peak_bytes == alignment.memory.peak_bytes
    for phase in run.phases:
        assert phase.seconds == pytest.approx(phase.tokens / phase.tokens_per_second)


def test_speed_ups_are_those_of_the_whole_run_on_one_budget(llama_8b: Path) -> None:
    result = plan(planned_run(llama_8b, method="elo_paper"))
    assert [baseline.name for baseline in result.baselines] == ["full", "full_recomputing", "lora"]
    full, recomputing, _ = result.baselines
    for speed_up, baseline in zip(result.speed_ups, result.baselines, strict=True):
        assert speed_up.over == baseline.name
        assert speed_up.flops == baseline.flops / result.run.flops
        assert speed_up.seconds == baseline.seconds / result.run.seconds
    assert recomputing.flops > full.flops and recomputing.peak_bytes < full.peak_bytes
    # The published arithmetic with attention scores at 2,048 tokens.
    assert result.speed_ups[0].flops == pytest.approx(5.17, rel=0.03)


def test_a_baseline_is_not_planned_twice(tiny: Path) -> None:
    assert [each.name for each in plan(planned_run(tiny, method="full")).baselines] == ["full_recomputing", "lora"]
    recomputing = planned_run(tiny, ["training.activation_checkpointing=true"], method="full")
    assert [each.name for each in plan(recomputing).baselines] == ["lora"]


def test_the_common_methods_stand_side_by_side(llama_8b: Path) -> None:
    result = planned(llama_8b, compare_with=COMMON_METHODS)
    text = shown(result)
    for method in result.methods:
        assert method.label in text
    lisa = next(each for each in result.baselines if each.name == "lisa").phases[0]
    assert lisa.memory.parts["weights"] == 4 * result.model.total_parameters
    assert lisa.memory.parts["optimizer"] == 8 * lisa.trainable_parameters < 8 * result.model.total_parameters / 3


def test_a_run_without_a_token_budget_says_what_is_planned(tiny: Path) -> None:
    result = planned(tiny, "tokens=null")
    assert result.run.tokens == pytest.approx(1e9, rel=0.001)
    assert "the plan assumes 1,000,000,000" in shown(result)


# The vocabulary in training.


def test_vocabulary_rows_are_the_runs_or_the_option_or_all(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    cut = ("training.vocabulary=corpus", f"output={output}")
    whole = planned(tiny, *cut)
    assert whole.model.vocabulary_rows == 512 and "--vocabulary-rows" in shown(whole)
    asked = planned(tiny, *cut, vocabulary_rows=100)
    assert asked.model.vocabulary_rows == 100 and "100 vocabulary rows in training" in shown(asked)
    (output / "stages").mkdir(parents=True)
    record = output / "stages" / "vocabulary-elo_pretraining.json"
    record.write_text(json.dumps({"record": {"rows": 100}}))
    assert planned(tiny, *cut).run == asked.run
    first = asked.run.phases[0]
    assert first.trainable_parameters == whole.run.phases[0].trainable_parameters - 2 * 412 * 64
    assert first.flops_per_token.head == whole.run.phases[0].flops_per_token.head * 100 / 512
    # The whole embedding and head stay in memory, in fp32, to be put back.
    plain = planned(tiny).run.phases[0].memory.parts["weights"]
    assert first.memory.parts["weights"] == plain - 4 * 2 * 412 * 64 + 4 * 2 * 512 * 64


def test_vocabulary_rows_are_counted_in_text_that_is_prepared_for_this_run(tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"method": "full"}
    config["training"] |= {"vocabulary": "corpus", "vocabulary_sample": 5}
    assert "--vocabulary-rows" in shown(plan(config, compare_with=()))
    run(config, until="prepare")
    counted = plan(change(config, data__sequence_length=16), compare_with=())
    rows = choose_rows(PreparedData.open(tmp_path / "run" / "prepared"), tmp_path / "base", sample=5, seed=0)
    assert counted.model.vocabulary_rows == len(rows) < counted.model.vocab_size
    assert "--vocabulary-rows" not in shown(counted)
    other = plan(change(config, data__heldout_share=0.2), compare_with=())
    assert other.model.vocabulary_rows == other.model.vocab_size and "--vocabulary-rows" in shown(other)


# What does not fit.


@pytest.mark.parametrize(
    ("overrides", "arguments", "expected"),
    [
        (["training.activation_checkpointing=true"], {"device": "B200"}, []),
        ([], {"device": "B200", "devices": 8}, []),
        ([], {"device": "H200"}, ["optim: adamw_8bit"]),
        ([], {"devices": 8}, ["training_arguments: {fsdp: true}"]),
        ([], {"device": "L4"}, []),
    ],
)
def test_a_phase_that_does_not_fit_names_what_would_help(
    llama_8b: Path, overrides: list[str], arguments: dict[str, Any], expected: list[str]
) -> None:
    (phase,) = planned(llama_8b, *overrides, method="full", **arguments).run.phases
    assert phase.suggestion == expected
    if expected:
        assert not phase.fits
        changed = [f"training.{expected[0].replace(': ', '=', 1)}"]
        assert planned(llama_8b, *overrides, *changed, method="full", **arguments).run.fits


def test_what_does_not_fit_is_said(llama_8b: Path) -> None:
    text = shown(planned(llama_8b, method="full", devices=8))
    assert "Full CPT does not fit; it fits with training_arguments: {fsdp: true}" in text
    assert shown(planned(llama_8b, method="full", device="L4")).count("Full CPT does not fit\n") == 1


# Notes.


def test_notes_say_what_the_numbers_assume(tiny: Path, tmp_path: Path) -> None:
    text = shown(planned(tiny, "training.optim=sgd", "training.bf16=false", devices=3))
    for words in (
        "989 TFLOP/s bf16 (data sheet, dense), of which training reaches 40% (assumed)",
        "communication is not counted",
        "each holds the whole model",
        "tokens_per_step must be a multiple of 6,144",
        "memory and traffic of sgd are assumed to be those of AdamW",
        "bf16: the plan uses the rate of bf16",
    ):
        assert words in text
    assert "cost" not in text.split("Peak memory")[0].replace("Time and cost", "")
    assert "cost" in shown(planned(tiny, price_per_hour=1.0)).replace("Time and cost", "")
    short = saved(tmp_path, max_position_embeddings=64)
    assert "max_position_embeddings 64" in shown(planned(short))


def test_layers_are_chosen_only_for_methods_that_use_them(tmp_path: Path) -> None:
    two = saved(tmp_path, num_hidden_layers=2)  # the default, first:1,last:1, is all of them
    result = planned(two, method="lora", compare_with=("full",))
    assert result.model.layers == [] and "selected layers" not in shown(result)
    with pytest.raises(EloError, match="selects all 2 layers"):
        planned(two, method="lora", compare_with=("elo",))


# Mistakes.

MISTAKES: list[tuple[list[str], dict[str, Any], str]] = [
    (["layers=first:5"], {}, "selects all 5 layers"),
    (["layers=7"], {}, "names layer 7, but the model has 5 decoder layers"),
    ([], {"device": "TPU"}, r"device: 'TPU' is not known; choose among A100-40GB, .*--measure"),
    ([], {"device": "H100", "measure": True}, "together with measure"),
    ([], {"devices": 0}, "devices: got 0"),
    ([], {"price_per_hour": float("nan")}, "price_per_hour: got nan"),
    ([], {"price_per_hour": -1.0}, "price_per_hour: got -1"),
    ([], {"vocabulary_rows": 10}, "training.vocabulary is all"),
    (["training.vocabulary=corpus"], {"vocabulary_rows": 513}, "vocabulary_rows: got 513"),
    (["training.vocabulary=corpus"], {"vocabulary_rows": 0}, "vocabulary_rows: got 0"),
    ([], {"compare_with": ("ful",)}, "compare_with: there is no method 'ful'"),
    (["tokens=1000"], {}, "less than one update of each phase"),
    (["training.optim=lion"], {}, "training.optim: got 'lion'; write one of"),
    (["data.sequence_length=3000"], {}, "tokens_per_step: 65536 is not a multiple"),
    (["sequence_length=512"], {}, "did you mean 'data.sequence_length'"),
]


@pytest.mark.parametrize(("overrides", "arguments", "message"), MISTAKES, ids=[each[2][:30] for each in MISTAKES])
def test_mistakes_end_in_a_message(tiny: Path, overrides: list[str], arguments: Any, message: str) -> None:
    with pytest.raises(EloError, match=message):
        planned(tiny, *overrides, **arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no such file or folder"),
        ("", None, "has no config.json"),
        ("broken.json", "{", "its config cannot be read"),
        ("strange.json", '{"model_type": "unheard_of"}', "its config cannot be read"),
        ("zero.json", json.dumps(LLAMA_8B | {"num_attention_heads": 0}), "its config cannot be read"),
        ("none.yaml", None, "no such configuration file"),
    ],
)
def test_a_model_or_file_that_is_not_one_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EloError, match=message):
        plan(tmp_path / name)


def test_a_tied_head_trains_with_its_embedding(tmp_path: Path) -> None:
    tied = saved(tmp_path, tie_word_embeddings=True)
    result = planned(tied)
    layers = result.model.layer_parameters
    assert result.run.phases[0].trainable_parameters == layers[0] + layers[-1] + 512 * 64
    with pytest.raises(EloError, match="ties its LM head to its embedding"):
        planned(tied, "method={name: elo, also_train: [head]}")


def test_a_family_that_cannot_be_detached_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text", "num_hidden_layers": 4}))
    with pytest.raises(UnsupportedArchitectureError):
        plan(planned_run(tmp_path, method="elo"))


# The command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "nan"], "--tokens: got nan; write a number"),
        (["--tokens", "inf"], "--tokens: got inf; write a number"),
        (["--tokens", "0"], "--tokens: got 0; write a number"),
        (["--tokens", "-5"], "--tokens: got -5; write a number"),
        (["--tokens", "1e300"], "tokens: input should be less than"),
        (["--tokens", "many"], "--tokens"),
        (["--devices", "0"], "devices: got 0"),
        (["--devices", "nan"], "--devices"),
        (["--price-per-hour", "inf"], "price_per_hour: got inf"),
        (["--method", "elos"], "method: there is no method 'elos'; did you mean 'elo'?"),
        (["--set", "data.sequence_length=nan"], "data.sequence_length: "),
        (["--output", "."], "is a folder"),
    ],
    ids=" ".join,
)
def test_a_bad_option_ends_in_one_message(
    tiny: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tiny), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_command_plans_a_runs_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    corpora = {"ko": "ko.jsonl", "en": "en.jsonl"}
    value = {"model": str(tiny), "output": "run", "data": {"target": "ko", "source": "en", "corpora": corpora}}
    config.write_text(json.dumps(value | {"method": "lisa", "tokens": 10**8}))
    output = tmp_path / "plan.json"
    main(["plan", str(config), "--set", "training.optim=adafactor", "--tokens", "2e8", "-o", str(output)])
    result = Plan.model_validate_json(output.read_text())
    assert (result.run.name, result.config["tokens"]) == ("lisa", 200_000_000)
    assert result.config["training"]["optim"] == "adafactor"
    assert [each.name for each in result.baselines] == ["full", "full_recomputing", "lora"]
    assert "LISA" in capsys.readouterr().out
    main(["plan", str(tiny), "-o", str(output)])
    names = [each.name for each in Plan.model_validate_json(output.read_text()).methods]
    assert names == ["lora", *COMMON_METHODS, "full_recomputing"]


# Devices.


def test_devices_are_found_by_any_spelling() -> None:
    for name in DEVICES:
        assert find_device(name.lower().replace("-", " ")).name == name
    assert find_device("NVIDIA A100 80GB").name == "A100-80GB"
    assert find_device("4090").name == "RTX-4090"
    assert find_device("h100").matmul_flops == 989e12


def test_this_machine_has_the_precision_and_memory_of_training_here() -> None:
    here = this_machine()
    assert here.precision == ("bf16" if wants_bf16(TrainingSettings()) else "fp32")
    assert here.memory_bytes > 2**28 and here.matmul_flops is None


# Measuring this machine.

SMALL = ("tokens=100_000", "data.sequence_length=64")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainingResult]:
    """Results of the trainings that a plan has measured."""
    results: list[TrainingResult] = []

    def recording(*arguments: Any, **keywords: Any) -> TrainingResult:
        results.append(train(*arguments, **keywords))
        return results[-1]

    monkeypatch.setattr(measure, "train", recording)
    return results


@pytest.mark.parametrize("name", METHODS)
def test_each_phase_is_measured_as_it_would_train(
    tiny: Path, tmp_path: Path, name: str, trained: list[TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    run = planned(tiny, *SMALL, "training.tokens_per_step=512", method=name, measure=True).run
    assert torch.equal(torch.get_rng_state(), before) and not list(Path().iterdir()), "nothing is left behind"
    assert len(trained) == len(run.phases)
    for result, phase in zip(trained, run.phases, strict=True):
        assert phase.measured and phase.seconds > 0
        assert (result.steps, result.tokens) == (3, 3 * 2 * 64), "two micro-steps stand for any number"
        if not METHODS[name].redraws_layers:
            assert result.trainable_parameters == phase.trainable_parameters


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_settings_of_the_run_are_measured(tiny: Path, packing: str, trained: list[TrainingResult]) -> None:
    changes = (
        *SMALL,
        f"data.packing={packing}",
        "training.vocabulary=corpus",
        "training.tokens_per_step=128",
        "training.per_device_train_batch_size=2",
    )
    run = planned(tiny, *changes, method="full", measure=True, vocabulary_rows=100).run
    assert trained[0].tokens == 3 * 128, "an update of one micro-step has one here too"
    assert trained[0].trainable_parameters == run.phases[0].trainable_parameters
    assert (trained[0].attention != "model's own") == (packing == "true")


def test_new_rows_are_measured_among_the_rows_that_train(tmp_path: Path, trained: list[TrainingResult]) -> None:
    saved(tmp_path, elo_vocabulary={"rows": {"start": 400, "stop": 512}})
    changes = (*SMALL, "method={name: elo, embedding_rows: new, alignment: none}", "training.tokens_per_step=64")
    planned(tmp_path, *changes, measure=True)
    planned(tmp_path, *changes, "training.vocabulary=corpus", measure=True, vocabulary_rows=100)
    layers = trained[0].trainable_parameters - 2 * 112 * 64
    assert trained[1].trainable_parameters == layers + 2 * 99 * 64


def test_an_update_takes_its_micro_steps_and_one_optimizer_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_measure", lambda *_: Timing(micro_step=0.5, last_micro_step=0.7))
    for step, devices, seconds in ((64, 1, 0.7), (512, 1, 7 * 0.5 + 0.7), (512, 4, 0.5 + 0.7)):
        changes = (*SMALL, f"training.tokens_per_step={step}")
        result = planned(tiny, *changes, method="full", measure=True, devices=devices)
        phase = result.run.phases[0]
        assert phase.seconds == pytest.approx(seconds * phase.tokens / step)
        assert result.device.training_flops == pytest.approx(64 * phase.flops_per_token.total / 0.5)
    assert "by training each phase for a few updates" in shown(result)


def test_what_does_not_fit_is_estimated_at_the_measured_rate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_memory(size: int) -> None:
        monkeypatch.setattr(elo.plan.plan, "this_machine", lambda: replace(find_device("H100"), memory_bytes=size))

    monkeypatch.setattr(measure, "_measure", lambda *_: Timing(0.5, 0.7))
    changes = (*SMALL, "training.tokens_per_step=64")
    peaks = [phase.memory.peak_bytes for phase in planned(tiny, *changes, method="elo_paper").run.phases]
    with_memory(int(sum(peaks) / len(peaks) / USABLE_MEMORY))
    result = planned(tiny, *changes, method="elo_paper", measure=True)
    pretraining, alignment = result.run.phases
    assert (pretraining.measured, alignment.measured) == (True, False)
    assert alignment.seconds >= alignment.flops / result.device.training_flops
    assert "ELO as published could not be measured on one device" in shown(result)
    with_memory(2**20)
    with pytest.raises(EloError, match="no phase fits into one device of this machine"):
        planned(tiny, *changes, method="full", measure=True)
