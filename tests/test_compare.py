"""`elo compare`: every contestant tuned and trained within its budget, each trial once, the truth in the report."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_fixtures import write_world

from elo import compare as compare_module
from elo import run as run_module
from elo.compare import _Comparison, compare
from elo.data.shards import PreparedData
from elo.errors import EloError, TrainingDivergedError
from elo.report.files import read_results
from elo.report.schema import Trial
from elo.train import loop

BUDGET = "1,280 tokens"


def _world(root):
    run = write_world(root)
    for key in ("output", "tokens", "method"):
        run.pop(key)
    run["training"]["evaluations"] = 0
    run["data"]["heldout_share"] = 0.2
    return {
        "run": run,
        "output": str(root / "comparison"),
        "contestants": {
            "frozen": {},
            "bridge": {"method": "elo", "label": "ELO with a bridge"},
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
    assert [each.layers for each in known.contestants] == [(0, 3), (0, 3), ()], "full is asked for no layers"
    assert [each.label for each in known.contestants] == ["Frozen middle", "ELO with a bridge", "Full CPT"]
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
    trials = {name: read_results(results).finished(name, BUDGET)[0] for name in config["contestants"]}
    assert all(trial.tokens == 1280 for trial in trials.values())
    assert trials["bridge"].flops < trials["frozen"].flops < trials["full"].flops
    assert trials["bridge"].attach_scale > 0 and trials["frozen"].attach_scale is None
    assert trials["bridge"].before_alignment.bpb.keys() == {"xx", "en"}


def test_no_model_is_kept_and_the_report_is_there(finished):
    root, _, _ = finished
    folder = root / "comparison"
    assert not [path for path in folder.rglob("trials/*") if path.is_dir()]
    assert len(list((folder / "stages").glob("trials-*.json"))) >= 6
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
        for measured in (results["base"], *(trial["measured"] for trial in results["trials"])):
            assert {key: measured["heldout"][language][key] for key in size} == size
            assert measured["document_bytes"][language] == heldout.document_sizes.tolist()
            nats = sum(measured["document_nats"][language])
            assert nats / math.log(2) / size["bytes"] == pytest.approx(measured["bpb"][language], rel=1e-4)
    base = results["base_validation"]["heldout"]
    assert base["xx"]["documents"] == prepared.validation("xx").num_documents >= 1
    assert any("need at least 30" in line for line in results["verdict"]["warnings"])


def test_missing_validation_text_is_noticed_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(_Comparison, "run", lambda self: pytest.fail("trained"))
    config = _world(tmp_path)
    config["run"]["data"]["validation_share"] = 0
    with pytest.raises(EloError, match=r"validation_share"):
        compare(config)
    # A source language without replay has held-out text alone, which is fine.
    data = config["run"]["data"]
    data |= {"replay_ratio": 0, "validation_share": 0.005, "heldout": {"en": data["corpora"].pop("en")}}
    monkeypatch.setattr(_Comparison, "run", lambda self: pytest.skip("trains"))
    with pytest.raises(pytest.skip.Exception):
        compare({**config, "output": str(tmp_path / "plain")})


def test_a_second_call_trains_nothing(finished, monkeypatch):
    _, config, results = finished
    monkeypatch.setattr(_Comparison, "_run_trial", lambda *_: pytest.fail("trained again"))
    again = compare(config)
    assert again["trials"] == results["trials"]


def test_what_is_added_is_all_that_is_done(finished, monkeypatch):
    _, config, results = finished
    trained = []
    original = _Comparison._run_trial

    def train(self, name, *arguments):
        trained.append(name)
        return original(self, name, *arguments)

    monkeypatch.setattr(_Comparison, "_run_trial", train)
    lisa = {"method": {"name": "lisa", "layers": 1, "period": 2}, "learning_rates": [1e-3]}
    grown = compare({**config, "contestants": {**config["contestants"], "lisa": lisa}})
    assert trained == ["lisa", "lisa"]
    assert grown["trials"][:-2] == results["trials"]


def test_a_time_budget_becomes_tokens_by_measured_speed(tmp_path, monkeypatch):
    """With a clock that gives full CPT 100 tokens a second and a fixed 2 s, 100 s are 9,800 tokens, in whole steps."""
    config = _world(tmp_path)
    config |= {"contestants": ["full"], "budgets": [{"seconds": 100.0}], "learning_rates": [1e-3], "seeds": [1]}
    trained, texts = [], []

    def train(self, name, inputs, output, measured_on):
        tokens = inputs.config.tokens
        trained.append(tokens)
        texts.append(measured_on)
        stages = [
            {"name": "surgery", "seconds": 2.0, "tokens": 0},
            {"name": "full", "seconds": tokens / 100, "tokens": tokens},
        ]
        measured = {"bpb": {"xx": 1.0, "en": 1.0}}
        trial = Trial(contestant=name, budget="", seed=inputs.config.seed, measured=measured, stages=stages)
        return {"trial": trial.model_dump(mode="json")}

    monkeypatch.setattr(_Comparison, "_run_trial", train)
    results = compare(config)
    step = config["run"]["training"]["tokens_per_step"]
    assert trained[0] == 6 * step, "the first look"
    assert trained[1] == 1300 // step * step, "the second: 15 % of the budget, less the fixed costs"
    assert trained[2] == 9800 // step * step
    assert len(trained) == 3, "the trial that fills the budget is the result, not trained again"
    assert texts == [[], [], ["heldout"]], "of the first two, only the time counts"
    (trial,) = read_results(results).trials
    assert trial.seconds == pytest.approx(100, rel=0.01)
    trained.clear()
    (Path(config["run"]["model"]) / "model.safetensors").touch()
    compare(config)
    assert trained[0] == 6 * step, "another base may have another speed"
    trained.clear()
    known = {**config, "contestants": {"full": {"tokens_per_second": 50.0}}, "output": str(tmp_path / "known")}
    compare(known)
    assert trained == [5000 // step * step], "measured beforehand, there is nothing to look at"
    trained.clear()
    known["contestants"]["full"]["fixed_seconds"] = 20
    compare(known)
    assert trained == [4000 // step * step]
    known["contestants"]["full"]["fixed_seconds"] = 100
    with pytest.raises(EloError, match=r"contestants\.full\.fixed_seconds: leaves nothing"):
        compare(known)


def test_rates_tuned_on_a_share_of_the_budget(tmp_path):
    config = _world(tmp_path)
    config |= {"contestants": ["full"], "seeds": [1, 2], "learning_rates": [1e-3, 3e-3], "tuning_share": 0.5}
    results = compare(config)
    tuning = [trial for trial in results["trials"] if trial["tuning"]]
    assert len(tuning) >= 2 and all(sum(stage["tokens"] for stage in trial["stages"]) == 640 for trial in tuning)
    assert all(trial["validation"] and not trial["measured"]["bpb"] for trial in tuning), "nothing seen of what counts"
    # The rate that is best for xx costs too much English.
    lowest = min(tuning, key=lambda trial: trial["validation"]["bpb"]["xx"])
    assert lowest["source_excess_bpb"] > 0
    best = min(tuning, key=lambda trial: (trial["source_excess_bpb"], trial["validation"]["bpb"]["xx"]))
    assert best is not lowest
    trials = reported(results, "full")
    assert [trial["learning_rates"] for trial in trials] == [best["learning_rates"]] * 2
    assert all(sum(stage["tokens"] for stage in trial["stages"]) == 1280 for trial in trials)
    assert not any(trial["validation"] for trial in trials)


def test_a_diverged_trial_is_a_result(tmp_path, monkeypatch):
    config = _world(tmp_path)
    config |= {"contestants": ["full"], "seeds": [1], "learning_rates": [1e-3, 2e-3], "budgets": [{"tokens": 256}]}
    original = compare_module.adapt

    def adapt(inputs, *arguments, **keywords):
        (phase,) = inputs.config.method.phases
        if inputs.config.settings(phase).learning_rate > 1.5e-3:
            raise TrainingDivergedError("training diverged at step 3")
        return original(inputs, *arguments, **keywords)

    monkeypatch.setattr(compare_module, "adapt", adapt)
    results = compare(config)
    assert reported(results, "full")[0]["learning_rates"]["full"] <= 1e-3
    failed = [trial for trial in results["trials"] if trial["failed"]]
    assert [trial["learning_rates"] for trial in failed] == [{"full": 2e-3}]


def test_a_refused_bridge_is_the_failure_of_its_contestant_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_MIN_EXPLAINED", 1.01)
    config = _world(tmp_path)
    config |= {"contestants": {"bridge": {"method": "elo"}, "full": {}}, "seeds": [1], "budgets": [{"tokens": 256}]}
    results = compare(config)
    (bridge,), (full,) = (reported(results, name) for name in ("bridge", "full"))
    assert re.search(r"explains .* of their effect .*, less than 101%", bridge["failed"])
    assert full["failed"] is None and full["measured"]["bpb"]["xx"] > 0
    assert any(bridge["failed"] in line for line in results["verdict"]["warnings"])


def test_a_trial_that_was_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    config = _world(tmp_path)
    config |= {"contestants": {"full": {}}, "seeds": [1]}
    expected = compare({**config, "output": str(tmp_path / "whole")})
    write, steps = loop.write_checkpoint, []

    class KilledError(Exception):
        pass

    def dying(accelerator, folder, step, *arguments):
        write(accelerator, folder, step, *arguments)
        steps.append(step)
        if step == 10:
            raise KilledError

    monkeypatch.setattr(loop, "write_checkpoint", dying)
    with pytest.raises(KilledError):
        compare(config)
    assert not (tmp_path / "comparison" / "results.json").exists()
    steps.clear()
    found = compare(config)
    assert steps[0] == 12, "not from the start"
    for one, other in zip(found["trials"], expected["trials"], strict=True):
        assert one["measured"]["bpb"] == other["measured"]["bpb"]
        assert one["measured"]["document_nats"] == other["measured"]["document_nats"]


def test_tuning_runs_as_long_as_the_reported_one_are_kept_too(tmp_path, monkeypatch):
    config = _world(tmp_path)
    config |= {"contestants": {"full": {"learning_rates": [1e-3, 3e-3]}}, "seeds": [1]}
    config |= {"budgets": [{"tokens": 64}], "tuning_share": 0.9}
    first = compare(config)
    trained = []
    monkeypatch.setattr(compare_module, "adapt", lambda *arguments: trained.append(arguments))
    assert compare(config)["trials"] == first["trials"]
    assert not trained


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
        ({"contestants": {"mine": {}}}, "contestants.mine: is not a method; set method to one of align_only, "),
        ({"contestants": {"elo": {"changes": {"layres": 1}}}}, "unknown key 'layres'; did you mean 'layers'"),
        (
            {"contestants": {"elo": {"changes": {"data.replay_ratio": 0.5}}, "full": {}}},
            "data differs from the other contestants",
        ),
        (
            {"contestants": {"elo": {"learning_rates": {"full": [1e-3]}}}},
            "the method has no phase 'full'; write elo_pretraining or layer_alignment",
        ),
        ({"contestants": {"elo": {"label": 3}}}, "contestants.elo.label"),
        ({"contestants": {}}, "contestants"),
        ({"contestants": {"../elo": {"method": "elo"}}}, "may contain only letters"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [{"tokens": 10, "seconds": 1}]}, "write exactly one of them"),
        ({"budgets": [{"hours": 1}]}, "unknown key 'budgets.0.hours'"),
        ({"budgets": [{"tokens": 64}]}, "tokens: the budget"),
        ({"seeds": [1, 1]}, "contains a seed twice"),
        ({"learning_rates": [0]}, "learning_rates.0"),
        ({"contestant": {}}, "did you mean 'contestants'"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
    ],
)
def test_mistakes_are_told_before_anything_trains(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(_Comparison, "run", lambda self: pytest.fail("trained"))
    if message.startswith("tokens"):
        monkeypatch.undo()
    with pytest.raises(EloError) as caught:
        compare({**_world(tmp_path), **change})
    assert message in str(caught.value)
