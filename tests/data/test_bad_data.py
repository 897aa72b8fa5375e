"""Corpora, cloze items, prepared data, results and run folders that are wrong or damaged: refused in one sentence."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from bad_input_fixtures import assert_refused, change, copy_of, run_elo, write_config
from run_fixtures import SOURCE, write_base, write_documents, write_world

from elo.data.prepare import prepare
from elo.data.shards import PreparedData
from elo.errors import EloError, UnfinishedError
from elo.report.write import report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_world(root)


GOOD = b'{"text": "good words here"}\n'


def parquet(columns: dict[str, list[Any]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


# File name, content (or what writes it), words. The corpus of the target language is this file alone.
CORPORA: dict[str, tuple[str, bytes | Callable[[Path], None], tuple[str, ...]]] = {
    "empty": ("a.jsonl", b"", ("a.jsonl:1", "the file is empty")),
    "blank lines": ("a.jsonl", b"\n\n  \n", ("a.jsonl:1", "no document")),
    "empty texts": ("a.jsonl", b'{"text": ""}\n' * 3, ("a.jsonl", "no document with text")),
    "white texts": ("a.jsonl", b'{"text": " \\n\\t"}\n' * 3, ("a.jsonl", "no document with text")),
    "one document": ("a.jsonl", GOOD, ("a.jsonl", "only one document")),
    "copies of one document": ("a.jsonl", GOOD * 9, ("a.jsonl", "only one document")),
    "not JSON": ("a.jsonl", GOOD + b"hello\n", ("a.jsonl:2", "not valid JSON", "hello")),
    "cut line": ("a.jsonl", GOOD + b'{"text": "ab', ("a.jsonl:2", "not valid JSON")),
    "single quotes": ("a.jsonl", b"{'text': 'a'}\n", ("a.jsonl:1", "not valid JSON")),
    "array": ("a.jsonl", b'["a"]\n', ("a.jsonl:1", "a JSON array")),
    "whole array": ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]\n', ("a.jsonl:1", "not valid JSON")),
    "string": ("a.jsonl", b'"a"\n', ("a.jsonl:1", "a JSON string")),
    "number": ("a.jsonl", b"7\n", ("a.jsonl:1", "a JSON number")),
    "null": ("a.jsonl", b"null\n", ("a.jsonl:1", "a JSON null")),
    "other column": ("a.jsonl", b'{"content": "a", "id": 1}\n', ("a.jsonl:1", "no column 'text'", "'content', 'id'")),
    "no column": ("a.jsonl", b"{}\n", ("a.jsonl:1", "the columns are none")),
    "text null": ("a.jsonl", b'{"text": null}\n', ("a.jsonl:1", "null, not text")),
    "text number": ("a.jsonl", b'{"text": 5}\n', ("a.jsonl:1", "number, not text")),
    "text list": ("a.jsonl", b'{"text": ["a", "b"]}\n', ("a.jsonl:1", "array, not text")),
    "text object": ("a.jsonl", b'{"text": {"a": 1}}\n', ("a.jsonl:1", "object, not text")),
    "text true": ("a.jsonl", b'{"text": true}\n', ("a.jsonl:1", "boolean, not text")),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', ("a.jsonl:1", "surrogate")),
    "latin-1": ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), ("a.jsonl:1", "not UTF-8", "0xe9")),
    "utf-16": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ("a.jsonl:1", "not UTF-8")),
    "null bytes": ("a.jsonl", b"\0" * 100, ("a.jsonl:1", "not valid JSON")),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", ("a.jsonl:1", "not valid JSON")),
    "digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ("a.jsonl:1",)),
    "terminal escapes": ("a.jsonl", b"\x1b[2J\x1b[31mhacked\n", ("a.jsonl:1", "\\x1b")),
    "gzip is none": ("a.jsonl.gz", GOOD, ("a.jsonl.gz:1", "not compressed with gzip")),
    "gzip cut": ("a.jsonl.gz", gzip.compress(GOOD * 999)[:40], ("a.jsonl.gz", "damaged from here on")),
    "gzip altered": (
        "a.jsonl.gz",
        (lambda data: data[:-6] + b"xx" + data[-4:])(gzip.compress(GOOD + GOOD)),
        ("a.jsonl.gz", "damaged from here on"),
    ),
    "zstd is none": ("a.jsonl.zst", GOOD, ("a.jsonl.zst:1", "not compressed with Zstandard")),
    "zstd cut": ("a.jsonl.zst", zstandard.compress(GOOD * 999)[:-5], ("a.jsonl.zst", "damaged")),
    "parquet is none": ("a.parquet", GOOD * 20, ("a.parquet:1", "not a parquet file")),
    "parquet cut": ("a.parquet", b"PAR1" + b"\0" * 60, ("a.parquet:1", "damaged from here on")),
    "parquet other column": ("a.parquet", parquet({"body": ["a"]}), ("a.parquet:1", "no column 'text'", "'body'")),
    "parquet numbers": ("a.parquet", parquet({"text": [1, 2]}), ("a.parquet:1", "number, not text")),
    "parquet null": ("a.parquet", parquet({"text": ["a", None]}), ("a.parquet:2", "null, not text")),
    "parquet no rows": ("a.parquet", parquet({"text": []}), ("a.parquet:1",)),
    "text latin-1": ("a.txt", "caf\xe9 au lait\n".encode("latin-1"), ("a.txt:1", "not UTF-8", "0xe9")),
    "text binary": ("a.txt", bytes(range(128, 256)) * 9, ("a.txt:1", "not UTF-8")),
    "text blank": ("a.txt", b"\n \n", ("a.txt",)),
    "csv": ("a.csv", b"text\na\n", ("a.csv", "unknown file type '.csv'")),
    "json": ("a.json", b"[]", ("a.json", "unknown file type", ".jsonl")),
    "zip": ("a.zip", b"PK\3\4", ("a.zip", "unknown file type")),
    "no suffix": ("corpus", b"a", ("corpus", "unknown file type")),
    "pickle": ("a.pkl", b"\x80\x04.", ("a.pkl", "unknown file type")),
    "upper case": ("A.JSONL", GOOD, ("A.JSONL", "unknown file type")),
    "too little text": ("a.jsonl", GOOD + b'{"text": "another"}\n', ("tokens: the budget", "less than one update")),
}


@pytest.mark.parametrize("fault", CORPORA)
def test_corpus(fault, world, tmp_path, capsys):
    root, config = world
    name, content, words = CORPORA[fault]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    tokens = ... if fault == "too little text" else 1280
    changed = change(config, output=str(tmp_path / "run"), data__corpora__xx=str(path), tokens=tokens)
    command = ["run", write_config(tmp_path, changed)]
    if fault == "too little text":  # which is known once the corpora are tokenised: those stay
        status, said = run_elo(command, capsys)
        assert status == 2
        assert all(word in said for word in words), said
    else:
        assert_refused(command, words, (root, tmp_path), capsys)


CLOZE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("holds no cloze items",)),
    "blank": (b"\n\n", ("holds no cloze items",)),
    "not JSON": (b"prompt,choices\n", ("c.jsonl:1", "not JSON")),
    "not UTF-8": (b'{"prompt": "\xff"}', ("not UTF-8",)),
    "array": (b"[1]", ("c.jsonl:1", "expected an object", "list")),
    "no prompt": (b'{"choices": ["a", "b"], "answer": 0}', ('"prompt" must be a string', "None")),
    "prompt number": (b'{"prompt": 1, "choices": ["a", "b"], "answer": 0}', ('"prompt" must be a string', "got 1")),
    "no choices": (b'{"prompt": "p", "answer": 0}', ('"choices" must be a list',)),
    "choices text": (b'{"prompt": "p", "choices": "ab", "answer": 0}', ('"choices" must be a list',)),
    "choice empty": (b'{"prompt": "p", "choices": ["a", ""], "answer": 0}', ("non-empty strings",)),
    "choice number": (b'{"prompt": "p", "choices": ["a", 1], "answer": 0}', ("non-empty strings",)),
    "choice alone": (b'{"prompt": "p", "choices": ["a"], "answer": 0}', ("at least two",)),
    "choices equal": (b'{"prompt": "p", "choices": ["a", "a"], "answer": 0}', ("all different",)),
    "no answer": (b'{"prompt": "p", "choices": ["a", "b"]}', ('"answer" must be the index',)),
    "answer text": (b'{"prompt": "p", "choices": ["a", "b"], "answer": "a"}', ('"answer" must be the index', "'a'")),
    "answer true": (b'{"prompt": "p", "choices": ["a", "b"], "answer": true}', ('"answer" must be', "True")),
    "answer beyond": (b'{"prompt": "p", "choices": ["a", "b"], "answer": 2}', ("0 to 1", "got 2")),
    "answer negative": (b'{"prompt": "p", "choices": ["a", "b"], "answer": -1}', ("got -1",)),
    "group number": (b'{"prompt": "p", "choices": ["a", "b"], "answer": 0, "group": 3}', ('"group"', "got 3")),
    "second line": (b'{"prompt": "p", "choices": ["a", "b"], "answer": 0}\n{}', ("c.jsonl:2",)),
    "deep": (b"[" * 100_000, ("c.jsonl:1", "not JSON")),
    "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", ("c.jsonl:1", "not JSON")),
}


@pytest.mark.parametrize("fault", CLOZE)
def test_cloze(fault, world, tmp_path, capsys):
    root, config = world
    content, words = CLOZE[fault]
    (tmp_path / "c.jsonl").write_bytes(content)
    changed = change(config, output=str(tmp_path / "run"), evaluation__cloze={"xx": str(tmp_path / "c.jsonl")})
    assert_refused(["run", write_config(tmp_path, changed)], ("c.jsonl", *words), (root, tmp_path), capsys)


TOKENIZERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ("has no tokenizer",)),
    "not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), ("tokenizer",)),
    "empty object": (lambda f: (f / "tokenizer.json").write_text("{}"), ("tokenizer",)),
    "cut": (lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:900]), ("tokenizer",)),
    "a list": (lambda f: (f / "tokenizer.json").write_text("[]"), ("tokenizer",)),
    "config not JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), ("tokenizer",)),
    "no eos": (
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("neither a bos nor an eos",),
    ),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_tokenizer(fault, world, tmp_path, capsys):
    root, config = world
    damage, words = TOKENIZERS[fault]
    damage(copy_of(root / "base", tmp_path / "tokenizer"))
    changed = change(config, output=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"))
    assert_refused(["run", write_config(tmp_path, changed)], words, (root, tmp_path), capsys)


def test_tokenizer_of_another_model(world, tmp_path, capsys):
    root, config = world
    base = write_base(tmp_path / "base", vocab_size=100)
    changed = change(config, output=str(tmp_path / "run"), model=str(base), tokenizer=str(root / "base"))
    words = ("100 embedding rows", "give the tokenizer that belongs to the model")
    assert_refused(["run", write_config(tmp_path, changed)], words, (root, tmp_path), capsys)


# Results that a report cannot be made of.
def minimal() -> dict[str, Any]:
    trial = {"contestant": "elo", "budget": "b", "seed": 1, "measured": {"bpb": {"xx": 1.0, "en": 1.0}}}
    return {
        "schema_version": 2,
        "kind": "run",
        "model": {"name": "m"},
        "languages": {"targets": ["xx"], "sources": ["en"]},
        "base": {"bpb": {"xx": 1.0, "en": 1.0}},
        "contestants": [{"name": "elo", "method": "elo"}],
        "budgets": [{"name": "b", "kind": "tokens", "value": 1}],
        "trials": [{**trial, "stages": [{"name": "elo", "seconds": 1.0, "tokens": 1}]}],
    }


RESULTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty file": ("", ("not JSON",)),
    "cut": ('{"schema_version": 2, "mod', ("not JSON",)),
    "a list": ([], ("results",)),
    "null": (None, ("results",)),
    "nothing": ({}, ("schema_version", "more")),
    "version text": ({**minimal(), "schema_version": "one"}, ("schema_version", "'one'")),
    "of the future": ({**minimal(), "schema_version": 3}, ("schema version 3 is newer", "update elo")),
    "of the past": ({"schema": 1, "methods": []}, ("schema version 1", "earlier version")),
    "an evaluation": ({"kind": "evaluation"}, ("evaluation of one model",)),
    "no model": ({k: v for k, v in minimal().items() if k != "model"}, ("model",)),
    "no languages": ({k: v for k, v in minimal().items() if k != "languages"}, ("languages",)),
    "no contestants": ({**minimal(), "contestants": []}, ("contestants",)),
    "contestants text": ({**minimal(), "contestants": "elo"}, ("contestants", "'elo'")),
    "contestant twice": ({**minimal(), "contestants": minimal()["contestants"] * 2}, ("must differ",)),
    "contestant nameless": ({**minimal(), "contestants": [{"method": "elo"}]}, ("contestants.0.name",)),
    "seed text": ({**minimal(), "trials": [{**minimal()["trials"][0], "seed": "x"}]}, ("trials.0.seed", "'x'")),
    "seconds text": (
        {**minimal(), "trials": [{**minimal()["trials"][0], "stages": [{"name": "elo", "seconds": "long"}]}]},
        ("stages.0.seconds", "'long'"),
    ),
    "bpb negative": ({**minimal(), "base": {"bpb": {"xx": -1}}}, ("base.bpb.xx", "-1")),
    "bpb infinite": (json.dumps({**minimal(), "base": {"bpb": {"xx": float("inf")}}}), ("base.bpb.xx",)),
    "deep": ("[" * 100_000, ("not JSON",)),
}


@pytest.mark.parametrize("fault", RESULTS)
def test_results(fault, tmp_path, capsys):
    value, words = RESULTS[fault]
    path = tmp_path / "results.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    assert_refused(["report", path, "-o", tmp_path / "out"], ("results.json", *words), (tmp_path,), capsys)


def test_report_escapes_what_it_shows(tmp_path):
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    value = minimal() | {"title": evil, "command": evil, "config": {evil: evil}, "hardware": {evil: evil}}
    value["model"]["name"] = evil
    value["base"]["samples"] = [{"language": "xx", "prompt": evil, "text": evil}]
    value["contestants"][0]["label"] = evil
    value["trials"][0]["measured"]["samples"] = value["base"]["samples"]
    page = report(value, tmp_path).read_text()
    assert "<script>" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    write_base(root / "base")
    corpus = write_documents(root / "en.jsonl", SOURCE, 40, 1)
    prepare(root / "base", {"en": str(corpus)}, root / "data", heldout_share=0.1, progress=False)
    return root / "data"


def manifest(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        value = json.loads(path.read_text())
        edited = edit(value)
        path.write_text(edited if isinstance(edited, str) else json.dumps(value))

    return damage


def shard(key: str, value: Any) -> Callable[[Path], None]:
    return manifest(lambda m: m["languages"]["en"]["train"][0]["shards"][0].update({key: value}))


def flip(folder: Path, suffix: str) -> None:
    path = min(folder.rglob(f"*.{suffix}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


PREPARED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ("is unfinished",)),
    "manifest cut": (manifest(lambda m: json.dumps(m)[:99]), ("not JSON",)),
    "manifest a list": (manifest(lambda m: "[]"), ("manifest of prepared data is damaged",)),
    "manifest null": (manifest(lambda m: "null"), ("manifest of prepared data is damaged",)),
    "manifest empty": (manifest(lambda m: "{}"), ("manifest of prepared data is damaged", "schema")),
    "schema other": (manifest(lambda m: m.update(schema=9)), ("format 9",)),
    "dtype other": (manifest(lambda m: m.update(dtype="<f4")), ("dtype '<f4'",)),
    "dtype object": (manifest(lambda m: m.update(dtype="O")), ("dtype 'O'",)),
    "dtype a list": (manifest(lambda m: m.update(dtype=["<u2"])), ("manifest of prepared data is damaged",)),
    "languages a list": (manifest(lambda m: m.update(languages=[])), ("manifest of prepared data is damaged",)),
    "language null": (manifest(lambda m: m["languages"].update(en=None)), ("manifest of prepared data is damaged",)),
    "no split": (
        manifest(lambda m: m["languages"]["en"].pop("heldout")),
        ("manifest of prepared data is damaged", "heldout"),
    ),
    "tokenizer gone": (manifest(lambda m: m.pop("tokenizer")), ("manifest of prepared data is damaged", "tokenizer")),
    "vocabulary text": (manifest(lambda m: m["tokenizer"].update(vocab_size="330")), ("vocab_size '330'",)),
    "shards null": (
        manifest(lambda m: m["languages"]["en"]["train"][0].update(shards=None)),
        ("manifest of prepared data is damaged",),
    ),
    "weight text": (manifest(lambda m: m["languages"]["en"]["train"][0].update(weight="2")), ("weight",)),
    "name escapes": (shard("name", "../../../etc/passwd"), ("shard name",)),
    "name absolute": (shard("name", "/etc/passwd"), ("shard name",)),
    "name escapes within": (shard("name", "en/train/0/../../../../x/00000-00000"), ("shard name",)),
    "name with a newline": (shard("name", "en/train/0/00000-00000\n"), ("shard name",)),
    "name number": (shard("name", 3), ("manifest of prepared data is damaged",)),
    "documents negative": (shard("documents", -1), ("documents -1",)),
    "documents true": (shard("documents", True), ("documents True",)),
    "documents other": (shard("documents", 3), ("bytes, expected",)),
    "tokens text": (shard("tokens", "9"), ("tokens '9'",)),
    "tokens other": (shard("tokens", 10**12), ("bytes, expected",)),
    "sums gone": (shard("sha256", {}), ("manifest of prepared data is damaged",)),
    "sums null": (shard("sha256", None), ("manifest of prepared data is damaged",)),
    "sums wrong": (
        shard("sha256", dict.fromkeys(("tokens", "offsets", "bytes"), "0" * 64)),
        (".tokens", "its checksum differs"),
    ),
    "tokens gone": (lambda f: min(f.rglob("*.tokens")).unlink(), (".tokens", "missing")),
    "tokens cut": (lambda f: min(f.rglob("*.tokens")).write_bytes(b"12"), (".tokens", "has 2 bytes")),
    "tokens altered": (lambda f: [flip(f / "en/train", "tokens")], (".tokens", "checksum")),
    "offsets gone": (lambda f: min(f.rglob("*.offsets")).unlink(), (".offsets", "missing")),
    "offsets altered": (lambda f: [flip(f / "en/train", "offsets")], (".offsets", "checksum")),
    "lengths altered": (lambda f: [flip(f / "en/train", "bytes")], (".bytes", "checksum")),
    "lengths empty": (lambda f: min(f.rglob("*.bytes")).write_bytes(b""), (".bytes", "has 0 bytes")),
}


@pytest.mark.parametrize("fault", PREPARED)
def test_prepared_data(fault, prepared, tmp_path):
    damage, words = PREPARED[fault]
    folder = copy_of(prepared, tmp_path / "data")
    damage(folder)
    with pytest.raises(UnfinishedError) as caught:
        for corpus in PreparedData.open(folder).train("en"):
            corpus.document(0)
    assert str(folder) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_is_not_prepared_data(prepared, tmp_path):
    with pytest.raises(EloError, match="no such folder"):
        PreparedData.open(tmp_path / "none")
    with pytest.raises(EloError, match="no language 'xx', only en"):
        PreparedData.open(prepared).train("xx")


def test_heldout_text_that_is_also_trained_on_is_counted(world, tmp_path, capsys):
    root, config = world
    lines = (root / "xx.jsonl").read_text().splitlines(keepends=True)
    fresh = write_documents(tmp_path / "fresh.jsonl", SOURCE, 5, 99).read_text()
    (tmp_path / "held.jsonl").write_text("".join(lines[:7]) + fresh)
    heldout = {"xx": str(tmp_path / "held.jsonl")}
    path = write_config(tmp_path, change(config, output=str(tmp_path / "run"), data__heldout=heldout))
    status, said = run_elo(["prepare", path], capsys)
    assert status == 0
    assert "warning: xx: 7 training documents are also in held-out text" in said
