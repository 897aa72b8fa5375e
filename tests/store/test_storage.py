"""Object storage: the same shards and weights as from local files, whatever happens to the connection."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import make_texts, make_tokenizer, tree, write_jsonl
from run_fixtures import write_base, write_world
from storage_fixtures import BUCKET, SECRET, Proxy, storage, upload  # noqa: F401

from elo.data.prepare import prepare
from elo.data.sources import list_inputs, read_documents
from elo.detach_attach import detach, resolve_checkpoint
from elo.errors import EloError
from elo.evaluate.evaluate import evaluate
from elo.push import push
from elo.run import run
from elo.store import remote

TEXTS = make_texts(80, 1)


def shards(folder: Path) -> dict[str, bytes]:
    """Token shards alone: the manifest names the inputs' addresses."""
    return {name: data for name, data in tree(folder).items() if not name.endswith(".json")}


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", TEXTS[:30])
    write_jsonl(folder / "a.jsonl.gz", TEXTS[30:60])
    (folder / "more").mkdir()
    write_jsonl(folder / "more" / "c.jsonl", TEXTS[60:])
    (folder / "notes.md").write_text("no corpus")
    return folder


@pytest.mark.usefixtures("storage")
def test_the_same_shards_come_from_a_prefix_a_glob_and_local_files(tmp_path: Path) -> None:
    local = write_corpus(tmp_path / "ko")
    address = upload(local, "ko")
    assert list(read_documents(address)) == list(read_documents(local))
    assert list(read_documents(f"{address}/*.jsonl")) == TEXTS[:30]
    assert [file.location for file in list_inputs(f"{address}/b.jsonl")] == [f"{address}/b.jsonl"]
    tokenizer = make_tokenizer()
    for name, path in (("here", str(local)), ("there", address)):
        prepare(tokenizer, {"ko": path}, tmp_path / name, shard_tokens=300, progress=False)
    assert shards(tmp_path / "here") == shards(tmp_path / "there") != {}


def test_an_interrupted_read_goes_on_at_the_same_byte(
    tmp_path: Path,
    storage: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = random.Random(0)
    texts = ["".join(noise.choices("abcdefgh가나다라 ", k=3000)) for _ in range(200)]
    address = upload(write_jsonl(tmp_path / "big.jsonl", texts), "big.jsonl")
    monkeypatch.setattr(remote, "BLOCK", 1 << 17)
    storage.breaks = [100_000, 60_000, 10_000]
    assert list(read_documents(address)) == texts
    assert storage.breaks == []


def test_a_lost_connection_stops_prepare_and_the_same_command_resumes(
    tmp_path: Path,
    storage: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = make_texts(1500, 3)
    address = upload(write_jsonl(tmp_path / "ko.jsonl", texts), "ko.jsonl")
    monkeypatch.setattr(remote, "BLOCK", 1 << 13)
    monkeypatch.setattr(remote, "BUFFER", 1 << 12)
    monkeypatch.setattr("elo.data.corpora.BATCH_DOCUMENTS", 64)
    read, opened = remote._Object._read, []

    def breaking(self: remote._Object, size: int) -> bytes:
        opened.append(size)
        storage.refuses = len(opened) == 30  # after that the proxy drops every connection
        if storage.refuses:
            self._file = None
        return read(self, size)

    tokenizer, options = make_tokenizer(), {"shard_tokens": 4000, "heldout_share": 0.0, "progress": False}
    with monkeypatch.context() as context:
        context.setattr(remote._Object, "_read", breaking)
        with pytest.raises(EloError, match=r"ko\.jsonl: the storage cannot be reached .*it resumes"):
            context.setattr(remote, "WAITS_S", ())
            prepare(tokenizer, {"ko": address}, tmp_path / "there", on_error="skip", **options)
    storage.refuses = False
    kept = {name for name in tree(tmp_path / "there") if name.endswith(".tokens")}
    prepare(tokenizer, {"ko": address}, tmp_path / "there", **options)
    prepare(tokenizer, {"ko": str(tmp_path / "ko.jsonl")}, tmp_path / "here", **options)
    assert shards(tmp_path / "there") == shards(tmp_path / "here")
    assert kept and kept < shards(tmp_path / "here").keys()


@pytest.mark.usefixtures("storage")
def test_a_run_on_storage_ends_with_the_same_weights_and_starts_over_for_changed_objects(tmp_path: Path) -> None:
    config = write_world(tmp_path) | {"tokens": 256, "method": "full", "evaluation": {}}
    config["training"] |= {"evaluations": 0, "save_steps": 100}
    run(config)
    base, corpora = upload(tmp_path / "base", "models/base"), {}
    for language, path in config["data"]["corpora"].items():
        corpora[language] = upload(Path(path), f"{language}.jsonl")
    there = config | {
        "model": base,
        "output": str(tmp_path / "there"),
        "data": config["data"] | {"corpora": corpora},
    }
    run(there)
    weights = [(tmp_path / each / "model" / "model.safetensors").read_bytes() for each in ("run", "there")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "there" / "results.json").read_text())["model"]["name"] == base
    stage = tmp_path / "there" / "stages" / "prepared.json"
    before = stage.read_bytes()
    run(there)
    assert stage.read_bytes() == before
    with Path(config["data"]["corpora"]["en"]).open("a") as file:
        file.write('{"text": "one more document"}\n')
    upload(Path(config["data"]["corpora"]["en"]), "en.jsonl")
    run(there, until="prepare")
    assert stage.read_bytes() != before


@pytest.mark.usefixtures("storage")
def test_a_pushed_model_is_read_from_its_address_and_foreign_objects_are_kept(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    record = push(base, f"s3://{BUCKET}/out/base", say=lambda _: None)
    assert record["url"] == f"s3://{BUCKET}/out/base"
    copy = resolve_checkpoint(record["url"])
    assert tree(copy) == {name: data for name, data in tree(base).items() if not name.startswith(".")}
    push(base, record["url"], say=lambda _: None)  # completes or repeats
    assert detach(record["url"], output=tmp_path / "small")["num_base_layers"] == 4
    text = upload(write_jsonl(tmp_path / "x.jsonl", TEXTS[:5]), "out/x.jsonl")
    results = [
        evaluate(model, corpora={"ko": text}, device="cpu", progress=False) for model in (record["url"], str(base))
    ]
    assert results[0]["bpb"] == results[1]["bpb"] and results[0]["model"]["name"] == record["url"]
    with pytest.raises(EloError, match=r"s3://corpus/out: holds base/config.json, which does not belong"):
        push(base, f"s3://{BUCKET}/out", say=lambda _: None)


def test_each_problem_is_one_message_without_a_secret(
    tmp_path: Path,
    storage: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import s3fs

    for address, problem in {
        "s3://no-such-bucket/a.jsonl": "no such bucket or object; check the address",
        f"s3://{BUCKET}/none.jsonl": "no such bucket or object; check the address",
        f"s3://{BUCKET}/*.jsonl": "no such bucket or object; check the address",
        "s3://": "has no bucket",
        f"s3://me:{SECRET}@{BUCKET}/a.jsonl": "the address contains credentials; remove them",
    }.items():
        with pytest.raises(EloError, match=problem) as error:
            list_inputs(address)
        assert SECRET not in str(error.value)
    (tmp_path / "page.html").write_text("x")
    with pytest.raises(EloError, match=r"unknown file type '\.html'"):
        list_inputs(upload(tmp_path / "page.html", "page.html"))
    with pytest.raises(EloError, match="is in object storage; outputs are written to a local folder"):
        detach(write_base(tmp_path / "base"), output=f"s3://{BUCKET}/small")  # type: ignore[arg-type]
    with pytest.raises(EloError, match="remove --private"):
        push(tmp_path / "base", f"s3://{BUCKET}/out", private=True)

    storage.refuses = True
    with caplog.at_level(logging.WARNING), pytest.raises(EloError, match="the storage cannot be reached"):
        list_inputs(f"s3://{BUCKET}/a.jsonl")
    assert "retrying" in caplog.text and SECRET not in caplog.text
    storage.refuses = False

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(EloError, match=r"access denied .*set valid credentials in the environment"):
        list_inputs(f"s3://{BUCKET}/a.jsonl")


@pytest.mark.parametrize(("address", "extra"), [("s3://bucket/a.jsonl", "s3"), ("gs://bucket/a.jsonl", "gcs")])
def test_a_missing_extra_is_named(address: str, extra: str) -> None:
    code = (
        "import sys; sys.modules['s3fs'] = sys.modules['gcsfs'] = None\n"
        "from elo.data.sources import list_inputs\n"
        f"list_inputs({address!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"which is not installed; run pip install 'elo-cpt[{extra}]'" in done.stderr


def test_secrets_of_the_environment_are_removed_from_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    with pytest.raises(EloError, match=r"access denied \(token \*\*\* has expired\)"):
        remote._raise_problem(PermissionError(f"token {SECRET} has expired"), "s3://bucket/a")
