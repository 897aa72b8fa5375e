"""`elo compare`: every contestant tuned and trained within its budget, each trial once, the truth in the report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from elo.recipes import trial as trial_module
from run_fixtures import write_world

from elo.compare import compare
from elo.config import contestant_run, load_comparison
from elo.data.shards import PreparedData
from elo.errors import EloError, TrainingDivergedError
from elo.recipes import trial as trial_module
from elo.compare import compare
from elo.report.files import read_results
from elo.trial import TEST, VALIDATION

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _world(root):
    run = write_world(root)
    for key in ("output", "tokens"):
        run.pop(key)
    quick = {**run["full"], "evaluations": 0}
    run |= {"lora": {**quick, "rank": 2}, "lisa": {**quick, "layers": 1, "period": 2}}
    run["data"]["heldout_share"] = 0.2
    return {
        "run": run,
        "output": str(root / "comparison"),
        "contestants": {
            "elo": {"changes": {"elo.stand_in": "forward_only"}},
            "bridge": {"method": "elo", "changes": {"elo.stand_in": "bridge"}},
            "full": {"learning_rates": [1e-3, 3e-3]},
        },
        "budgets": [{"tokens": 1280}],
        "seeds": [1, 2],
        "learning_rates": [1e-3],
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("comparison")
    config = _world(root)
    return root, config, compare(config)


def reported(results, contestant):
    return [trial for trial in results["trials"] if trial["contestant"] == contestant and not trial["tuning"]]


def test_every_contestant_has_every_seed_and_the_rates_that_did_best(finished):
    root, config, results = finished
    assert json.loads((root / "comparison" / "results.json").read_text()) == json.loads(json.dumps(results))
    known = read_results(results)
    assert [each.name for each in known.contestants] == list(config["contestants"])
    for name in config["contestants"]:
        trials = reported(results, name)
        assert [trial["seed"] for trial in trials] == [1, 2]
        assert all(set(trial["measured"]["bpb"]) == {"xx", "en"} for trial in trials)
        assert trials[0]["learning_rates"] == trials[1]["learning_rates"]
        tuning = [trial for trial in results["trials"] if trial["contestant"] == name and trial["tuning"]]
        if name != "full":
            assert not tuning
            assert set(trials[0]["learning_rates"].values()) == {1e-3}, "one rate is no sweep"
            continue
        best = trials[0]["validation"]["bpb"]["xx"]
        assert all(trial["learning_rates"] != trials[0]["learning_rates"] for trial in tuning)
        assert all(best <= trial["validation"]["bpb"]["xx"] for trial in tuning)


def test_rates_beyond_the_grid_are_tried_where_its_edge_is_best(finished):
    _, _, results = finished
    trials = [trial for trial in results["trials"] if trial["contestant"] == "full"]
    rates = sorted({trial["learning_rates"]["full"] for trial in trials})
    # At this size the highest rate is best by far: 3e-3, 9e-3, and 2.7e-2 if that is better still.
    assert len(rates) >= 3
    assert rates[2] == pytest.approx(9e-3)
    assert reported(results, "full")[0]["learning_rates"]["full"] >= 3e-3


def test_what_a_trial_cost_is_recorded(finished):
    _, config, results = finished
    trials = {name: read_results(results).finished(name, "1,280 tokens")[0] for name in config["contestants"]}
    assert all(trial.tokens == 1280 for trial in trials.values())
    assert trials["bridge"].flops < trials["elo"].flops < trials["full"].flops
    assert trials["bridge"].attach_scale > 0 and trials["elo"].attach_scale is None
    assert trials["bridge"].before_alignment.bpb.keys() == {"xx", "en"}


def test_no_model_is_kept_and_the_report_is_there(finished):
    root, _, _ = finished
    folder = root / "comparison"
    assert not list((folder / "trials").iterdir())
    assert not list(folder.rglob("*.safetensors"))
    assert "bits per byte" in (folder / "report.md").read_text()


def test_rates_are_chosen_on_training_text_and_reported_values_are_of_all_held_out_text(finished):
    root, _, results = finished
    prepared = PreparedData.open(root / "comparison" / "prepared")
    for language in ("xx", "en"):
        heldout, validation = prepared.heldout(language), prepared.validation(language)
        texts = [{each.document_text(i) for i in range(each.num_documents)} for each in (heldout, validation)]
        assert not texts[0] & texts[1]
        size = {"documents": heldout.num_documents, "tokens": heldout.num_text_tokens, "bytes": heldout.num_bytes}
        for measured in (results["base"], *(trial for entry in results["entries"] for trial in entry["trials"])):
            assert measured["heldout"][language] == size
            assert measured["documents_bytes"][language] == heldout.document_sizes.tolist()
            nats = sum(measured["documents_nats"][language])
            assert nats / math.log(2) / size["bytes"] == pytest.approx(measured["bpb"][language], rel=1e-12)
    record = json.loads((root / "comparison" / "stages" / "evaluate-base-validation.json").read_text())["record"]
    assert record["heldout"]["xx"]["documents"] == prepared.validation("xx").num_documents >= 1
    assert any("below 30" in line for line in results["warnings"])


def test_missing_validation_text_is_noticed_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module.Trials, "run", lambda *_, **__: pytest.fail("trained"))
    config = _world(tmp_path)
    config["run"]["data"]["validation_share"] = 0
    with pytest.raises(EloError, match=r"no validation text for 'xx'.*validation_share"):
        compare(config)
    # A source language without replay has held-out text alone: fine, unless it counts when rates are chosen.
    data = config["run"]["data"]
    data |= {"replay_ratio": 0, "validation_share": 0.005, "heldout": {"en": data["corpora"].pop("en")}}
    with pytest.raises(EloError, match=r"source_weight: 1 counts 'en' when rates are chosen, but it has no validation"):
        compare({**config, "source_weight": 1, "output": str(tmp_path / "weighed")})
    monkeypatch.setattr(trial_module.Trials, "run", lambda *_, **__: pytest.skip("trains"))
    with pytest.raises(pytest.skip.Exception):
        compare({**config, "output": str(tmp_path / "plain")})


def test_a_second_call_trains_nothing(finished, monkeypatch):
    _, config, results = finished
    monkeypatch.setattr(trial_module.Trials, "_train", lambda *_: pytest.fail("trained again"))
    again = compare(config)
    assert again["trials"] == results["trials"]


def test_what_is_added_is_all_that_is_done(finished, monkeypatch):
    _, config, results = finished
    trained = []
    original = trial_module.Trials._train

    def train(self, run, folder, name, validated):
        trained.append(name)
        return original(self, run, folder, name, validated)

    monkeypatch.setattr(trial_module.Trials, "_train", train)
    more = {**config, "contestants": {**config["contestants"], "lisa": {"learning_rates": [1e-3]}}}
    grown = compare(more)
    assert trained == ["lisa", "lisa"]
    assert grown["trials"][:-2] == results["trials"]


def test_a_wall_time_budget_becomes_tokens_by_measured_speed(tmp_path, monkeypatch):
    """With a clock that gives full CPT 100 tokens a second and a fixed 2 s, 100 s are 9,800 tokens, in whole steps."""
    config = _world(tmp_path)
    config |= {"contestants": ["full"], "budgets": [{"seconds": 100.0}], "learning_rates": [1e-3], "seeds": [1]}
    trained = []

    def train(self, run, folder, name, validated):
        trained.append(run.tokens)
        seconds = run.tokens / 100
        stages = [
            {"name": "surgery", "seconds": 2.0, "tokens": 0},
            {"name": "full", "seconds": seconds, "tokens": run.tokens},
        ]
        measured = {"bpb": {"xx": 1.0, "en": 1.0}}
        return {
            "contestant": name, "budget": "", "seed": run.seed, "failed": None, "measured": measured,
            "validation": measured, "stages": stages,
        }  # fmt: skip

    monkeypatch.setattr(trial_module.Trials, "_train", train)
    results = compare(config)
    step = config["run"]["full"]["tokens_per_step"]
    assert trained[0] == 6 * step, "the first look"
    assert trained[1] == 1300 // step * step, "the second: 15 % of the budget, less the fixed costs"
    assert trained[2:] == [9800 // step * step], "which serves for the seed too"
    (trial,) = read_results(results).trials
    assert trial.seconds == pytest.approx(100, rel=0.01)


def test_a_diverged_trial_is_a_result(tmp_path, monkeypatch):
    config = _world(tmp_path)
    config |= {"contestants": ["full"], "seeds": [1], "learning_rates": [1e-3, 2e-3]}
    import elo.run

    original = elo.run.adapt

    def adapt(job, *args, **kwargs):
        if job.config.full.learning_rate > 1.5e-3:
            raise TrainingDivergedError("training diverged at step 3")
        return original(job, *args, **kwargs)

    monkeypatch.setattr(elo.run, "adapt", adapt)
    results = compare(config)
    assert reported(results, "full")[0]["learning_rates"]["full"] <= 1e-3
    failed = [trial for trial in results["trials"] if trial["failed"]]
    assert [trial["learning_rates"] for trial in failed] == [{"full": 2e-3}]
    assert ": failed" in (tmp_path / "comparison" / "report.md").read_text()


@pytest.mark.slow
def test_killed_and_started_again_ends_the_same(finished, tmp_path):
    _, _, results = finished
    config = _world(tmp_path)
    config["contestants"] = {"full": config["contestants"]["full"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "elo.cli", "compare", str(tmp_path / "c.yaml")]
    for seconds in (8, 12):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = compare(config)
    ours, theirs = ([trial["measured"]["bpb"] for trial in reported(each, "full")] for each in (again, results))
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contestants": {"mine": {}}}, "contestants.mine: is not a method; write method: one of elo, elo_paper"),
        ({"contestants": {"elo": {"changes": {"layres": 1}}}}, "unknown key 'layres'; did you mean 'layers'"),
        (
            {"contestants": {"elo": {"changes": {"data.replay_ratio": 0.5}}, "full": {}}},
            "data must be the same for all",
        ),
        ({"contestants": {"elo": {"learning_rates": {"full": [1e-3]}}}}, "does not train with section 'full'"),
        ({"contestants": {"elo": {"label": 3}}}, "contestants.elo.label"),
        ({"contestants": {}}, "contestants"),
        ({"contestants": {"../elo": {"method": "elo"}}}, "may hold letters"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [{"tokens": 10, "seconds": 1}]}, "write one of the two"),
        ({"budgets": [{"hours": 1}]}, "unknown key 'budgets.0.hours'"),
        ({"budgets": [{"tokens": 64}]}, "tokens: the budget"),
        ({"seeds": [1, 1]}, "holds one twice"),
        ({"learning_rates": [0]}, "learning_rates.0"),
        ({"contestant": {}}, "did you mean 'contestants'"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
    ],
)
def test_mistakes_are_told_before_anything_trains(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(trial_module.Trials, "run", lambda *_, **__: pytest.fail("trained"))
    if message.startswith("tokens"):
        monkeypatch.undo()
    with pytest.raises(EloError) as caught:
        compare({**_world(tmp_path), **change})
    assert message in str(caught.value)


def test_a_contestants_run_is_the_shared_one_with_its_changes(tmp_path):
    config = load_comparison(_world(tmp_path))
    run = contestant_run(config, "bridge", tmp_path, learning_rates={"layer_alignment": 0.5}, tokens=99, seed=7)
    assert (run.method, run.elo.stand_in, run.tokens, run.seed) == ("elo", "bridge", 99, 7)
    assert run.layer_alignment.learning_rate == 0.5
    assert run.elo_pretraining.learning_rate == 1e-3


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("compare_*.yaml")), ids=lambda file: file.stem)
def test_the_benchmarks_configurations_are_understood(file):
    assert load_comparison(file).contestants
