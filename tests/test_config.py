"""Configuration: a typo fails and is answered with the right key; overrides; what other tools call things."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from elo.config import RunConfig, _section_of, load_config
from elo.errors import EloError

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
    assert config.layer_alignment.share == 0.1
    assert config.seed == 42


def test_round_trip():
    config = load_config(_with("elo_pretraining.learning_rate", 3e-4))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_overrides_are_yaml():
    config = load_config(GOOD, ["elo_pretraining.learning_rate=2e-4", "controls=[full]", "tokens=1_000", "layers=0,-1"])
    assert config.elo_pretraining.learning_rate == 2e-4
    assert config.controls == ("full",)
    assert config.tokens == 1000
    assert load_config(GOOD, ["tokens=1e7"]).tokens == 10_000_000
    assert config.layers == "0,-1"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modle", "x", "unknown key 'modle'; did you mean 'model'?"),
        (
            "elo_pretraining.learning_rte",
            1,
            "unknown key 'elo_pretraining.learning_rte'; did you mean 'learning_rate'?",
        ),
        ("data.cutoff_len", 1, "did you mean 'data.sequence_length'?"),
        ("sequence_len", 1, "did you mean 'data.sequence_length'?"),
        ("base_model", "x", "did you mean 'model'?"),
        ("full.gradient_accumulation_steps", 4, "did you mean 'tokens_per_step'?"),
        ("full.lr", 4, "did you mean 'learning_rate'?"),
        ("layer_alignment.gradient_checkpointing", True, "did you mean 'activation_checkpointing'?"),
        ("data.corpora.ko", [{"path": "a", "text_field": "b"}], "did you mean 'text_column'?"),
        ("evaluation.zzz", 1, "known keys here: cloze"),
        ("model", None, "missing key 'model'"),
        ("data.target", None, "missing key 'data.target'"),
        ("data.target", "jp", "target: 'jp' has no corpus; corpora holds "),
        ("data.source", "ko", "must be two languages"),
        ("data.heldout", {"jp": "a"}, "'jp' is neither the target"),
        ("data.replay_ratio", 1.5, "data.replay_ratio: input should be less than 1, got 1.5"),
        ("data.sequence_length", 2, "greater than or equal to 8, got 2"),
        ("data.on_error", "ignore", "'stop' or 'skip', got 'ignore'"),
        ("elo_pretraining.learning_rate", -1, "greater than 0, got -1"),
        ("elo_pretraining.learning_rate", "fast", "elo_pretraining.learning_rate: input should be a valid number"),
        ("elo_pretraining.optim", "sgd", "got 'sgd'"),
        ("elo.also_train", ["middle"], "got 'middle'"),
        ("elo.stand_in", "bridges", "got 'bridges'"),
        ("elo.scale", 3, "at most 2"),
        ("lora.rank", 0, "greater than 0, got 0"),
        ("elo_pretraining.also_train", ["head"], "did you mean 'elo.also_train'"),
        ("layer_alignment.share", 1, "less than 1, got 1"),
        ("method", "eol", "got 'eol'"),
        ("full.loss_spike", float("inf"), "finite number"),
        ("data.target", False, "quote it"),
        ("output", "", "at least 1 character"),
        ("tokens", True, "not true or false"),
        ("tokens", 10**30, "less than or equal to"),
        ("tokens", 0, "greater than 0, got 0"),
        ("tokens", 1.5, "tokens: input should be a valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("controls", ["full_at_wall_time"], "a method other than full, and full among the controls"),
        ("controls", "full", "controls: input should be a valid tuple"),
        ("data.corpora", {"ko": "a", "e/n": "b"}, "may hold letters, digits, - and _ alone"),
        ("data.corpora.ko", [{"path": "a", "weight": 0}], "greater than 0, got 0"),
        ("data", [], "data: "),
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
        ("- a\n- b", "holds list, not a mapping"),
        ("a: 1\nb: 2\na: 3", "key 'a' stands twice"),
        ("a: &a\n  b: *a\n", "refers to itself"),
        ("", "holds NoneType"),
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


def test_every_setting_reaches_the_documentation():
    documented = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()

    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert f"`{name}`" in documented, f"{section.__name__}.{name} is not in docs/configuration.md"
            inner = _section_of(field.annotation)
            if inner is not None:
                walk(inner)

    walk(RunConfig)
