"""`elo vocab` from the command line to a run: measured, extended, trained, attached; mistakes told in a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_input_fixtures import run_elo, unchanged, write_config
from run_fixtures import SOURCE, TARGET, write_documents, write_world
from safetensors.torch import save_file
from surgery_fixtures import edit_config, stored
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from vocabulary_fixtures import tokenizer_of

from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.report.files import read_results
from elo.run import run
from elo.vocab.vocabulary import extend_vocabulary, measure_vocabulary


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocab")
    config = write_world(root)
    extend_vocabulary(
        root / "base", root / "xx.jsonl", root / "en.jsonl", output=root / "extended", pieces=40, pad_to_multiple_of=16
    )
    return root, config


def test_measured_before_anything_is_written(world, tmp_path):
    root, _ = world
    corpora = {"xx": root / "xx.jsonl", "en": root / "en.jsonl"}
    with unchanged(root):
        measured = measure_vocabulary(
            root / "base", corpora, target="xx", pieces=[10, 40], output=tmp_path / "measured.json"
        )
    assert json.loads((tmp_path / "measured.json").read_text()) == measured
    small, large = measured["candidates"]
    assert (small["pieces"], large["pieces"]) == (10, 40)
    assert measured["languages"]["xx"]["bytes_per_token"] < small["bytes_per_token"] < large["bytes_per_token"]
    assert large["source"]["en"]["identical"] == large["source"]["en"]["documents"] == 3
    assert large["tokens"] == pytest.approx(measured["languages"]["xx"]["bytes_per_token"] / large["bytes_per_token"])
    assert large["new_parameters"] == 40 * 16 * 2
    assert measured["advice"].startswith(("worth it", "not worth it"))


def test_several_target_and_source_languages(world, tmp_path):
    root, _ = world
    yy = write_documents(root / "yy.jsonl", [word[::-1] + word[0] for word in TARGET], 60, 5)
    de = write_documents(root / "de.jsonl", [word[::-1] for word in SOURCE], 30, 6)
    corpora = {"xx": root / "xx.jsonl", "yy": yy, "en": root / "en.jsonl", "de": de}
    measured = measure_vocabulary(root / "base", corpora, target=["xx", "yy"], pieces=[60])
    (candidate,) = measured["candidates"]
    now = {language: measured["languages"][language]["tokens"] for language in ("xx", "yy")}
    assert all(0 < share < 1 for share in candidate["target"].values())
    together = sum(candidate["target"][language] * count for language, count in now.items())
    assert candidate["tokens"] == pytest.approx(together / sum(now.values()))
    assert [found["holds"] for found in candidate["source"].values()] == [True, True]
    assert "xx and yy need " in measured["advice"]

    targets, sources = [corpora["xx"], corpora["yy"]], [corpora["en"], corpora["de"]]
    record = extend_vocabulary(root / "base", targets, sources, output=tmp_path / "both", pieces=60)
    assert record["source_identity"]["documents"] == 6 and record["source_identity"]["holds"]
    alone = extend_vocabulary(root / "base", targets[0], sources, output=tmp_path / "one", pieces=60)
    old, both, one = (
        AutoTokenizer.from_pretrained(each) for each in (root / "base", tmp_path / "both", tmp_path / "one")
    )
    text = yy.read_text().splitlines()[0]
    assert len(both(text)["input_ids"]) < len(one(text)["input_ids"]) <= len(old(text)["input_ids"])
    assert record["target_bytes_per_token"] != alone["target_bytes_per_token"]


def test_an_extended_checkpoint_is_an_ordinary_one(world):
    root, _ = world
    model = AutoModelForCausalLM.from_pretrained(root / "extended")
    tokenizer = AutoTokenizer.from_pretrained(root / "extended")
    old = AutoTokenizer.from_pretrained(root / "base")
    text = " ".join(TARGET)
    assert len(tokenizer(text)["input_ids"]) < len(old(text)["input_ids"])
    assert tokenizer(" ".join(SOURCE))["input_ids"] == old(" ".join(SOURCE))["input_ids"]
    assert model.config.vocab_size % 16 == 0
    assert max(tokenizer(text)["input_ids"]) < model.config.vocab_size
    record = getattr(model.config, VOCABULARY_KEY)
    assert record["rows"]["stop"] - record["rows"]["start"] == 40
    assert record["source_identity"]["holds"]


def test_a_run_that_trains_new_rows_leaves_the_others_alone(world, tmp_path):
    root, config = world
    config = {
        **config,
        "model": str(root / "extended"),
        "output": str(tmp_path / "run"),
        "method": {"name": "elo", "embedding_rows": "new", "alignment": "none"},
    }
    config["training"] = {**config["training"], "embedding_learning_rate": 5e-3, "weight_decay": 0.1}
    results = run(config)
    base, final = stored(root / "extended"), stored(tmp_path / "run" / "model")
    start = json.loads((root / "extended" / "config.json").read_text())[VOCABULARY_KEY]["rows"]["start"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(base[name][:start], final[name][:start]), name
        assert not torch.equal(base[name][start:], final[name][start:]), name
    for name in base:
        if ".layers.1." in name or ".layers.2." in name:
            assert torch.equal(base[name], final[name]), name
    assert results["model"]["vocabulary"]["source_identity"]["holds"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "extended by 40 tokens" in report
    assert "characters/s before" in report
    assert "Bytes per token" in report
    assert read_results(tmp_path / "run").model.vocabulary.rows.start == start
    assert (
        json.loads((tmp_path / "run" / "model" / "config.json").read_text())[VOCABULARY_KEY]["rows"]["start"] == start
    )


def test_a_tokenizer_of_the_users_own(world, tmp_path):
    root, _ = world
    record = extend_vocabulary(root / "base", tokenizer=root / "extended", output=tmp_path / "new")
    assert record["rows"]["stop"] - record["rows"]["start"] == 40
    assert "source_identity" not in record
    ours, theirs = stored(tmp_path / "new"), stored(root / "extended")
    start = record["rows"]["start"]
    assert torch.equal(ours["lm_head.weight"][: start + 40], theirs["lm_head.weight"][: start + 40])


def test_rows_from_a_file(world, tmp_path):
    root, _ = world
    given = {"embedding": torch.randn(40, 16), "head": torch.randn(40, 16)}
    save_file(given, tmp_path / "rows.safetensors")
    arguments = {"tokenizer": root / "extended", "rows": tmp_path / "rows.safetensors"}
    record = extend_vocabulary(root / "base", **arguments, output=tmp_path / "new")
    start = record["rows"]["start"]
    found = stored(tmp_path / "new")["lm_head.weight"][start : start + 40]
    assert torch.equal(found, given["head"].to(torch.bfloat16))


def test_command_line(world, tmp_path, capsys):
    root, _ = world
    texts = ["--corpus", f"xx={root / 'xx.jsonl'}", "--corpus", f"en={root / 'en.jsonl'}"]
    assert run_elo(["vocab", "measure", root / "base", *texts, "--target", "xx", "--pieces", "20"], capsys)[0] == 0
    extend = ["vocab", "extend", root / "base", "--target", root / "xx.jsonl", "--source", root / "en.jsonl"]
    assert run_elo([*extend, "--pieces", "20", "-o", tmp_path / "new"], capsys) == (0, "")
    status, said = run_elo([*extend, "-o", tmp_path / "new"], capsys)
    assert status == 2
    assert "exists" in said
    assert run_elo([*extend, "--pieces", "20", "-o", tmp_path / "new", "--overwrite"], capsys)[0] == 0


def _unigram(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(TARGET, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


MISTAKES = {
    "no corpus": ("measure {base} --corpus xx=", "LANGUAGE=FILE"),
    "target without a corpus": ("measure {base} --corpus xx={xx} --target ko", "'ko': has no corpus"),
    "pieces no number": ("measure {base} --corpus xx={xx} --target xx --pieces many", "not integers"),
    "pieces zero": ("measure {base} --corpus xx={xx} --target xx --pieces 0", "each from 1 to 10,000,000"),
    "measure no model": ("measure {root}/none --corpus xx={xx}", "{root}/none"),
    "measure no file": ("measure {base} --corpus xx={root}/none.jsonl", "none.jsonl: no such file"),
    "no text": ("extend {base} -o {new}", "--target FILE"),
    "no source": ("extend {base} --target {xx} -o {new}", "--source FILE"),
    "negative pieces": (
        "extend {base} --target {xx} --source {en} --pieces -3 -o {new}",
        "from 1 to 10,000,000; got -3",
    ),
    "unknown init": ("extend {base} --tokenizer {extended} --init zeros -o {new}", "pieces, first, mean, noise"),
    "unknown head init": ("extend {base} --tokenizer {extended} --head-init x -o {new}", "--head-init 'x'"),
    "output is the base": ("extend {base} --tokenizer {extended} -o {base}/new", "overlaps the input"),
    "another tokenizer": ("extend {base} --tokenizer {other} -o {new}", "keeps all old ids"),
    "own tokenizer": ("extend {base} --tokenizer {base} -o {new}", "at least one"),
    "no rows": ("extend {base} --tokenizer {extended} --rows {root}/none -o {new}", "no such file"),
    "rows no safetensors": ("extend {base} --tokenizer {extended} --rows {xx} -o {new}", "not a safetensors"),
    "rows too few": ("extend {base} --tokenizer {extended} --rows {few} -o {new}", "rows: "),
    "unigram": ("extend {unigram} --target {xx} --source {en} -o {new}", "Unigram"),
    "one document": ("extend {base} --target {one} --source {en} -o {new}", "fewer than two documents"),
    "nothing new": ("extend {base} --target {en} --source {en} -o {new}", "no new piece"),
    "overwriting something else": (
        "extend {base} --tokenizer {extended} -o {root}/folder --overwrite",
        "is not a checkpoint",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_and_leave_nothing_behind(world, tmp_path, capsys, mistake):
    root, _ = world
    arguments, said = MISTAKES[mistake]
    places = {name: tmp_path / name for name in ("other", "unigram", "few", "one", "folder")}
    tokenizer_of("qwen").save_pretrained(places["other"])
    shutil.copytree(root / "base", places["unigram"])
    _unigram(places["unigram"])
    save_file({"embedding": torch.zeros(2, 16), "head": torch.zeros(2, 16)}, places["few"])
    write_documents(tmp_path / "one", TARGET, 1, 1)
    (tmp_path / "one").rename(tmp_path / "one.jsonl")
    places["one"] = tmp_path / "one.jsonl"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    names = {
        "root": tmp_path,
        "base": root / "base",
        "extended": root / "extended",
        "xx": root / "xx.jsonl",
        "en": root / "en.jsonl",
        "new": tmp_path / "new",
        **places,
    }
    with unchanged(root, tmp_path):
        status, error = run_elo(["vocab", *(each.format(**names) for each in arguments.split())], capsys)
    assert status == 2
    assert said.format(**names) in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("record", "said"), [(None, "no record of new rows"), ({"rows": 3}, "record is damaged or does not fit")]
)
def test_a_run_that_wants_new_rows_needs_them(world, tmp_path, capsys, record, said):
    root, config = world
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    if record:
        edit_config(base, **{VOCABULARY_KEY: record})
    config = {
        **config,
        "model": str(base),
        "output": str(tmp_path / "run"),
        "method": {"name": "elo", "embedding_rows": "new"},
    }
    path = write_config(tmp_path, config)
    with unchanged(root):
        status, error = run_elo(["run", path], capsys)
    assert status == 2
    assert said in error
    assert not (tmp_path / "run").exists()
