"""Configurations of LLaMA-Factory and Axolotl become configurations that load; what is lost is listed."""

import json
from pathlib import Path

import pytest
import yaml

from elo.cli import main
from elo.config import RunConfig, load_config
from elo.config.translate import Translation, render, translate
from elo.errors import EloError

FACTORY = """
model_name_or_path: Qwen/Qwen3-0.6B-Base
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 16
lora_dropout: 0.05
lora_target: all
dataset: news, wiki
cutoff_len: 1024
output_dir: saves/news
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 2e-4
max_steps: 100
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
seed: 7
val_size: 0.01
deepspeed: ds_z2.json
flash_attn: sdpa
report_to: none
"""
AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-135M
load_in_4bit: false
pretraining_dataset:
  - {path: owner/news, name: kor, split: train, text_column: body, type: pretrain}
max_steps: 1000
sequence_len: 512
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 5e-4
embedding_lr: 1e-5
warmup_steps: 20
gradient_checkpointing: true
fsdp: [full_shard, auto_wrap]
fsdp_config: {fsdp_offload_params: true}
wandb_project: secret-project
output_dir: ./out
wandb_entity:
strict: false
"""


def translated(tmp_path: Path, tool: str, text: str, **changes: object) -> tuple[Translation, RunConfig]:
    """The translation of a file, and the configuration that ELO reads from the YAML it writes."""
    given = {key: value for key, value in (yaml.safe_load(text) | changes).items() if value != "absent"}
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(given))
    made = translate(tool, path)
    (tmp_path / "ours.yaml").write_text(render(made))
    return made, load_config(tmp_path / "ours.yaml")


def lost(made: Translation) -> dict[str, str]:
    return dict(made.lost)


def test_llamafactory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    about = {
        "news": {"file_name": "news.jsonl", "columns": {"prompt": "text"}},
        "wiki": {"hf_hub_url": "owner/wiki", "subset": "ko", "columns": {"prompt": "body"}},
    }
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(about))
    made, config = translated(tmp_path, "llamafactory", FACTORY)
    assert (config.model, config.output, config.seed) == ("Qwen/Qwen3-0.6B-Base", "saves/news", 7)
    news, wiki = config.data.corpora["target"]
    assert Path(news.path) == tmp_path / "data/news.jsonl" and news.text_column == "text"
    assert (wiki.path, wiki.text_column) == ("hf://owner/wiki:ko:train", "body")
    assert (config.data.sequence_length, config.data.packing, config.data.heldout_share) == (1024, True, 0.01)
    method = config.method.model_dump()
    assert (method["name"], method["rank"], method["alpha"], method["dropout"]) == ("lora", 16, 32, 0.05)
    settings = config.training
    assert settings.tokens_per_step == 1024 * 2 * 8
    assert config.tokens == 100 * settings.tokens_per_step
    assert (settings.learning_rate, settings.warmup_steps, settings.adam_beta2) == (2e-4, 0.1, 0.999)
    assert (settings.bf16, settings.activation_checkpointing) == (True, True)
    assert (settings.attn_implementation, settings.report_to) == ("sdpa", "none")
    assert settings.training_arguments["deepspeed"] == "ds_z2.json"
    assert not made.lost
    assert "do_train" in made.unneeded


def test_axolotl(tmp_path: Path) -> None:
    made, config = translated(tmp_path, "axolotl", AXOLOTL)
    (corpus,) = config.data.corpora["target"]
    assert (corpus.path, corpus.text_column) == ("hf://owner/news:kor:train", "body")
    assert config.method.name == "full"
    settings = config.training
    assert settings.tokens_per_step == 512 * 4 * 2
    assert config.tokens == 1000 * settings.tokens_per_step
    assert (settings.learning_rate, settings.embedding_learning_rate, settings.warmup_steps) == (5e-4, 1e-5, 20)
    assert (settings.optim, settings.bf16) == ("adamw_bnb_8bit", "auto")
    assert (settings.lr_scheduler_type, settings.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert settings.training_arguments["fsdp"] is True
    assert settings.report_to == ["wandb"]
    assert set(lost(made)) == {"fsdp_config", "wandb_project"}
    assert "secret-project" not in render(made)


@pytest.mark.parametrize(("number", "layers"), [(3, "last:3"), (-2, "first:2")])
def test_freeze_settings_become_layers(tmp_path: Path, number: int, layers: str) -> None:
    made, config = translated(
        tmp_path,
        "llamafactory",
        FACTORY,
        finetuning_type="freeze",
        freeze_trainable_layers=number,
        freeze_extra_modules="lm_head,model.embed_tokens,visual",
        freeze_trainable_modules="mlp",
    )
    assert config.layers == layers
    assert config.method.model_dump()["also_train"] == ("embedding", "head")
    assert "visual" in lost(made)["freeze_extra_modules"] and "mlp" in lost(made)["freeze_trainable_modules"]


def test_unfrozen_parameters_become_layers(tmp_path: Path) -> None:
    patterns = [r"^lm_head.weight$", r"^model.layers.(2|11)\.", r"model.layers.5.mlp"]
    made, config = translated(tmp_path, "axolotl", AXOLOTL, unfrozen_parameters=patterns)
    assert config.method.name == "frozen" and config.method.model_dump()["also_train"] == ("head",)
    assert config.layers == "2,11"
    assert "layers of which parts train" in lost(made)["unfrozen_parameters"]


def test_lisa(tmp_path: Path) -> None:
    _, config = translated(tmp_path, "axolotl", AXOLOTL, lisa_n_layers=3, lisa_step_interval=20)
    method = config.method.model_dump()
    assert (method["name"], method["layers"], method["period"]) == ("lisa", 3, 20)


def test_what_a_file_leaves_out_is_the_other_tools_default(tmp_path: Path) -> None:
    few = "model_name_or_path: m\nstage: pt\ndataset: news\n"
    made, config = translated(tmp_path, "llamafactory", few)
    assert config.method.model_dump()["rank"] == 8
    assert config.training.tokens_per_step == 2048 * 8
    assert (config.training.learning_rate, config.training.lr_scheduler_type) == (5e-5, "linear")
    assert "one pass" in lost(made)["num_train_epochs"]
    assert any("news" in line for line in made.todo)
    _, config = translated(tmp_path, "axolotl", "base_model: m\nlearning_rate: 1e-5\n")
    assert config.data.corpora["target"][0].path == "TARGET_TEXT.jsonl"
    assert (config.data.sequence_length, config.training.tokens_per_step) == (512, 512)


def test_warmup_steps_win_over_warmup_ratio_as_in_transformers(tmp_path: Path) -> None:
    _, config = translated(tmp_path, "llamafactory", FACTORY, warmup_steps=50)
    assert config.training.warmup_steps == 50
    _, config = translated(tmp_path, "llamafactory", FACTORY, warmup_steps=0)
    assert config.training.warmup_steps == 0.1


def test_lora_without_a_rank_has_the_default_of_elo(tmp_path: Path) -> None:
    made, config = translated(tmp_path, "axolotl", AXOLOTL, adapter="lora")
    assert config.method.model_dump()["rank"] == type(config.method)().model_dump()["rank"]
    assert "method.rank" not in made.comments


def test_text_for_pretraining_needs_no_type(tmp_path: Path) -> None:
    made, config = translated(tmp_path, "axolotl", AXOLOTL, pretraining_dataset=[{"path": "owner/news"}])
    assert [corpus.path for corpus in config.data.corpora["target"]] == ["hf://owner/news"]
    assert "datasets" not in lost(made)


def test_comments_name_a_default_as_a_default(tmp_path: Path) -> None:
    made, config = translated(
        tmp_path, "llamafactory", FACTORY, finetuning_type="freeze", output_dir="absent", freeze_extra_modules="norm"
    )
    assert (config.layers, config.output) == ("last:2", "runs/translated")
    assert made.comments["layers"] == "default of LLaMA-Factory"
    assert made.comments["output"] == "output_dir is missing"


def test_what_cannot_be_translated_is_listed_with_the_reason(tmp_path: Path) -> None:
    made, _ = translated(
        tmp_path,
        "axolotl",
        AXOLOTL,
        adapter="qlora",
        lora_r=8,
        lora_alpha=16,
        lora_target_modules=["q_proj"],
        peft_use_dora=True,
        load_in_4bit=True,
        pretraining_dataset="absent",
        datasets=[{"path": "owner/chat", "type": "alpaca"}, {"path": "text.json", "type": "completion"}],
        test_datasets=[{"path": "held.json", "type": "completion"}, {"path": "more.json", "type": "completion"}],
        max_steps="absent",
        num_epochs=2,
        optimizer="muon",
        wandb_project="absent",
        saves_per_epoch=4,
        some_new_key=1,
    )
    found = lost(made)
    assert "q_proj" in found["lora_target_modules"] and "alpaca" in found["datasets"]
    assert found["test_datasets"].startswith("more.json: ")
    assert {"adapter", "load_in_4bit", "peft_use_dora", "optimizer", "saves_per_epoch", "num_epochs"} <= set(found)
    assert found["some_new_key"] == "no counterpart in ELO"
    assert any("text.json: if it is one JSON array" in line for line in made.todo)
    text = render(made)
    assert all(f"# - {name}: " in text for name in found)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("tool", "text", "said"),
    [
        ("trl", FACTORY, "--from trl: unknown tool; write one of llamafactory, axolotl"),
        ("axolotl", FACTORY, "has no 'base_model', so it is not a training configuration of Axolotl"),
        ("llamafactory", FACTORY.replace("stage: pt", "stage: dpo"), "stage 'dpo' does not train on text"),
        ("llamafactory", FACTORY.replace("type: lora", "type: oft"), "finetuning_type: 'oft' has no counterpart"),
        ("llamafactory", FACTORY.replace("2e-4", "20"), "training.learning_rate: input should be less than"),
        ("llamafactory", "- a list", "write a mapping of keys"),
    ],
)
def test_bad_files(tmp_path: Path, tool: str, text: str, said: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(EloError, match=said):
        translate(tool, path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    path.write_text(AXOLOTL)
    main(["config", "--from", "axolotl", str(path), "--output", str(output)])
    assert load_config(output).method.name == "full"
    assert output.read_text().startswith("# Translated from theirs.yaml (Axolotl).")
    with pytest.raises(SystemExit):
        main(["config", "--from", "axolotl", str(path), "--schema"])
    assert "exclude each other" in capsys.readouterr().err
