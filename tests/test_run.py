"""A whole run: its stages, its restarts, its results, by several methods."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from bad_input_fixtures import change
from run_fixtures import write_world
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from elo import run as run_module
from elo.config import load_config
from elo.data.shards import PreparedData
from elo.errors import EloError
from elo.preflight import check_inputs
from elo.report.files import read_results
from elo.run import run, stage_names


def _tensors(folder: Path) -> dict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(left: Path, right: Path) -> None:
    ours, theirs = _tensors(left), _tensors(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name


_HARMFUL = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "max_loss_spike_nats": 1000}
_STAGES = ("prepare", "bridge", "detach", "elo_pretraining", "attach", "scale", "layer_alignment")


def _total(trial, key):
    return sum(stage[key] for stage in trial["stages"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run by ELO with a bridge and a searched scale."""
    root = tmp_path_factory.mktemp("world")
    config = write_world(root)
    config["method"] = {"name": "elo", "share": 0.2}
    return root, config, run(config)


def _stage(root: Path, name: str) -> dict:
    return json.loads((root / "run" / "stages" / f"{name}.json").read_text())


def test_every_artefact_is_there_and_nothing_temporary(finished):
    root, _, results = finished
    run_folder = root / "run"
    for name in ("detach", "elo_pretraining", "attach", "scale", "layer_alignment"):
        assert (run_folder / name / "config.json").is_file(), name
    for name in ("results.json", "report.html", "report.md", "config.json", "model/model.safetensors", "bridge"):
        assert (run_folder / name).exists(), name
    assert json.loads((run_folder / "results.json").read_text()) == results
    left_over = [path for path in run_folder.rglob("*") if path.name.startswith(".tmp-") or "checkpoint" in path.name]
    assert left_over == []


def test_final_model_is_plain_hugging_face(finished):
    root, _, _ = finished
    for name in ("detach", "elo_pretraining", "attach", "scale", "model"):
        model, loading = AutoModelForCausalLM.from_pretrained(root / "run" / name, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        assert model.dtype == torch.bfloat16, name
    tokenizer = AutoTokenizer.from_pretrained(root / "run" / "model")
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


def test_what_trains_is_put_back_and_nothing_else(finished):
    root, _, _ = finished
    base = _tensors(root / "base")
    for stage in ("attach", "scale"):
        found = _tensors(root / "run" / stage)
        assert base.keys() == found.keys()
        changed = {name for name, tensor in base.items() if not tensor.equal(found[name])}
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
        assert any(".layers.0." in name for name in changed) and any(".layers.3." in name for name in changed)
        assert not [name for name in changed if ".layers.1." in name or ".layers.2." in name]
        assert "model.norm.weight" not in changed


def test_a_share_of_the_change_is_kept(finished):
    root, _, results = finished
    scale = _stage(root, "scale")["record"]["scale"]
    base, trained, kept = (_tensors(root / place) for place in ("base", "run/attach", "run/scale"))
    for name, tensor in kept.items():
        expected = base[name].double() + scale * (trained[name].double() - base[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-2, atol=1e-4, msg=name)
    assert results["trials"][0]["attach_scale"] == scale


def test_results_tell_what_happened(finished):
    _, config, results = finished
    (own,) = results["trials"]
    stages = {stage["name"]: stage for stage in own["stages"]}
    assert list(stages) == ["bridge", "detach", "elo_pretraining", "attach", "scale", "layer_alignment"]
    assert stages["elo_pretraining"]["tokens"] == 1024
    assert stages["layer_alignment"]["tokens"] == 256
    assert stages["elo_pretraining"]["flops"] > 0 and stages["layer_alignment"]["flops"] > 0
    assert stages["elo_pretraining"]["flops"] / 1024 < stages["layer_alignment"]["flops"] / 256
    assert _total(own, "tokens") == config["tokens"]
    assert set(own["measured"]["bpb"]) == {"xx", "en"}
    tokens = [point["tokens"] for point in own["evaluations"]]
    assert tokens == sorted(tokens)
    assert tokens[-1] == _total(own, "tokens")
    assert [stage["name"] for stage in own["stages"] if stage["detached"]] == ["elo_pretraining"]
    assert own["learning_rates"] == {"elo_pretraining": 1e-3, "layer_alignment": 1e-3}
    assert read_results(results).contestants[0].layers == (0, 3)
    assert own["before_alignment"]["bpb"].keys() == {"xx", "en"}


def test_alignment_sees_text_that_pretraining_did_not(finished):
    root, _, _ = finished
    rows = {name: _stage(root, name)["inputs"]["rows"]["rows"] for name in ("elo_pretraining", "layer_alignment")}
    assert rows == {"elo_pretraining": [0, 32], "layer_alignment": [32, 40]}


def test_the_scale_is_that_which_predicts_unseen_rows_best(finished):
    root, _, _ = finished
    stage = _stage(root, "scale")
    tried = {float(scale): nats for scale, nats in stage["record"]["scales_tried"].items()}
    assert {0.5, 0.75} < set(tried)
    assert stage["record"]["scale"] == min(tried, key=tried.__getitem__)
    assert stage["inputs"]["rows_identity"]["rows"][0] == 40, "rows that no phase trains on"


def test_nothing_is_done_twice(finished, capsys):
    root, config, results = finished
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.safetensors")}
    again = run(config)
    said = capsys.readouterr().out
    assert said.count("already done") == len(list((root / "run" / "stages").glob("*.json")))
    assert {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.safetensors")} == before
    assert again["trials"] == results["trials"]


def test_a_change_redoes_what_depends_on_it_and_no_more(finished, tmp_path, capsys):
    root, config, _ = finished
    shutil.copytree(root / "run", tmp_path / "run", symlinks=True)
    config = change(config, output=str(tmp_path / "run"))
    config["training"]["phases"] = {"layer_alignment": {"learning_rate": 5e-4, "save_steps": 1}}
    run(config)
    said = capsys.readouterr().out
    assert "layer_alignment: changed: settings.learning_rate 0.001 -> 0.0005; repeating the stage" in said
    for stage in ("prepared", "evaluate-base", "bridge", "detach", "elo_pretraining", "attach", "scale"):
        assert f"{stage}: already done" in said
    config["data"]["replay_ratio"] = 0.3
    run(config, until="elo_pretraining")
    said = capsys.readouterr().out
    assert "prepared: already done" in said, "changing the mix must not tokenise again"
    assert "detach: already done" in said
    for stage in ("bridge", "elo_pretraining"):
        assert re.search(rf"^{stage}: changed: .*\[\['en', 0\.1\]\] -> \[\['en', 0\.3\]\]", said, re.M)


def test_stages_one_by_one_give_the_same(finished, tmp_path):
    root, config, _ = finished
    alone = {**config, "output": str(tmp_path / "run")}
    made = {"prepare": "prepared"}
    assert stage_names(load_config(config)) == list(_STAGES)
    for until in _STAGES:
        output = tmp_path / "run" / made.get(until, until)
        assert not output.exists()
        assert run(alone, until=until) == {}
        assert output.exists()
    assert not (tmp_path / "run" / "results.json").exists()
    _same(root / "run" / "layer_alignment", tmp_path / "run" / "layer_alignment")


def test_a_share_of_what_full_pretraining_changed_is_kept(finished, tmp_path):
    root, config, _ = finished
    config = {**config, "output": str(tmp_path / "run"), "method": {"name": "full", "scale": 0.5}, "tokens": 256}
    results = run(config)
    assert [stage["name"] for stage in results["trials"][0]["stages"]] == ["full", "scale"]
    assert results["contestants"][0]["layers"] == [], "it is asked for no layers"
    base, trained, kept = (_tensors(place) for place in (root / "base", tmp_path / "run/full", tmp_path / "run/model"))
    for name, tensor in kept.items():
        expected = (base[name].double() + trained[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-2, atol=1e-4, msg=name)
    assert any(not tensor.equal(trained[name]) for name, tensor in kept.items())


def test_a_run_on_the_rows_that_its_text_uses(tmp_path):
    config = write_world(tmp_path)
    config |= {"method": "full", "tokens": 512}
    config["training"] |= {"vocabulary": "corpus", "vocabulary_sample": 5}
    results = run(config)
    rows = json.loads((tmp_path / "run" / "vocabulary-full" / "rows.json").read_text())
    base, final = _tensors(tmp_path / "base"), _tensors(tmp_path / "run" / "model")
    data = PreparedData.open(tmp_path / "run" / "prepared")
    shards = [shard for language in ("xx", "en") for corpus in data.train(language) for shard in corpus.shards]
    used = {token for shard in shards for token in shard.arrays.tokens.tolist()}
    assert used <= set(rows) and len(rows) <= len(used) + 5 + 2
    assert len(rows) < len(base["lm_head.weight"]), "some are left out"
    left_out = sorted(set(range(len(base["lm_head.weight"]))) - set(rows))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert final[name].shape == base[name].shape
        assert final[name][left_out].equal(base[name][left_out])
        assert not final[name][rows].equal(base[name][rows])
    stages = {stage["name"]: stage for stage in results["trials"][0]["stages"]}
    assert list(stages) == ["vocabulary-full", "full"]
    measured = results["trials"][0]
    assert measured["evaluations"][-1]["bpb"] == pytest.approx(measured["measured"]["bpb"], abs=1e-3)  # bf16 on disk
    plain = run(change(config, output=str(tmp_path / "plain"), training__vocabulary="all"))
    (whole,) = [stage for stage in plain["trials"][0]["stages"] if stage["name"] == "full"]
    assert stages["full"]["flops"] < whole["flops"]
    everything = change(config, output=str(tmp_path / "every"), training__vocabulary_sample=10_000)
    _close(run(everything), tmp_path / "every" / "model", tmp_path / "plain" / "model")


def test_measurements_in_bf16(tmp_path):
    config = write_world(tmp_path) | {"method": "full"}
    bpb = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        run({**config, "output": str(output), "tokens": 64, "evaluation": {"dtype": dtype}})
        record = json.loads((output / "stages" / "evaluate-base.json").read_text())["record"]
        assert record["model"]["dtype"] == dtype
        bpb[dtype] = record["bpb"]["xx"]
    assert bpb["bfloat16"] != bpb["float32"]
    assert bpb["bfloat16"] == pytest.approx(bpb["float32"], abs=0.05)


def test_benchmarks_during_training(tmp_path):
    config = write_world(tmp_path) | {"method": "full", "tokens": 256}
    config["training"] |= {"evaluations": 2}
    config["evaluation"] = {"in_context": {"lengths": [16], "tokens": 64}}
    plain = run({**config, "output": str(tmp_path / "plain")})
    config["evaluation"]["during_training"] = ["in_context"]
    (trial,) = run(config)["trials"]
    assert not any(point["measures"] for point in plain["trials"][0]["evaluations"])
    names = {(value["measure"], value["name"]) for value in trial["measured"]["measures"] if not value["is_detail"]}
    for point in trial["evaluations"]:
        assert {(value["measure"], value["name"]) for value in point["measures"]} == names
    last, final = (
        {value["measure"]: value["value"] for value in values if value["name"] == "all"}
        for values in (trial["evaluations"][-1]["measures"], trial["measured"]["measures"])
    )
    assert last["in_context_nats"] == pytest.approx(final["in_context_nats"], abs=0.05), "bf16 on disk"
    drawn = sorted(path.name for path in (tmp_path / "run" / "charts").glob("measure_*.png"))
    assert drawn == ["measure_1.png", "measure_2.png"], "accuracy and nats; no chart for each kind and length"
    assert "in context nats during training" in (tmp_path / "run" / "report.html").read_text()
    assert _tensors(tmp_path / "run" / "model").keys() == (others := _tensors(tmp_path / "plain" / "model")).keys()
    for name, tensor in _tensors(tmp_path / "run" / "model").items():
        assert tensor.equal(others[name]), f"{name}: measuring changes nothing"


def test_benchmarks_during_training_are_configured_ones(tmp_path):
    config = write_world(tmp_path)
    config["evaluation"] = {"during_training": ["tasks"]}
    with pytest.raises(EloError, match="no section evaluation\\.tasks"):
        run(config)
    config["evaluation"] = {"in_context": True, "during_training": ["in_context"]}
    config["training"] |= {"training_arguments": {"fsdp": True}}
    with pytest.raises(EloError, match="during_training: needs whole weights"):
        check_inputs(load_config(config | {"method": "full"}))


def _close(_, left: Path, right: Path) -> None:
    ours, theirs = _tensors(left), _tensors(right)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=1e-2, atol=1e-4, msg=name)


def test_layers_do_not_matter_to_a_method_that_has_none(finished, tmp_path, capsys):
    _, config, _ = finished
    config = {**config, "output": str(tmp_path / "run"), "method": "align_only", "tokens": 640}
    run(config, until="layer_alignment")
    capsys.readouterr()
    run({**config, "layers": "0,1"}, until="layer_alignment")
    assert "layer_alignment: already done" in capsys.readouterr().out


@pytest.mark.slow  # test_run_faults.py does the same in forked children
def test_killed_at_random_moments_and_started_again_gives_identical_weights(finished, tmp_path):
    root, config, _ = finished
    victim = {**config, "output": str(tmp_path / "run")}
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
    _same(root / "run" / "layer_alignment", tmp_path / "run" / "layer_alignment")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".tmp-")]


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    config = write_world(tmp_path)
    config["tokens"], config["training"]["save_steps"] = 64 * 2000, 10_000
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "elo.cli", "run", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    live = tmp_path / "run" / "stages" / "elo_pretraining.live.json"
    while not live.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped by SIGTERM" in stderr
    assert "the same command resumes from there" in stderr
    assert "Traceback" not in stderr
    assert len(list((tmp_path / "run").glob("*-checkpoints/checkpoint-*/elo_checkpoint.json"))) == 1


def test_python_calls(finished, tmp_path):
    from elo import api

    root, config, _ = finished
    api.detach(root / "base", "0,-1", output=tmp_path / "detached")
    api.attach(tmp_path / "detached", root / "base", output=tmp_path / "attached")
    _same(root / "base", tmp_path / "attached")
    measured = api.evaluate(root / "base", corpora={"en": root / "en.jsonl"}, progress=False)
    assert measured["bpb"]["en"] > 0
    with pytest.raises(EloError, match="unknown key 'modle'"):
        api.run({**config, "modle": "x"})


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    config = write_world(tmp_path)
    config["output"] = str(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EloError, match="is not empty and is not an ELO run"):
        run(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stage_that_the_method_does_not_have(tmp_path):
    config = write_world(tmp_path)
    config["method"] = "full"
    with pytest.raises(
        EloError, match="--until elo_pretraining: method full has no such stage; write one of prepare, full"
    ):
        run(config, until="elo_pretraining")
    assert not (tmp_path / "run" / "prepared").exists()


def test_budget_below_one_step_is_refused(tmp_path):
    config = write_world(tmp_path)
    config["tokens"] = 64
    with pytest.raises(EloError, match="tokens: the budget of 64 tokens is less than one update"):
        run(config)


def test_a_bridge_that_explains_too_little_stops_the_run_before_it_detaches(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_MIN_EXPLAINED", 1.01)
    config = write_world(tmp_path)
    config["method"] = {"name": "elo", "middle": "bridged"}
    with pytest.raises(EloError, match=r"explains .* on held-out text \(cosine .*\), less than 101%; choose more"):
        run(config)
    with pytest.raises(EloError, match="less than 101%"):  # from the record
        run(config, until="bridge")
    assert not (tmp_path / "run" / "stages" / "detach.json").exists()


def test_a_target_language_worse_than_the_base_is_warned_of(tmp_path, capsys):
    config = write_world(tmp_path)
    config |= {"method": "full", "tokens": 512}
    config["training"] |= _HARMFUL
    results = run(config)
    (trial,) = results["trials"]
    base, after = results["base"]["bpb"]["xx"], trial["measured"]["bpb"]["xx"]
    assert after > base, "a learning rate of 1 must do harm for this test to mean anything"
    warnings = results["verdict"]["warnings"]
    assert any("the target language xx is worse than in the base model" in line for line in warnings)
    said = capsys.readouterr().out
    during = [point["bpb"]["xx"] for point in trial["evaluations"]]
    assert during
    for value in during:
        line = f"warning: full: xx is worse than the base model ({value:.4f} bits per byte, base {base:.4f})"
        assert (line in said) == (value > base)
    assert any(
        line.startswith("xx: ") and "held-out documents; conclusions need at least 30" in line for line in warnings
    )
    for name in ("report.md", "report.html"):
        assert "worse than in the base model" in (tmp_path / "run" / name).read_text()


def test_a_detached_training_that_does_harm_is_warned_of_once_attached(tmp_path, capsys):
    config = write_world(tmp_path)
    method = {"name": "elo", "middle": "removed", "scale": 1.0}
    config |= {"method": method | {"alignment": "none"}, "tokens": 256}
    config["training"]["phases"] = {"elo_pretraining": _HARMFUL}
    results = run(config)
    said = capsys.readouterr().out
    (trial,) = results["trials"]
    assert trial["measured"]["bpb"]["xx"] > results["base"]["bpb"]["xx"]
    assert said.count("warning: ELO: the target language xx is worse than in the base model") == 1
    assert said.count("worse than") == 1, "not of the detached model"
    run(config | {"method": method | {"share": 0.2}}, until="layer_alignment")
    assert "warning: evaluate-attached: xx is worse than the base model" in capsys.readouterr().out


def test_a_detached_training_that_does_harm_is_discarded_by_the_scale_search(tmp_path, capsys):
    config = write_world(tmp_path)
    config |= {"method": {"name": "elo", "middle": "removed", "share": 0.2}, "tokens": 512}
    config["training"]["phases"] = {"elo_pretraining": _HARMFUL}
    results = run(config)
    said = capsys.readouterr().out
    record = _stage(tmp_path, "scale")["record"]
    tried = record["scales_tried"]
    assert record["scale"] == 0 and len(tried) > 1
    assert all(tried["0"] < nats for scale, nats in tried.items() if scale != "0")
    (line,) = record["warnings"]
    assert f"{tried['0']:.4f} nats per token" in line and said.count(f"\nwarning: {line}") == 1
    assert any(line in warning for warning in results["verdict"]["warnings"])
    assert "keeps nothing of the trained change" in (tmp_path / "run" / "report.md").read_text()
    _same(tmp_path / "base", tmp_path / "run" / "scale")
    aligned = _stage(tmp_path, "layer_alignment")["inputs"]["checkpoint"]
    assert aligned == _stage(tmp_path, "scale")["fingerprint"], "alignment starts from the base"


def test_every_value_has_what_it_was_measured_on(finished):
    _, _, results = finished
    for measured in (results["base"], results["trials"][0]["measured"]):
        for language, text in measured["heldout"].items():
            assert text == results["base"]["heldout"][language]
            assert len(measured["document_nats"][language]) == text["documents"]
            assert sum(measured["document_bytes"][language]) == text["bytes"]
