"""Probe: what each criterion measures, that the model stays as it is, and how its scores choose layers."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from run_fixtures import write_base, write_documents, write_world
from torch import nn
from training_fixtures import tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from zoo import FAMILIES, tiny_config, tiny_model

from elo.checkpoint.architecture import layers_of
from elo.checkpoint.layers import AutoLayers, assumed_layers, parse_auto
from elo.cli import app
from elo.compare import compare
from elo.data.tokenizer import load_tokenizer
from elo.detach_attach import detach
from elo.errors import EloError
from elo.probe import adaptability
from elo.probe.base import MODULES, Subject
from elo.probe.choice import choose
from elo.probe.criteria import CRITERIA
from elo.probe.importance import _fuse
from elo.probe.probe import probe
from elo.probe.text import make_sequences, read_sentences
from elo.run import run
from elo.surgery.in_memory import detach_layers

ROOT = Path(__file__).parent.parent.parent
ONE_WORD = {"layer": ("",), "attention": ("self_attn",), "mlp": ("mlp",)}


def subject(model=None, sequences=4, length=12):
    model = model or tiny_llama()
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = {name: torch.randint(3, vocab, (sequences, length), generator=generator) for name in ("xx", "en")}
    sentences = {
        name: [torch.randint(3, vocab, (size,), generator=generator) for size in (4, 7, 5)] for name in ("xx", "en")
    }
    return Subject(model, ids, sentences)


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_skipping_a_layer_is_the_loss_of_the_model_without_it():
    of = subject()
    scores = CRITERIA["skipping"].score(of)
    for language, ids in of.sequences.items():
        base = float(loss(of.model, ids))
        for index in range(4):
            without = detach_layers(of.model, [each for each in range(4) if each != index])
            assert scores["layer"][language][index] == pytest.approx(float(loss(without, ids)) - base, abs=1e-5)
            for which, last in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
                changed = copy.deepcopy(of.model)
                changed.model.layers[index].get_submodule(last).weight.zero_()
                assert scores[which][language][index] == pytest.approx(float(loss(changed, ids)) - base, abs=1e-5)


def test_block_influence_compares_hidden_states():
    of = subject()
    scores = CRITERIA["block_influence"].score(of)
    ids = of.sequences["xx"]
    states = of.model.model(input_ids=ids, output_hidden_states=True).hidden_states
    for index in range(3):  # the last state is after the final norm
        cosine = nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert scores["layer"]["xx"][index] == pytest.approx(float(1 - cosine.mean()), abs=1e-5)
    assert all(each > 0 for which in MODULES for values in scores[which].values() for each in values)


def test_gradient_and_fisher_are_those_of_autograd():
    of = subject()
    gradient, fisher = (CRITERIA[name].score(of) for name in ("gradient", "fisher"))
    model = copy.deepcopy(of.model).requires_grad_(True)
    ids = of.sequences["en"]

    def squared(text):
        model.zero_grad()
        loss(model, text).backward()
        return [
            {
                which: sum(float(p.grad.square().sum()) for name, p in layer.named_parameters() if word in name)
                for which, (word,) in ONE_WORD.items()
            }
            for layer in model.model.layers
        ]

    whole, single = squared(ids), [squared(row) for row in ids.split(1)]
    for which in MODULES:
        for index in range(4):
            assert gradient[which]["en"][index] ** 2 == pytest.approx(whole[index][which], rel=1e-3)
            mean = sum(each[index][which] for each in single) / len(single)
            assert fisher[which]["en"][index] == pytest.approx(mean, rel=1e-3)


def test_adaptability_is_the_gain_of_updates_of_the_module_alone(monkeypatch):
    monkeypatch.setattr(adaptability, "STEP", 0.02)
    of = subject(length=16)
    scores = CRITERIA["adaptability"].score(of)
    ids = of.sequences["xx"]
    for which, (word,) in ONE_WORD.items():
        model = copy.deepcopy(of.model).requires_grad_(True)
        before = float(loss(model, ids[2:]))
        trained = [p for name, p in model.model.layers[1].named_parameters() if word in name]
        for _ in range(adaptability.UPDATES):
            found = torch.autograd.grad(loss(model, ids[:2]), trained)
            with torch.no_grad():
                for weight, slope in zip(trained, found, strict=True):
                    weight -= adaptability.STEP * weight.norm() * slope / slope.norm()
        assert scores[which]["xx"][1] == pytest.approx(before - float(loss(model, ids[2:])), abs=1e-5)


def test_adaptability_is_measured_on_text_that_was_not_learnt():
    of = subject(sequences=3)
    swapped = Subject(of.model, {name: ids[[1, 0, 2]] for name, ids in of.sequences.items()}, {})
    scores, again = (CRITERIA["adaptability"].score(each) for each in (of, swapped))
    for which in MODULES:
        assert again[which]["xx"] == pytest.approx(scores[which]["xx"], abs=1e-5)


def test_batches_of_unequal_size_give_the_scores_of_one(monkeypatch):
    monkeypatch.setattr(adaptability, "STEP", 0.02)
    of = subject(sequences=5)  # batches of 2, 2 and 1 sequences; adaptability learns from 2 and 1
    whole = {name: each.score(of) for name, each in CRITERIA.items()}
    monkeypatch.setattr("elo.probe.base.BATCH_TOKENS", 30)
    for name, each in CRITERIA.items():
        scores = each.score(of)
        for which in MODULES:
            for language, values in scores[which].items():
                assert values == pytest.approx(whole[name][which][language], rel=1e-3, abs=1e-5), f"{name}: {which}"


def test_parallel_sees_the_same_sentences_as_the_same():
    of = subject()
    scores = CRITERIA["parallel"].score(of)
    assert all(0 < each < 2 for which in MODULES for each in scores[which]["xx-en"])
    same = Subject(of.model, of.sequences, {"xx": of.sentences["xx"], "en": of.sentences["xx"]})
    assert all(abs(each) < 1e-5 for which in MODULES for each in CRITERIA["parallel"].score(same)[which]["xx-en"])


def test_importance_is_relative():
    scores = CRITERIA["importance"].score(subject())
    for which in MODULES:
        for values in scores[which].values():
            assert sum(values) / 4 == pytest.approx(1, abs=1e-3)
    model = tiny_llama()
    for weight in model.model.layers[2].mlp.parameters():
        weight.data.mul_(4)
    heavier = CRITERIA["importance"].score(subject(model))
    assert heavier["mlp"]["xx"][2] > scores["mlp"]["xx"][2] and max(heavier["mlp"]["xx"]) == heavier["mlp"]["xx"][2]


def test_fused_importance_has_mean_1_whatever_the_variance():
    spread = [[8.0, *[0.0] * 7], [*[0.0] * 7, 8.0]]
    assert float(_fuse([spread, spread]).mean()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "opt", "qwen3_moe", "bloom", "olmo2", "mamba"])
def test_every_family_is_scored_and_left_as_it_was(name):
    model_type, particular = FAMILIES[name]
    model = tiny_model(tiny_config(model_type, **particular))
    of = subject(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for each in CRITERIA.values():
        scores = each.score(of)
        for which in MODULES:
            for values in scores[which].values():
                assert len(values) == len(layers_of(model))
                assert all(value == value for value in values)
                assert any(values) or (which == "mlp" and name == "mamba"), f"{each.name}: {which}"
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in layers_of(model))
    assert not any(each.requires_grad or each.grad is not None for each in model.parameters())


def test_choose_takes_the_highest_mean_over_the_languages():
    scores = {which: {"xx": [0.1, 0.4, 0.2, 0.3], "en": [9.0, 0.0, 0.0, 0.0]} for which in MODULES}
    chosen = choose(scores, "skipping", 2, "layer", ["xx"])
    assert chosen.layers == (1, 3)
    assert (
        chosen.reason.startswith("highest skipping of the layer") and "1 (0.4), 3 (0.3); next 2 (0.2)" in chosen.reason
    )
    assert choose(scores, "skipping", 1, "mlp", ["xx", "en"]).layers == (0,)
    pairs = {which: {"xx-en": [0.0, 0.0, 1.0, 0.5]} for which in MODULES}
    assert choose(pairs, "parallel", 1, "layer", ["xx"]).layers == (2,)


def test_selections_that_a_probe_makes():
    assert parse_auto("auto:4") == AutoLayers(None, 4)
    assert parse_auto("auto:fisher:2") == AutoLayers("fisher", 2)
    assert parse_auto("first:1,last:1") is None and parse_auto([0, 1]) is None
    assert assumed_layers("auto:3", 12) == (0, 6, 11)
    assert assumed_layers("auto:1", 12) == (0,)
    assert assumed_layers("last:2", 12) == (10, 11)


def test_sequences_need_text():
    documents = [torch.arange(40).numpy(), torch.arange(5).numpy(), torch.arange(30).numpy()]
    sequences = make_sequences("xx", documents, 20, 10)
    assert sequences.tolist()[0] == list(range(10)) and sequences.shape == (2, 10)
    with pytest.raises(EloError, match="probe: xx: 5 tokens of text do not fill two sequences of 10"):
        make_sequences("xx", documents[1:2], 20, 10)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def _parallel(folder, count=6):
    path = folder / "parallel.jsonl"
    lines = [{"xx": f"가나 다라마 {number}", "en": f"the cat sat {number}"} for number in range(count)]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def test_rows_with_an_empty_sentence_are_skipped_in_every_language(tmp_path):
    encoder = load_tokenizer(str(write_base(tmp_path / "base")), False)
    rows = [("가나", "the cat"), ("바사", " "), ("", "sat"), ("다라마", "the dog")]
    found = []
    for name, kept in (("all", rows), ("complete", [rows[0], rows[3]])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"xx": xx, "en": en}) for xx, en in kept))
        sentences = read_sentences(path, ["xx", "en"], encoder, 16)
        found.append({language: [ids.tolist() for ids in each] for language, each in sentences.items()})
    assert found[0] == found[1]
    assert len(found[0]["xx"]) == len(found[0]["en"]) == 2
    with pytest.raises(EloError, match="only xx has a corpus"):
        read_sentences(path, ["xx"], encoder, 16)
    path.write_text(json.dumps({"xx": "가나", "en": ""}))
    with pytest.raises(EloError, match="no row has text in all of xx, en"):
        read_sentences(path, ["xx", "en"], encoder, 16)


def test_a_probe_writes_scores_and_charts_and_resumes(tmp_path, capsys, monkeypatch):
    base = str(write_base(tmp_path / "base"))
    corpora = {
        "xx": str(write_documents(tmp_path / "xx.jsonl", ["가나", "바사"], 20, 1)),
        "en": str(write_documents(tmp_path / "en.jsonl", ["the", "cat"], 20, 2)),
    }
    arguments = {"output": tmp_path / "probe", "tokens": 32, "sequence_length": 16, "parallel": _parallel(tmp_path)}

    def fails(of):
        raise KeyboardInterrupt

    names = list(CRITERIA)
    with monkeypatch.context() as patched:
        patched.setitem(CRITERIA, names[3], CRITERIA[names[3]].__class__(names[3], "", fails))
        with pytest.raises(KeyboardInterrupt):
            probe(base, corpora, **arguments)
    assert not (tmp_path / "probe" / "probe.json").exists()
    capsys.readouterr()
    results = probe(base, corpora, **arguments)
    assert capsys.readouterr().out.count("already done") == 3
    assert json.loads((tmp_path / "probe" / "probe.json").read_text()) == results
    assert list(results["criteria"]) == names
    assert results["parallel_sentences"] == 6
    for name in names:
        assert (tmp_path / "probe" / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (tmp_path / "probe" / f"{name}.png").stat().st_size > 1000
    options = [f"--corpus={language}={path}" for language, path in corpora.items()]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    done = CliRunner().invoke(app, ["probe", base, *options, "--criteria", names[0]])
    assert done.exit_code == 0, done.output
    assert "already done" in done.output and "best first" in done.output
    again = json.loads((tmp_path / "probe" / "probe.json").read_text())["criteria"]
    assert again == {names[0]: results["criteria"][names[0]]}


def test_a_smaller_model_of_the_layers_that_matter(tmp_path):
    base = str(write_base(tmp_path / "base"))
    corpus = f"xx={write_documents(tmp_path / 'xx.jsonl', ['가나', '바사'], 60, 1)}"
    small = tmp_path / "small"
    done = CliRunner().invoke(app, ["detach", base, "-o", str(small), "--layers", "auto:2", "--corpus", corpus])
    assert done.exit_code == 0, done.output
    assert "highest skipping of the layer" in done.output
    scores = json.loads((tmp_path / "small-probe" / "probe.json").read_text())["criteria"]["skipping"]["scores"]
    means = scores["layer"]["xx"]
    model = AutoModelForCausalLM.from_pretrained(small)
    assert model.config.num_hidden_layers == 2
    kept = sorted(sorted(range(4), key=lambda index: -means[index])[:2])
    whole = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for place, index in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(model.state_dict()[name.format(place)], whole[name.format(index)])
    again = tmp_path / "again"
    saved = str(tmp_path / "small-probe" / "probe.json")
    arguments = ["detach", base, "-o", str(again), "--layers", "auto:skipping:2", "--probe", saved]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_a_smaller_model_is_healed_by_training_all_of_it(world, tmp_path):
    small = tmp_path / "small"
    detach(world["model"], [0, 2, 3], output=small)
    results = run(world | {"model": str(small), "output": str(tmp_path / "run"), "method": "full", "evaluation": {}})
    assert results["model"]["num_layers"] == 3
    assert results["trials"][0]["measured"]["bpb"]["xx"] < results["base"]["bpb"]["xx"]
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert healed.config.num_hidden_layers == 3


def test_the_benchmark_of_pruning_draws_quality_over_size(world, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", ["pruning.py", world["model"], "--keep=3", f"--output={tmp_path}", "--heal=2048"])
    for language, path in world["data"]["corpora"].items():
        sys.argv += [f"--corpus={language}={path}", f"--heldout={language}={path}"]
    importlib.import_module("pruning").main()
    whole, smaller = json.loads((tmp_path / "pruning.json").read_text())["points"]
    assert whole["parameters"] > smaller["parameters"] and len(smaller["kept"]) == 3
    assert whole["bpb"].keys() == smaller["bpb"].keys() == {"xx", "en"}
    assert smaller["healed"]["xx"] < smaller["bpb"]["xx"]
    assert (tmp_path / "pruning.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "auto:2"], "needs the scores of the layers; give --corpus"),
        (["--layers", "auto:wrong:2", "--corpus", "xx=x.jsonl"], "there is no criterion 'wrong'"),
        (["--layers", "auto:parallel:2", "--corpus", "xx=x.jsonl"], "criterion parallel needs parallel text"),
        (["--layers", "0,1", "--corpus", "xx=x.jsonl"], "belong to --layers auto:K"),
        (["--layers", "auto:2", "--corpus", "xx=x.jsonl", "--probe", "probe.json"], "exclude each other"),
    ],
)
def test_what_a_smaller_model_needs(tmp_path, arguments, said):
    done = CliRunner().invoke(app, ["detach", "base", "-o", str(tmp_path / "small"), *arguments])
    assert isinstance(done.exception, EloError) and said in str(done.exception)


def test_a_run_trains_the_layers_that_a_probe_chose(world, tmp_path, capsys):
    config = world | {
        "output": str(tmp_path / "run"),
        "method": {"name": "frozen", "also_train": [], "module": "mlp"},
        "layers": "auto:gradient:2",
        "probe": {"tokens": 32, "sequence_length": 16},
        "evaluation": {},
    }
    results = run(config)
    scores = json.loads((tmp_path / "run" / "stages" / "probe-gradient.json").read_text())["record"]["scores"]
    means = scores["mlp"]["xx"]
    contestant = results["contestants"][0]
    assert contestant["layers"] == sorted(sorted(range(4), key=lambda index: -means[index])[:2])
    assert "highest gradient of the mlp" in contestant["layers_reason"]
    assert results["config"]["layers"] == "auto:gradient:2"
    assert "highest gradient of the mlp" in (tmp_path / "run" / "report.md").read_text()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, trained[name])}
    assert {int(name.split(".")[2]) for name in changed} == set(contestant["layers"])
    assert all(".mlp." in name for name in changed)
    capsys.readouterr()
    run(config)
    assert "probe-gradient: already done" in capsys.readouterr().out


def test_ranks_follow_a_probe(world, tmp_path):
    config = world | {
        "output": str(tmp_path / "run"),
        "method": {"name": "depth_lora", "profile": "probe", "rank": 4, "min_rank": 1},
        "probe": {"tokens": 32, "sequence_length": 16},
        "evaluation": {},
    }
    results = run(config)
    ranks = results["config"]["method"]["profile"]
    scores = json.loads((tmp_path / "run" / "stages" / "probe-adaptability.json").read_text())["record"]["scores"]
    means = scores["layer"]["xx"]
    assert ranks[means.index(max(means))] == 4 and ranks[means.index(min(means))] == 1


def test_contestants_share_a_probe(world, tmp_path, capsys):
    layers = {"auto": {"layers": "auto:gradient:2"}, "other": {"layers": "auto:gradient:1"}}
    results = compare(
        {
            "run": {key: value for key, value in world.items() if key != "output"}
            | {"probe": {"tokens": 32, "sequence_length": 16}, "evaluation": {}},
            "output": str(tmp_path / "compared"),
            "contestants": {name: {"method": {"name": "slam"}, "changes": each} for name, each in layers.items()},
            "budgets": [{"tokens": 128}],
            "seeds": [1],
            "learning_rates": [1e-3],
        }
    )
    two, one = (each["layers"] for each in results["contestants"])
    assert len(two) == 2 and len(one) == 1 and set(one) < set(two)
    assert all("highest gradient of the mlp" in each["layers_reason"] for each in results["contestants"])
    assert capsys.readouterr().out.count("probe-gradient: already done") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": "auto:wrong:2"}, "there is no criterion 'wrong'; choose one of"),
        ({"layers": "auto:4"}, "the model has 4 decoder layers; choose 1 to 3"),
        ({"layers": "auto:0"}, "choose 1 to 3"),
        ({"layers": "auto:parallel:2"}, "needs parallel text"),
        ({"layers": "auto:2,0"}, "or auto:K alone"),
    ],
)
def test_choices_that_cannot_be_made_are_found_before_anything_runs(world, tmp_path, changes, said):
    with pytest.raises(EloError, match=said):
        run(world | {"output": str(tmp_path / "run"), "method": {"name": "frozen"}} | changes)
    assert not (tmp_path / "run").exists()
