"""A token budget is divided in whole updates of the phases."""

import re

import pytest
from run_fixtures import write_documents, write_world

from elo.budget import divide_budget
from elo.config import load_config
from elo.errors import EloError
from elo.run import open_run, prepare_data

LINES = []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("budget"))


def _divided(world, *overrides):
    config = load_config(world, list(overrides))
    LINES.clear()
    with open_run(config) as inputs:
        sequences = divide_budget(config, prepare_data(inputs), LINES.append)
        return [(phase.name, (rows := sequences.of(phase)).start, rows.stop) for phase in config.method.phases]


def test_pretraining_and_alignment_follow_each_other(world):
    assert _divided(world) == [("elo_pretraining", 0, 32), ("layer_alignment", 32, 40)]
    assert _divided(world, "method=elo_paper") == [("elo_pretraining", 0, 36), ("layer_alignment", 36, 40)]
    assert _divided(world, "method={name: embeddings_first, full_share: 0.5}") == [
        ("embeddings", 0, 20),
        ("full", 20, 40),
    ]


@pytest.mark.parametrize("method", ["full", "lora", "lisa", "frozen", "{name: elo, alignment: none}"])
def test_one_phase_has_all(world, method):
    assert [(start, stop) for _, start, stop in _divided(world, f"method={method}")] == [(0, 40)]


def test_alignment_alone_trains_on_the_text_that_elos_alignment_would_get(world):
    assert _divided(world, "method={name: align_only, share: 0.2}") == [("layer_alignment", 32, 40)]


def test_each_phase_counts_in_its_own_updates(world):
    changes = "training.phases.layer_alignment.tokens_per_step=192"
    assert _divided(world, changes) == [("elo_pretraining", 0, 34), ("layer_alignment", 34, 40)]


@pytest.mark.parametrize(
    ("method", "phase", "message"),
    [
        ("full", "full", r"1,280 tokens is less than one update of each phase, which takes 4,096 \(all\)"),
        ("elo", "layer_alignment", r"64 \(pretraining\) and 4,096 \(alignment\)"),
        ("elo", "elo_pretraining", r"4,096 \(pretraining\) and 64 \(alignment\)"),
        ("align_only", "layer_alignment", r"4,096 \(alignment\)"),
    ],
)
def test_less_than_one_update_is_refused(world, method, phase, message):
    with pytest.raises(EloError, match=message):
        _divided(world, f"method={method}", f"training.phases.{phase}.tokens_per_step=4096")


def test_text_that_is_passed_over_more_than_once_is_noted(world):
    _divided(world, "tokens=64000")
    assert any("passes over the 'xx' text" in line for line in LINES)
    assert all("passes beyond 4 lose value" in line for line in LINES)
    _divided(world, "tokens=640")
    assert not LINES


def test_passes_over_each_corpus_are_noted(tmp_path):
    world = write_world(tmp_path)
    text = world["data"]["corpora"]["xx"]
    few = write_documents(tmp_path / "few.jsonl", ["가나", "바사"], 20, 9)
    world["data"]["corpora"]["xx"] = [text, {"path": str(few), "weight": 8}]
    _divided(world, "tokens=4800")
    (line,) = (line for line in LINES if "'xx'" in line)
    mean, *by_corpus = map(float, re.findall(r"\d+\.\d", line))
    assert by_corpus[0] < mean < 1 < by_corpus[1]
    assert "few " in line and "beyond 4" not in line


def test_a_scale_is_searched_on_sequences_that_nothing_trains_on(world):
    config = load_config(world, ["method=full"])
    with open_run(config) as inputs:
        sequences = divide_budget(config, prepare_data(inputs), print)
    assert sequences.unseen_identity()["rows"] == [40, 64]
    unseen = sequences.unseen()
    assert set(unseen) == {"xx", "en"}
    trained = {sequences.mixture.sequence(index)["input_ids"].tobytes() for index in range(40)}
    assert not [row for rows in unseen.values() for row in rows[:2] if row["input_ids"].tobytes() in trained]
