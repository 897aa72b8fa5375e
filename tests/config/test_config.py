"""Configuration: a typo fails and is answered with the right key; overrides; what other tools call things."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from elo.config import RunConfig, contestant_run, load_comparison, load_config
from elo.config.document import commented_yaml, json_schema, markdown
from elo.config.load import _section_of
from elo.errors import EloError
from elo.methods import METHODS
from elo.train.settings import TrainingSettings

ROOT = Path(__file__).parents[2]
GOOD = {
    "model": "m",
    "output": "o",
    "data": {"target": "ko", "source": "en", "corpora": {"ko": "ko.jsonl", "en": [{"path": "en.jsonl", "weight": 2}]}},
}


def _with(path: str, value: object) -> dict:
    config = yaml.safe_load(yaml.safe_dump(GOOD))
    here = config
    *parents, last = path.split(".")
    for parent in parents:
        here = here.setdefault(parent, {})
    if value is None:
        del here[last]
    else:
        here[last] = value
    return config


def test_defaults_and_shorthand():
    config = load_config(GOOD)
    assert config.data.corpora["ko"][0].path == "ko.jsonl"
    assert config.data.corpora["en"][0].weight == 2
    assert config.data.replay_ratio == 0.1
    assert config.layers == "first:1,last:1"
    assert config.method.name == "lora" and config.method.rank == 32
    assert config.seed == 42


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_name_or_a_section(name):
    bare, section = (load_config(_with("method", value)).method for value in (name, {"name": name}))
    assert bare == section == METHODS[name].model_validate({"name": name})
    assert load_config(_with("method", {"name": name, "scale": 1.0})).method.scale == 1.0


def test_round_trip():
    config = load_config(_with("method", {"name": "lora", "rank": 3}), ["training.phases.lora.learning_rate=3e-4"])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.method.rank == 3


def test_overrides_are_yaml():
    overrides = ["training.learning_rate=2e-4", "method={name: lisa, layers: 2}", "tokens=1_000", "layers=0,-1"]
    config = load_config(GOOD, overrides)
    assert config.training.learning_rate == 2e-4
    assert (config.method.name, config.method.layers) == ("lisa", 2)
    assert config.tokens == 1000
    assert load_config(GOOD, ["tokens=1e7"]).tokens == 10_000_000
    assert config.layers == "0,-1"


def test_settings_of_a_phase():
    """The configuration's for all phases, a phase's own over them, and the method's rate where neither names one."""
    elo = _with("method", "elo")
    config = load_config(
        elo,
        ["training.weight_decay=0.1", "training.phases={layer_alignment: {learning_rate: 1e-5, weight_decay: 0}}"],
    )
    pretraining, alignment = (config.settings(phase) for phase in config.method.phases)
    assert (pretraining.learning_rate, pretraining.weight_decay) == (5e-4, 0.1)
    assert (alignment.learning_rate, alignment.weight_decay) == (1e-5, 0.0)
    assert type(alignment) is TrainingSettings
    shared = load_config(elo, ["training.learning_rate=2e-4"])
    assert {shared.settings(phase).learning_rate for phase in shared.method.phases} == {2e-4}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modle", "x", "unknown key 'modle'; did you mean 'model'?"),
        ("training.learning_rte", 1, "unknown key 'training.learning_rte'; did you mean 'learning_rate'?"),
        ("data.cutoff_len", 1, "did you mean 'data.sequence_length'?"),
        ("sequence_len", 1, "did you mean 'data.sequence_length'?"),
        ("base_model", "x", "did you mean 'model'?"),
        ("training.gradient_accumulation_steps", 4, "did you mean 'training.tokens_per_step'?"),
        ("training.lr", 4, "did you mean 'training.learning_rate'?"),
        ("training.gradient_checkpointing", True, "did you mean 'training.activation_checkpointing'?"),
        ("data.corpora.ko", [{"path": "a", "text_field": "b"}], "did you mean 'text_column'?"),
        ("evaluation.zzz", 1, "known keys here: chat"),
        ("model", None, "missing key 'model'"),
        ("data.target", None, "missing key 'data.target'"),
        ("data.target", "jp", "target: 'jp' has no corpus; corpora has "),
        ("data.source", "ko", "name different languages"),
        ("data.heldout", {"jp": "a"}, "'jp' is neither a target"),
        ("data.replay_ratio", 1.5, "data.replay_ratio: input should be less than 1, got 1.5"),
        ("data.sequence_length", 2, "greater than or equal to 8, got 2"),
        ("data.on_error", "ignore", "'stop' or 'skip', got 'ignore'"),
        ("training.learning_rate", -1, "greater than 0, got -1"),
        ("training.learning_rate", "fast", "training.learning_rate: input should be a valid number"),
        ("training.optim", "sgdd", "training.optim: got 'sgdd'; write one of adafactor"),
        ("training.vocabulary", "some", "'all' or 'corpus', got 'some'"),
        ("training.phases", {"full": {}}, "'full' is not a phase of method lora, which has lora"),
        (
            "training.phases",
            {"layer_alignment": {"lr": 1}},
            "layer_alignment.lr: unknown key; known keys here: ",
        ),
        (
            "training.phases",
            {"layer_alignment": {"optim": "x"}},
            "layer_alignment.optim: got 'x'; write one of ada",
        ),
        ("method", {"name": "elo", "also_train": ["middle"]}, "got 'middle'"),
        ("method", {"name": "elo", "middle": "bridges"}, "got 'bridges'"),
        ("method", {"name": "elo", "scale": 3}, "at most 2"),
        ("method", {"name": "lora", "rank": 0}, "greater than 0, got 0"),
        ("method", {"name": "full", "rank": 2}, "unknown key 'method.full.rank'"),
        ("method", {"rank": 2}, "method: "),
        ("method", {"name": "elo", "share": 1}, "less than 1, got 1"),
        ("method", "eol", "method: there is no method 'eol'; did you mean 'elo'?"),
        ("method", "sft", "choose one of align_only, "),
        ("training.max_loss_spike_nats", float("inf"), "finite number"),
        ("data.target", False, "quote it"),
        ("output", "", "at least 1 character"),
        ("tokens", True, "not true or false"),
        ("tokens", 10**30, "less than or equal to"),
        ("tokens", 0, "greater than 0, got 0"),
        ("tokens", 1.5, "tokens: input should be a valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("data.corpora", {"ko": "a", "e/n": "b"}, "may contain only letters, digits, - and _"),
        ("data.corpora.ko", [{"path": "a", "weight": 0}], "greater than 0, got 0"),
        ("data", [], "data: "),
        # Keys of 0.1 are answered with today's.
        ("elo_pretraining", {"learning_rate": 1e-4}, "unknown key 'elo_pretraining'; did you mean 'training'?"),
        ("layer_alignment", {"share": 0.1}, "did you mean 'training.phases.layer_alignment'?"),
        ("full", {}, "did you mean 'training'?"),
        ("lora", {"rank": 3}, "did you mean 'method'?"),
        ("lisa", {}, "did you mean 'method'?"),
        ("elo", {"stand_in": "bridge"}, "did you mean 'method'?"),
        ("controls", ["full"], "did you mean 'contestants of a comparison (elo compare)'?"),
        ("method", {"name": "elo", "stand_in": "bridge"}, "did you mean 'method.middle'?"),
        ("training.also_train", ["head"], "did you mean 'method.also_train'?"),
        ("training.loss_spike", 1, "did you mean 'max_loss_spike_nats'?"),
        ("evaluation.max_tokens", 1, "did you mean 'evaluation.max_bytes'?"),
    ],
)
def test_refuses(path, value, said):
    with pytest.raises(EloError) as error:
        load_config(_with(path, value))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b", "contains list; write a mapping"),
        ("a: 1\nb: 2\na: 3", "key 'a' appears twice"),
        ("a: &a\n  b: *a\n", "refers to itself"),
        ("", "contains NoneType"),
        ("\x00", "is not YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(EloError, match=r"c\.yaml: ") as error:
        load_config(path)
    assert said in str(error.value)


def test_missing_folder_and_binary(tmp_path):
    with pytest.raises(EloError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(EloError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EloError, match="not UTF-8"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("override", ["tokens", "=1", "model.x=1", "tokens=[", ".=1"])
def test_bad_overrides(override):
    with pytest.raises(EloError):
        load_config(GOOD, [override])


def test_the_documentation_is_that_of_the_models():
    documented = ROOT / "docs" / "configuration.md"
    assert documented.read_text() == markdown(), f"python -m elo.config.document > {documented}"


def test_every_setting_is_documented_and_described():
    documented = markdown()

    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert f"| `{name}` |" in documented, f"{section.__name__}.{name}"
            inner = _section_of(field.annotation)
            if inner is not None and name != "method":
                walk(inner)

    walk(RunConfig)
    for name, method in METHODS.items():
        assert f"### {name}" in documented
        for key in method.model_fields:
            assert key == "name" or f"| `{key}` |" in documented


def test_the_commented_file_is_the_default_configuration():
    config = RunConfig.model_validate(yaml.safe_load(commented_yaml("m")))
    assert config.model == "m"
    assert config.training == RunConfig.model_fields["training"].default
    assert config.method == RunConfig.model_fields["method"].default
    assert set(yaml.safe_load(commented_yaml())) == set(RunConfig.model_fields)


def test_the_schema_is_a_json_schema_of_every_key():
    schema = json.loads(json_schema())
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(METHODS)


def test_a_contestants_run_is_the_shared_one_with_its_changes(tmp_path):
    comparison = {
        "run": {key: value for key, value in GOOD.items() if key != "output"},
        "output": "o",
        "contestants": {"removed": {"method": {"name": "elo", "middle": "removed"}, "changes": {"layers": "0,1"}}},
        "budgets": [{"tokens": 9}],
    }
    config = load_comparison(comparison)
    run = contestant_run(config, "removed", tmp_path, learning_rates={"layer_alignment": 0.5}, tokens=99, seed=7)
    assert (run.method.middle, run.tokens, run.seed, run.layers) == ("removed", 99, 7, "0,1")
    pretraining, alignment = (run.settings(phase).learning_rate for phase in run.method.phases)
    assert (pretraining, alignment) == (5e-4, 0.5)


def test_the_examples_and_benchmark_configurations_are_valid():
    runs = {ROOT / "examples" / "korean_8b.yaml"}
    comparisons = {ROOT / "examples" / "compare.yaml"}
    for path in (ROOT / "benchmarks").glob("*.yaml"):
        (comparisons if "contestants" in yaml.safe_load(path.read_text()) else runs).add(path)
    assert len(runs) > 1 and len(comparisons) > 1
    for path in runs:
        load_config(path)
    for path in comparisons:
        config = load_comparison(path)
        for name in config.contestants:
            contestant_run(config, name, Path("unused"), learning_rates={}, tokens=1, seed=1)


def test_the_example_of_every_key_is_up_to_date():
    example = ROOT / "examples" / "korean_8b.yaml"
    _, *rest = example.read_text().splitlines()  # the first line differs
    _, *expected = commented_yaml("meta-llama/Llama-3.1-8B").splitlines()
    assert rest == expected, f"elo config meta-llama/Llama-3.1-8B, and keep the first line of {example}"
