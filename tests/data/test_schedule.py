"""Parts of a training with different shares: exact, at random access, each corpus read on where it was left."""

import numpy as np
import pytest
from data_fixtures import make_corpus
from run_fixtures import write_documents, write_world

from elo.budget import divide_budget
from elo.compare import compare
from elo.config import load_config
from elo.data.mixture import Mixture, Schedule, build_mixture
from elo.data.packing import PackedStream
from elo.data.shards import PreparedData
from elo.errors import EloError
from elo.run import run

T = 8


def _stream(name):
    return PackedStream(make_corpus([[20] * 200], name), T, 0)


def _schedule(total=1000):
    streams = {name: _stream(name) for name in ("ko", "en", "web")}
    first = Mixture([("ko", 0.3, streams["ko"]), ("ko", 0.2, streams["web"]), ("en", 0.5, streams["en"])], 3)
    second = Mixture([("en", 0.1, streams["en"]), ("ko", 0.9, streams["ko"])], 3)
    return Schedule([(1, first), (3, second)], total)


def test_each_part_keeps_its_shares_and_corpora_are_read_on():
    schedule = _schedule()
    assert [(each.language, each.stream.corpus.name) for each in schedule.sources] == [
        ("ko", "ko"),
        ("ko", "web"),
        ("en", "en"),
    ]
    assert [each.share for each in schedule.sources] == pytest.approx([0.75, 0.05, 0.2])
    found = [schedule.find(index) for index in range(1500)]
    for source in range(3):
        rows = [inside for which, inside in found if which == source]
        assert rows == list(range(len(rows))), "each corpus is read from its start without a gap"
    which = np.array([which for which, _ in found])
    assert abs((which[:250] == 2).sum() - 125) < 1.001
    assert abs((which[250:1000] == 2).sum() - 75) < 1.001
    assert not (which[250:1000] == 1).any()
    assert abs((which[1000:] == 2).sum() - 100) < 2, "after the end, the shares are the means"
    assert abs((which[1000:] == 1).sum() - 25) < 2


def test_any_window_can_be_entered_anywhere_and_the_identity_holds_the_boundaries():
    rows = _schedule().sequences(240, 260)
    again = _schedule().sequences(255, 260)
    for index in range(5):
        assert (rows[15 + index]["input_ids"] == again[index]["input_ids"]).all()
    assert (
        rows.identity() == _schedule().sequences(240, 260).identity() != _schedule(1004).sequences(240, 260).identity()
    )


def test_unseen_text_has_the_languages_of_every_part():
    first = Mixture([("ko", 0.5, _stream("ko")), ("en", 0.5, _stream("en"))])
    schedule = Schedule([(1, first), (1, Mixture([("ko", 1.0, _stream("ko"))]))], 40)
    found = schedule.sequences_by_language(40, 2)
    assert {language: len(rows) for language, rows in found.items()} == {"en": 2, "ko": 2}
    (en,) = [index for index, source in enumerate(schedule.sources) if source.language == "en"]
    assert (found["en"][0]["input_ids"] == schedule.sources[en].stream.sequence(10).input_ids).all(), (
        "10 are trained on"
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A configuration with two target corpora and its finished run."""
    root = tmp_path_factory.mktemp("schedule")
    config = write_world(root)
    config["data"]["corpora"]["xx"] = [
        config["data"]["corpora"]["xx"],
        str(write_documents(root / "more.jsonl", ["가나", "바사"], 60, 9)),
    ]
    config["data"]["schedule"] = [
        {"share": 1, "replay_ratio": 0.5, "weights": {"xx": [1, 1]}},
        {"share": 1, "replay_ratio": 0.1, "weights": {"xx": [1, 0]}},
    ]
    config["tokens"] = 2560
    return config, run(config)


def test_a_run_trains_in_parts_and_reports_mean_shares(world):
    config, results = world
    assert results["data"]["replay_ratio"] == pytest.approx(0.3)
    assert results["data"]["shares"] == pytest.approx({"xx": 0.7, "en": 0.3})
    data = PreparedData.open(f"{config['output']}/prepared")
    sequences = divide_budget(load_config(config), data, lambda line: None)
    total = sequences.pretraining + sequences.alignment
    rows = sequences.mixture.sequences(0, total)
    languages = [rows.language(index) for index in range(total)]
    assert total == 80 and languages[:40].count("en") == pytest.approx(20, abs=1)
    assert languages[40:].count("en") == pytest.approx(4, abs=1)
    corpora = [sequences.mixture.sources[sequences.mixture.find(index)[0]].stream.corpus.name for index in range(total)]
    assert "more" in corpora[:40] and "more" not in corpora[40:]


def test_without_a_schedule_the_order_is_that_of_one_mixture(world):
    config, _ = world
    data = PreparedData.open(f"{config['output']}/prepared")
    plain = load_config({**config, "data": {**config["data"], "schedule": []}})
    sequences = divide_budget(plain, data, lambda line: None)
    weights = {"xx": {"xx": 1.0, "more": 1.0}, "en": {"en": 1.0}}
    mixture = build_mixture(data, "xx", "en", 0.1, 32, plain.seed, weights=weights)
    assert sequences.mixture.origin == mixture.origin
    for index in range(80):
        assert (sequences.mixture.sequence(index)["input_ids"] == mixture.sequence(index)["input_ids"]).all()
    one = divide_budget(
        load_config({**config, "data": {**config["data"], "schedule": [{"share": 2}]}}), data, lambda line: None
    )
    assert all((one.mixture.sequence(i)["input_ids"] == mixture.sequence(i)["input_ids"]).all() for i in range(80))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"share": 0}, r"schedule\.0\.share"),
        ({"share": 1, "target": "en"}, r"schedule\.0\.target: 'en' is not in data\.target; choose among xx"),
        ({"share": 1, "weights": {"xx": [1]}}, r"schedule\.0\.weights\.xx: got 1 weights for 2 corpora"),
        ({"share": 1, "weights": {"xx": [0, 0]}}, r"schedule\.0\.weights\.xx: leaves out every corpus"),
        ({"share": 1, "replay": 0.5}, r"unknown key 'data\.schedule\.0\.replay'"),
    ],
)
def test_mistakes_are_named(world, part, message):
    config, _ = world
    with pytest.raises(EloError, match=message):
        load_config({**config, "data": {**config["data"], "schedule": [part]}})


def test_contestants_may_differ_in_the_schedule_alone(world, tmp_path):
    config, _ = world
    shared = {key: value for key, value in config.items() if key not in ("output", "tokens", "method")}
    shared["data"] = {**config["data"], "schedule": []}
    comparison = {
        "run": shared,
        "output": str(tmp_path / "comparison"),
        "contestants": {
            "one": {"method": "full"},
            "two": {"method": "full", "changes": {"data.schedule": config["data"]["schedule"]}},
        },
        "budgets": [{"tokens": 1280}],
        "seeds": [1],
        "learning_rates": [1e-3],
    }
    results = compare(comparison)
    one, two = (trial["measured"]["bpb"] for trial in results["trials"])
    assert one != two
    assert "shares" not in results["data"] or not results["data"]["shares"]
    comparison["contestants"]["two"]["changes"]["data.replay_ratio"] = 0.5
    with pytest.raises(EloError, match=r"contestants\.two\.changes: data differs"):
        compare(comparison)
