"""FSDP2 over two processes: what is trained, saved in pieces and put together is what one process makes."""

import itertools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from fork_fixtures import launched
from method_fixtures import CASES, FIRST_NEW_ROW
from run_fixtures import write_base, write_world
from surgery_fixtures import assert_same, stored
from training_fixtures import LENGTH, SETTINGS, rows
from transformers import AutoModelForCausalLM
from zoo import logits_of, tiny_config, tiny_model

from elo.checkpoint.architecture import find_architecture
from elo.errors import EloError, StoppedBySignalError
from elo.run import run
from elo.train import loop
from elo.train.arguments import check_settings, check_sharding, sequences_per_step
from elo.train.distributed import check_engaged, main_alone_loads, whole_parts, without_weights
from elo.train.phase import load_trainable, save_checkpoint, train_checkpoint
from elo.train.settings import TrainingSettings
from elo.train.trained_files import TrainedFiles

_launches = itertools.count()
STAGES = ("elo_pretraining", "layer_alignment")


def launch(config: dict[str, Any], path: Path, *, processes: int = 2, **environment: str) -> tuple[int, str]:
    """Run `config` in several processes with what sharded_worker.py adds; the worst exit status, and what was said."""
    path.write_text(yaml.safe_dump(config))
    log = path.with_suffix(f".{next(_launches)}.txt")

    def work() -> None:
        os.environ |= {f"ELO_TEST_{name.upper()}": value for name, value in environment.items()}
        import sharded_worker

        sharded_worker.main(["run", str(path)])

    statuses = launched(work, log, processes)
    return max(map(abs, statuses)), log.read_text()


def sharded(
    config: dict[str, Any], output: Path, phases: Sequence[str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """The same run with weights divided among processes, in all phases or in some."""
    changed = {**config, "output": str(output), "training": {**config["training"]}}
    divided = {"training_arguments": arguments or {"fsdp": True}}
    if phases is None:
        changed["training"] |= divided
    else:
        changed["training"]["phases"] = dict.fromkeys(phases, divided)
    return changed


def losses(root: Path, stage: str) -> list[float]:
    record = json.loads((root / "stages" / f"{stage}.json").read_text())["record"]
    return [point["loss"] for point in record["losses"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process, and one of two that share weights, killed once and gone on with."""
    root = tmp_path_factory.mktemp("sharded")
    config = write_world(root)
    write_base(root / "base", tie=True)
    config["method"] = {"name": "elo", "share": 0.2, "scale": 1.0}
    config["training"] |= {"per_device_train_batch_size": 1, "embedding_learning_rate": 2e-3}
    run(config)
    shared = sharded(config, root / "shared")
    status, said = launch(shared, root / "shared.yaml", die_at="layer_alignment:2")
    checkpoint = root / "shared" / "layer_alignment-checkpoints" / "checkpoint-2"
    assert status != 0 and (checkpoint / "elo_checkpoint.json").is_file(), said
    whole = {"model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"}
    assert not whole & {path.name for path in checkpoint.iterdir()}, "no process writes the whole model"
    with pytest.raises(EloError, match=r"checkpoint-2: was written with FSDP, .*without.*launch it as before"):
        run({**config, "output": shared["output"]})
    status, said = launch(shared, root / "shared.yaml")
    assert status == 0, said
    return {"root": root, "config": config}


def test_the_losses_are_those_of_one_process(world: dict[str, Any]) -> None:
    for stage in STAGES:
        assert losses(world["root"] / "shared", stage) == pytest.approx(losses(world["root"] / "run", stage), abs=2e-5)


def test_the_model_is_that_of_one_process(world: dict[str, Any]) -> None:
    ours, theirs = (stored(world["root"] / name / "model") for name in ("shared", "run"))
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in ours, "tied, so stored once"
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert (tensor.float() - theirs[name].float()).abs().max() < 2e-2, name  # bf16 on disk: a few of its steps
    alone, together = (json.loads((world["root"] / name / "results.json").read_text()) for name in ("run", "shared"))
    for one, other in zip(alone["trials"], together["trials"], strict=True):
        assert other["measured"]["bpb"] == pytest.approx(one["measured"]["bpb"], abs=1e-3)
    assert not [path for path in (world["root"] / "shared").rglob("*") if path.name.startswith((".tmp-", "part-"))]


@pytest.mark.slow
def test_never_killed_it_ends_in_the_same_weights(world: dict[str, Any]) -> None:
    status, said = launch(sharded(world["config"], world["root"] / "whole"), world["root"] / "whole.yaml")
    assert status == 0, said
    expected = stored(world["root"] / "shared" / "model")
    for name, tensor in stored(world["root"] / "whole" / "model").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_untied_weights_and_the_bridge(tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"method": {"name": "elo", "share": 0.2}}
    config["training"] |= {"per_device_train_batch_size": 1}
    run(config)
    status, said = launch(sharded(config, tmp_path / "shared"), tmp_path / "shared.yaml")
    assert status == 0, said
    for stage in STAGES[:2]:
        assert losses(tmp_path / "shared", stage) == pytest.approx(losses(tmp_path / "run", stage), abs=2e-5)


@pytest.mark.slow
def test_fewer_processes_go_on(tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"method": "frozen", "tokens": 1920}
    config["training"] |= {"per_device_train_batch_size": 1, "tokens_per_step": 192}
    run(config)
    shared = sharded(config, tmp_path / "shared")
    _, said = launch(shared, tmp_path / "shared.yaml", processes=3, die_at="frozen:4")
    assert (tmp_path / "shared" / "frozen-checkpoints" / "checkpoint-4").is_dir(), said
    status, said = launch(shared, tmp_path / "shared.yaml", processes=2)
    assert status == 0, said
    assert losses(tmp_path / "shared", "frozen") == pytest.approx(losses(tmp_path / "run", "frozen"), abs=2e-5)


@pytest.mark.parametrize("frozen_as_stored", ["1", pytest.param("", marks=pytest.mark.slow)])
def test_in_bf16_the_losses_are_those_of_one_process(frozen_as_stored: str, tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"method": "frozen"}
    config["training"] |= {"per_device_train_batch_size": 1, "bf16": True}
    run(config)
    status, said = launch(
        sharded(config, tmp_path / "shared"), tmp_path / "shared.yaml", frozen_as_stored=frozen_as_stored
    )
    assert status == 0, said
    assert losses(tmp_path / "shared", "frozen") == pytest.approx(losses(tmp_path / "run", "frozen"), abs=1e-2)
    base, model, alone = (stored(tmp_path / name) for name in ("base", "shared/model", "run/model"))
    trained = [name for name in base if not torch.equal(base[name], model[name])]
    assert trained == [name for name in base if not torch.equal(base[name], alone[name])]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_in_bf16_has_the_losses_of_one_process(stage: int, tmp_path: Path, deepspeed_on_cpus: None) -> None:
    config = write_world(tmp_path) | {"method": "frozen"}
    config["training"] |= {"per_device_train_batch_size": 1, "bf16": True}
    run(config)
    divided = sharded(config, tmp_path / "shared", deepspeed={"zero_optimization": {"stage": stage}})
    status, said = launch(divided, tmp_path / "shared.yaml")
    assert status == 0, said
    assert losses(tmp_path / "shared", "frozen") == pytest.approx(losses(tmp_path / "run", "frozen"), abs=1e-2)
    base, model, alone = (stored(tmp_path / name) for name in ("base", "shared/model", "run/model"))
    trained = [name for name in base if not torch.equal(base[name], model[name])]
    assert trained == [name for name in base if not torch.equal(base[name], alone[name])]


@pytest.fixture
def deepspeed_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's operation for CPUs, compiled before a launch has to wait for it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed", reason="pip install deepspeed")
    deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder").load()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_killed_and_gone_on_with_ends_as_one_process(
    stage: int, tmp_path: Path, deepspeed_on_cpus: None
) -> None:
    config = write_world(tmp_path) | {"method": {"name": "elo", "share": 0.2, "scale": 1.0}}
    config["training"] |= {"per_device_train_batch_size": 1}
    run(config)
    deepspeed = {"zero_optimization": {"stage": stage}}
    divided = sharded(config, tmp_path / "shared", ["elo_pretraining"], deepspeed=deepspeed)
    _, killed = launch(divided, tmp_path / "shared.yaml", die_at="elo_pretraining:4")
    with pytest.raises(EloError, match=r"checkpoint-4: was written with DeepSpeed, .*without.*launch it as before"):
        run({**config, "output": divided["output"]})
    _, fewer = launch(divided, tmp_path / "shared.yaml", processes=1)
    assert "written by 2 processes, and DeepSpeed cannot resume it with 1" in fewer, killed + fewer
    status, said = launch(divided, tmp_path / "shared.yaml")
    assert status == 0, said
    for name in STAGES[:2]:
        assert losses(tmp_path / "shared", name) == pytest.approx(losses(tmp_path / "run", name), abs=2e-5)
    ours, theirs = (stored(tmp_path / name / "model") for name in ("shared", "run"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.float() - theirs[name].float()).abs().max() < 2e-2, name


@pytest.mark.parametrize(
    ("engaged", "version", "asked", "message"),
    [
        ("FSDP", 1, "fsdp", "FSDP: the launcher sets version 1"),
        ("FSDP", 2, None, "FSDP: only the launcher sets it"),
        ("FSDP", 2, "deepspeed", r"training_arguments\.deepspeed: .*accelerate runs FSDP"),
        ("DEEPSPEED", 2, None, "DeepSpeed: only the launcher sets it"),
        ("DEEPSPEED", 2, "fsdp", r"training_arguments\.fsdp: .*accelerate runs DEEPSPEED"),
        ("DEEPSPEED", 2, "deepspeed", r"training_arguments\.deepspeed: needs a launcher"),
        ("MULTI_GPU", 2, "fsdp", r"training_arguments\.fsdp: .*accelerate runs MULTI_GPU"),
        ("MULTI_GPU", 2, "deepspeed", r"training_arguments\.deepspeed: .*accelerate runs MULTI_GPU"),
    ],
)
def test_sharding_other_than_asked_for_is_refused(engaged: str, version: int, asked: str | None, message: str) -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType[engaged], is_fsdp2=version == 2, device=torch.device("cuda")
    )
    with pytest.raises(EloError, match=message):
        check_engaged(accelerator, TrainingSettings(training_arguments={asked: True} if asked else {}))


def test_fsdp_on_cpus_is_refused_instead_of_training_without_it(tmp_path: Path) -> None:
    def work() -> None:
        with pytest.raises(
            EloError, match=r"training_arguments\.fsdp: .*MULTI_CPU with 2 process.*on cpu; launch with"
        ):
            check_sharding(SETTINGS.model_copy(update={"training_arguments": {"fsdp": True}}), LENGTH)
        torch.distributed.barrier()  # neither may exit while the other is still connecting

    assert launched(work, tmp_path / "log.txt", 2) == [0, 0], (tmp_path / "log.txt").read_text()


def test_one_process_may_prepare_for_many(tmp_path: Path) -> None:
    config = sharded(write_world(tmp_path) | {"method": "full"}, tmp_path / "shared")
    run(config, until="prepare")
    with pytest.raises(EloError, match=r"training_arguments\.fsdp: needs several processes.*NO with 1 process"):
        run(config)
    assert {path.name for path in (tmp_path / "shared" / "stages").iterdir()} == {"prepared.json"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_clipping": 5.0}, r"deepspeed: gradient_clipping=5\.0 vs hf max_grad_norm=1\.0: .*remove it"),
        ({"zero_optimization": {"stage": 0}}, r"deepspeed\.zero_optimization\.stage: got 0, which shards nothing"),
        ({"optimizer": {"type": "AdamW"}}, r"deepspeed\.optimizer: .*remove it"),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_the_settings_is_refused(config: Any, message: str) -> None:
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    arguments = {"deepspeed": {"zero_optimization": {"stage": 2}, **config}}
    with pytest.raises(EloError, match=rf"training\.training_arguments\.{message}"):
        check_settings(SETTINGS.model_copy(update={"training_arguments": arguments}), LENGTH, "training")


def test_deepspeed_in_bf16_is_refused_where_it_would_round_what_is_stored(tmp_path: Path) -> None:
    settings = TrainingSettings(bf16=True, training_arguments={"deepspeed": {"zero_optimization": {"stage": 2}}})
    for dtype in (torch.bfloat16, torch.float32):
        tiny_model(tiny_config("llama")).to(dtype).save_pretrained(tmp_path / str(dtype))
    assert load_trainable(tmp_path / "torch.bfloat16", settings)[1] == torch.bfloat16
    with pytest.raises(EloError, match=r"float32: its weights are fp32, which DeepSpeed would round"):
        load_trainable(tmp_path / "torch.float32", settings)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "olmo2", "deepseek_v3"])
def test_a_model_without_weights_takes_those_of_the_main_process(family: str) -> None:
    whole = tiny_model(tiny_config(family))
    whole.config.dtype = torch.bfloat16
    empty = without_weights(whole.config, torch.float32)
    assert whole.config.dtype == torch.bfloat16, "what is given is left as it is"
    assert find_architecture(empty) == find_architecture(whole)
    settings = TrainingSettings(training_arguments={"fsdp": True})
    # Its router has a buffer on disk, which accelerate would not hand out.
    assert main_alone_loads(settings, empty) == main_alone_loads(settings, whole) == (family != "deepseek_v3")
    if family != "deepseek_v3":
        empty.load_state_dict(whole.state_dict())
        assert torch.equal(logits_of(empty), logits_of(whole))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen2_moe"])
def test_parts_make_the_same_checkpoint_as_the_whole(family: str, tmp_path: Path) -> None:
    tiny_model(tiny_config(family)).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    for name, parts in (("whole", False), ("parts", True)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        files = TrainedFiles(tmp_path / "base", model)
        files.set_trained(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        save_checkpoint(model, whole_parts(model) if parts else None, files, tmp_path / name)
    assert_same(stored(tmp_path / "whole"), stored(tmp_path / "parts"))
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}
    expected = {name: (t.float() + 0.5).bfloat16() for name, t in stored(tmp_path / "base").items()}
    assert_same(stored(tmp_path / "whole"), expected)


METHODS = ["lisa", "lisa-window", "lora", "lora-with ends", "lora-new rows", "frozen-half", "frozen-new rows"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_two_processes_ends_as_in_one(name: str, tmp_path: Path) -> None:
    _ends_as_in_one(name, tmp_path, {"fsdp": {"fsdp": True}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "elo", "elo-removed", *METHODS])
def test_a_method_with_deepspeed_ends_as_in_one(name: str, tmp_path: Path, deepspeed_on_cpus: None) -> None:
    divided = {f"zero{stage}": {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)}
    _ends_as_in_one(name, tmp_path, divided)


def _ends_as_in_one(name: str, tmp_path: Path, divided: dict[str, dict[str, Any]]) -> None:
    """Train with data parallelism and as in `divided`, there also killed and resumed, and compare with one process."""
    case = next(each for each in CASES if each.name == name)
    case.start(tie=name == "lora-with ends").save_pretrained(tmp_path / "base")
    plain = SETTINGS.model_copy(update={"per_device_train_batch_size": 1, "save_steps": 2, "weight_decay": 0.1})

    def train(folder: str, settings: TrainingSettings) -> None:
        train_checkpoint(
            tmp_path / "base",
            tmp_path / folder,
            rows=rows(6 * sequences_per_step(LENGTH, settings)),
            prepare=lambda model: case.method.prepare(model, case.phase, case.setup()),
            seed=5,
            settings=settings,
            scratch=tmp_path / f"{folder}-checkpoints",
        )

    write = loop.write_checkpoint

    def write_and_stop(accelerator: Any, folder: Path, step: int, *arguments: Any) -> None:
        write(accelerator, folder, step, *arguments)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        import sharded_worker  # noqa: F401

        train("parallel", plain)
        for folder, arguments in divided.items():
            settings = plain.model_copy(update={"training_arguments": arguments})
            train(folder, settings)
            with pytest.raises(StoppedBySignalError), pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "write_checkpoint", write_and_stop)
                train(f"{folder}-resumed", settings)
            train(f"{folder}-resumed", settings)

    train("alone", plain)
    log = tmp_path / "log.txt"
    assert launched(work, log, 2) == [0, 0], log.read_text()
    base, alone = (stored(tmp_path / folder) for folder in ("base", "alone"))
    for folder in divided:
        assert_same(stored(tmp_path / folder), stored(tmp_path / f"{folder}-resumed"))
    for folder in ("parallel", *divided):
        other = stored(tmp_path / folder)
        assert other.keys() == base.keys()
        for key, tensor in alone.items():
            assert (tensor - other[key]).abs().max() < 1e-4, f"{folder}: {key}"
            assert torch.equal(tensor, base[key]) == torch.equal(other[key], base[key]), f"{key}: trained or not"
        if case.method.needs_new_rows:
            old = slice(FIRST_NEW_ROW)
            assert torch.equal(other["lm_head.weight"][old], base["lm_head.weight"][old])
            assert not torch.equal(other["lm_head.weight"], base["lm_head.weight"])
