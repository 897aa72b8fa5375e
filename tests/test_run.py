"""A whole run: its stages, its restarts, its controls, its results."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_fixtures import write_world
from safetensors.torch import load_file

import elo
from elo.errors import EloError
from elo.report.files import read_results
from elo.run import run


def _tensors(folder: Path) -> dict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(left: Path, right: Path) -> None:
    ours, theirs = _tensors(left), _tensors(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name


def _total(trial, key):
    return sum(stage[key] for stage in trial["stages"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with every control."""
    root = tmp_path_factory.mktemp("world")
    config = write_world(root)
    config["controls"] = ["full_at_wall_time", "full", "align_only", "frozen", "elo_paper"]
    results = run(config)
    return root, config, results


def test_every_artefact_is_there_and_nothing_temporary(finished):
    root, _, results = finished
    run_folder = root / "run"
    for name in ("detached", "elo_pretraining", "attached", "layer_alignment"):
        assert (run_folder / "elo" / name / "config.json").is_file(), name
    for name in ("results.json", "report.html", "report.md", "config.json", "model/model.safetensors"):
        assert (run_folder / name).is_file(), name
    assert json.loads((run_folder / "results.json").read_text()) == results
    left_over = [path for path in run_folder.rglob("*") if path.name.startswith(".tmp-") or "checkpoint" in path.name]
    assert left_over == []


def test_final_model_is_plain_hugging_face(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _, _ = finished
    for name in ("elo/detached", "elo/elo_pretraining", "elo/attached", "model"):
        model, loading = AutoModelForCausalLM.from_pretrained(root / "run" / name, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        assert model.dtype == torch.bfloat16, name
    tokenizer = AutoTokenizer.from_pretrained(root / "run" / "model")
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


def test_only_the_chosen_layers_change_before_alignment(finished):
    root, _, _ = finished
    base, attached = _tensors(root / "base"), _tensors(root / "run" / "elo_paper" / "attached")
    assert base.keys() == attached.keys()
    for name, tensor in base.items():
        chosen = ".layers.0." in name or ".layers.3." in name
        assert chosen or tensor.equal(attached[name]), name
    assert any(not tensor.equal(attached[name]) for name, tensor in base.items())


def test_embedding_and_head_are_put_back_where_they_train(finished):
    root, _, _ = finished
    base, attached = _tensors(root / "base"), _tensors(root / "run" / "elo" / "attached")
    changed = {name for name, tensor in base.items() if not tensor.equal(attached[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
    assert "model.norm.weight" not in changed
    assert not [name for name in changed if ".layers.1." in name or ".layers.2." in name]


def test_results_tell_what_happened(finished):
    _, config, results = finished
    methods = {trial["contestant"]: trial for trial in results["trials"]}
    assert list(methods) == ["elo", *config["controls"][1:], "full_at_wall_time"], "what is matched comes last"
    own = methods["elo"]
    stages = {stage["name"]: stage for stage in own["stages"]}
    assert list(stages) == ["bridge", "detach", "elo_pretraining", "attach", "layer_alignment"]
    assert stages["elo_pretraining"]["tokens"] == 1024
    assert stages["layer_alignment"]["tokens"] == 256
    full = methods["full"]
    assert _total(own, "tokens") == _total(full, "tokens") == config["tokens"]
    assert _total(methods["align_only"], "tokens") == 256
    wanted = _total(own, "seconds") * config["tokens"] / _total(full, "seconds")
    assert 0 <= _total(methods["full_at_wall_time"], "tokens") - wanted <= 2 * config["full"]["tokens_per_step"]
    for trial in results["trials"]:
        assert set(trial["measured"]["bpb"]) == {"xx", "en"}
        tokens = [point["tokens"] for point in trial["evaluations"]]
        assert tokens == sorted(tokens)
        assert tokens[-1] == _total(trial, "tokens")
    assert full["measured"]["bpb"]["xx"] < results["base"]["bpb"]["xx"]
    assert [stage["name"] for stage in own["stages"] if stage["detached"]] == ["elo_pretraining"]
    assert own["learning_rates"] == {"elo_pretraining": 1e-3, "layer_alignment": 1e-3}
    assert read_results(results).contestants[0].layers == (0, 3)
    assert own["before_alignment"]["bpb"].keys() == {"xx", "en"}


def test_alignment_sees_text_that_pretraining_did_not(finished):
    root, _, _ = finished
    inputs = {
        name: json.loads((root / "run" / "stages" / f"{name}.json").read_text())["inputs"]["rows"]
        for name in ("elo-elo_pretraining", "elo-layer_alignment", "full-full", "align_only-layer_alignment")
    }
    assert inputs["elo-elo_pretraining"] == [0, 32]
    assert inputs["elo-layer_alignment"] == [32, 40] == inputs["align_only-layer_alignment"]
    assert inputs["full-full"] == [0, 40]


def test_the_scale_that_predicts_unseen_rows_best_is_attached(finished):
    root, _, _ = finished
    stage = json.loads((root / "run" / "stages" / "elo-attach.json").read_text())
    tried = {float(scale): nats for scale, nats in stage["record"]["scales_tried"].items()}
    assert {0.5, 0.75} < set(tried)
    assert stage["record"]["scale"] == min(tried, key=tried.__getitem__)
    assert stage["inputs"]["rows"][0] == 32, "rows that pretraining did not see"


def test_the_default_recipe_detaches_nothing_and_needs_no_alignment(tmp_path):
    config = {**write_world(tmp_path), "controls": ["elo_paper"]}
    config.pop("elo")
    results = run(config)
    own, paper = results["trials"]
    assert [stage["name"] for stage in own["stages"]] == ["bridge", "elo_pretraining"]
    assert _total(own, "tokens") == _total(paper, "tokens") == config["tokens"], (
        "what has no alignment trains on its rows too"
    )
    base, final = _tensors(tmp_path / "base"), _tensors(tmp_path / "run" / "model")
    changed = {name for name, tensor in base.items() if not tensor.equal(final[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
    assert not [name for name in changed if ".layers.1." in name or ".layers.2." in name or name == "model.norm.weight"]


def test_nothing_is_done_twice(finished, capsys):
    root, config, results = finished
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.safetensors")}
    again = run(config)
    said = capsys.readouterr().out
    assert said.count("done already") == len(list((root / "run" / "stages").glob("*.json")))
    assert {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.safetensors")} == before
    assert again["trials"] == results["trials"]


def test_a_change_redoes_what_depends_on_it_and_no_more(tmp_path, capsys):
    config = write_world(tmp_path)
    run(config)
    capsys.readouterr()
    config["layer_alignment"]["learning_rate"] = 5e-4
    run(config)
    said = capsys.readouterr().out
    assert "elo-layer_alignment: changed: settings.learning_rate 0.001 -> 0.0005; doing it again" in said
    for stage in ("prepare", "evaluate-base", "elo-bridge", "elo-detach", "elo-elo_pretraining", "elo-attach"):
        assert f"{stage}: done already" in said
    config["data"]["replay_ratio"] = 0.3
    run(config)
    said = capsys.readouterr().out
    assert "prepare: done already" in said, "changing the mix must not tokenise again"
    assert "elo-elo_pretraining: changed: mixture.replay_ratio 0.1 -> 0.3" in said


def test_stages_one_by_one_give_the_same(finished, tmp_path):
    root, config, _ = finished
    alone = {**config, "output": str(tmp_path / "run"), "controls": []}
    for until, made in (
        ("prepare", "prepared"),
        ("elo_pretraining", "elo/elo_pretraining"),
        ("layer_alignment", "elo/layer_alignment"),
    ):
        assert not (tmp_path / "run" / made).exists()
        assert run(alone, until=until) == {}
        assert (tmp_path / "run" / made).exists()
    _same(root / "run" / "elo" / "layer_alignment", tmp_path / "run" / "elo" / "layer_alignment")


@pytest.mark.slow  # test_run_faults.py does the same in forked children
def test_killed_at_random_moments_and_started_again_gives_identical_weights(finished, tmp_path):
    root, config, _ = finished
    victim = {**config, "output": str(tmp_path / "run"), "controls": []}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(victim))
    generator = random.Random(os.environ.get("ELO_TEST_SEED", "7"))
    command = [sys.executable, "-m", "elo.cli", "run", str(tmp_path / "config.yaml")]
    kills = 0
    while kills < 4:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # A line printed tells that a stage has begun; the kill comes some moments later, inside it.
        assert process.stdout is not None
        for _ in range(generator.randint(1, 3 + 2 * kills)):
            process.stdout.readline()
        time.sleep(generator.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kills > 0
    _same(root / "run" / "elo" / "layer_alignment", tmp_path / "run" / "elo" / "layer_alignment")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".tmp-")]


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    config = write_world(tmp_path)
    config["tokens"], config["elo_pretraining"]["save_steps"] = 64 * 2000, 10_000
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "elo.cli", "run", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scratch = tmp_path / "run" / "elo" / "elo_pretraining-checkpoints"
    while not scratch.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped by SIGTERM" in stderr
    assert "the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    assert len(list(scratch.glob("checkpoint-*/elo_checkpoint.json"))) == 1


def test_python_calls(finished, tmp_path):
    root, config, _ = finished
    elo.detach(root / "base", "0,-1", output=tmp_path / "detached")
    elo.attach(tmp_path / "detached", root / "base", output=tmp_path / "attached")
    _same(root / "base", tmp_path / "attached")
    measured = elo.evaluate(root / "base", corpora={"en": root / "en.jsonl"}, progress=False)
    assert measured["bpb"]["en"] > 0
    with pytest.raises(EloError, match="unknown key 'modle'"):
        elo.run({**config, "modle": "x"})


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    config = write_world(tmp_path)
    config["output"] = str(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EloError, match="holds other things than a run"):
        run(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stage_that_the_method_does_not_have(tmp_path):
    config = write_world(tmp_path)
    config["method"] = "full"
    with pytest.raises(EloError, match="method 'full' has no stage 'elo_pretraining'; it has prepare, full"):
        run(config, until="elo_pretraining")
    assert not (tmp_path / "run" / "prepared").exists()


def test_budget_below_one_step_is_refused(tmp_path):
    config = write_world(tmp_path)
    config["tokens"] = 64
    with pytest.raises(EloError, match="tokens: the budget of 64 tokens is less than one step"):
        run(config)


def test_a_target_language_worse_than_the_base_is_warned_of(tmp_path, capsys):
    config = write_world(tmp_path)
    config["method"] = "full"
    config["full"] |= {"learning_rate": 1.0, "lr_scheduler_type": "constant", "loss_spike": 1000}
    results = run(config)
    base, after = results["base"]["bpb"]["xx"], results["methods"][0]["bpb"]["xx"]
    assert after > base, "a learning rate of 1 must do harm for this test to mean anything"
    expected = f"full: xx is worse than the base model ({after:.4f} bits per byte, base {base:.4f})"
    assert any(line.startswith(expected) for line in results["warnings"])
    said = capsys.readouterr().out
    assert f"warning: {expected}" in said
    during = [point["bpb"]["xx"] for point in results["methods"][0]["evaluations"]]
    for value in during:
        assert value <= base or f"xx is worse than the base model ({value:.4f} bits per byte" in said
    assert any(line.startswith("xx: measured on") and "below 30" in line for line in results["warnings"])
    assert "is worse than the base model" in (tmp_path / "run" / "report.md").read_text()
    assert "is worse than the base model" in (tmp_path / "run" / "report.html").read_text()


def test_no_harm_is_reported_where_there_is_none(finished):
    _, _, results = finished
    base = results["base"]["bpb"]["xx"]
    worse = {method["name"] for method in results["methods"] if method["bpb"]["xx"] > base}
    assert worse != {method["name"] for method in results["methods"]}
    for method in results["methods"]:
        said = [line for line in results["warnings"] if line.startswith(f"{method['name']}: xx is worse")]
        assert len(said) == (method["name"] in worse)


def test_every_value_has_what_it_was_measured_on(finished):
    _, _, results = finished
    for measured in (results["base"], *results["methods"]):
        for language, text in measured["heldout"].items():
            assert text == results["base"]["heldout"][language]
            assert len(measured["documents_nats"][language]) == text["documents"]
            assert sum(measured["documents_bytes"][language]) == text["bytes"]
            assert text["bytes"] == results["data"]["heldout"][language]["bytes"], "all of it fits"
