"""Random damage to everything that is read from outside: an EloError or a right result, never anything else.

Few examples here, always the same; `benchmarks/reliability.py` runs the same functions for minutes on new ones.
"""

import functools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_fixtures import SOURCE, write_base, write_documents, write_world
from safetensors.torch import load_file

from elo.checkpoint.layers import parse_layers
from elo.checkpoint.tensor_files import open_checkpoint, read_header
from elo.config import RunConfig, load_config
from elo.data.prepare import prepare
from elo.data.shards import PreparedData
from elo.data.sources import FileReader, list_inputs
from elo.detach_attach import attach, detach
from elo.errors import EloError, UnfinishedError
from elo.evaluate.cloze import read_cloze
from elo.report.files import read_results
from elo.train.checkpoints import check_checkpoint, seal_checkpoint

EXAMPLES: Counter[str] = Counter()
"""Examples tried by each function, for the benchmark."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/etc/passwd", "a\0b", "\ud800", "1e400", "9" * 5000, "<script>", "first:1", "-0"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def fuzz(count: int) -> Callable[[Any], Any]:
    """Hypothesis' settings: the same few examples each time; new ones with ELO_FUZZ set, as the benchmark does."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    same = "ELO_FUZZ" not in os.environ
    return settings(max_examples=count, deadline=None, derandomize=same, database=None, suppress_health_check=checks)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places of it replaced, removed or added to."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        here, parent, key = value, None, None
        while isinstance(here, dict | list) and here and draw(st.integers(0, 9)) < 8:
            parent = here
            key = draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
            here = here[key]
        if parent is None:
            continue
        action = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if action == "remove":
            del parent[key]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(JSON)
        else:
            parent[key] = draw(JSON)
    return value


@functools.cache
def world() -> Path:
    """A base, what was detached from it, prepared data and a sealed training checkpoint."""
    root = Path(tempfile.mkdtemp(prefix="elo-fuzz-"))
    write_base(root / "base")
    detach(root / "base", "0,-1", output=root / "detached")
    corpus = write_documents(root / "en.jsonl", SOURCE, 20, 1)
    prepare(root / "base", {"en": str(corpus)}, root / "data", heldout_share=0.2, progress=False)
    (root / "checkpoint-3").mkdir()
    (root / "checkpoint-3" / "weights").write_bytes(b"abc")
    seal_checkpoint(root / "checkpoint-3")
    (root / "work").mkdir()
    return root


@pytest.fixture(scope="module", autouse=True)
def _clean_up():
    yield
    shutil.rmtree(world())
    world.cache_clear()


@functools.cache
def good_config() -> dict[str, Any]:
    config = write_world(world() / "work")
    config["training"]["phases"] = {"layer_alignment": {"learning_rate": 1e-4}}
    config["evaluation"]["cloze"] = {"xx": "c.jsonl"}
    return config


def counted(name: str) -> None:
    EXAMPLES[name] += 1


def as_text(value: Any) -> str:
    """JSON as a damaged file has it: with NaN, infinities and halves of surrogate pairs."""
    return json.dumps(value)


@fuzz(30)
@given(st.data())
def test_config(data):
    counted("configuration")
    try:
        assert isinstance(load_config(data.draw(mutated(good_config()))), RunConfig)
    except EloError as error:
        assert str(error).startswith("configuration: ")


@fuzz(40)
@given(st.text(max_size=60) | st.recursive(SCALARS, lambda i: st.lists(i) | st.dictionaries(SCALARS, i)).map(str))
def test_config_file(text):
    counted("configuration file")
    path = world() / "work" / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(EloError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@fuzz(40)
@given(st.text(max_size=20), JSON)
def test_override(key, value):
    counted("--set")
    text = yaml.safe_dump(value, default_flow_style=True) if not isinstance(value, str) else value
    try:
        load_config(good_config(), [f"{key}={text}"])
    except EloError as error:
        assert str(error)


TERM = st.sampled_from(
    ["first:1", "last:2", "0", "-1", "0-2", "3", "first:0", "9-1", "x", "", " 1", "first:99999999999"]
)


@fuzz(60)
@given(st.lists(TERM, max_size=4).map(",".join) | st.text(max_size=12) | st.lists(st.integers()), st.integers(1, 6))
def test_layers(selection, num_layers):
    counted("layer selection")
    try:
        chosen = parse_layers(selection, num_layers)
    except EloError as error:
        assert str(error).startswith("layers: ")
    else:
        assert list(chosen) == sorted(set(chosen))
        assert 0 < len(chosen) < num_layers
        assert chosen[0] >= 0 and chosen[-1] < num_layers


LINE = st.one_of(
    st.binary(max_size=30), JSON.map(lambda v: as_text(v).encode()), JSON.map(lambda v: as_text({"text": v}).encode())
)


@fuzz(60)
@given(st.lists(LINE, max_size=5).map(b"\n".join), st.sampled_from(["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst"]))
def test_corpus_lines(content, name):
    counted("corpus file")
    path = world() / "work" / name
    path.write_bytes(content)
    (file,) = list_inputs(str(path))
    for record in FileReader(file).records():
        if record.problem is None:
            record.text.decode()
        else:
            assert record.problem.startswith(f"{path}:")


@fuzz(40)
@given(st.data())
def test_parquet(data):
    import pyarrow
    import pyarrow.parquet

    counted("parquet file")
    path = world() / "work" / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", None]}), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    for record in FileReader(list_inputs(str(path))[0]).records():
        assert record.problem is None or record.problem.startswith(f"{path}:")


@fuzz(40)
@given(st.data())
def test_cloze_items(data):
    counted("cloze items")
    item = {"prompt": "p", "choices": ["a", "b"], "answer": 1, "group": "g"}
    path = world() / "work" / "c.jsonl"
    path.write_text("\n".join(as_text(data.draw(mutated(item))) for _ in range(2)))
    try:
        assert read_cloze(path)
    except EloError as error:
        assert str(path) in str(error)


@fuzz(40)
@given(st.data())
def test_shard_manifest(data):
    counted("shard manifest")
    folder = world() / "data"
    path = folder / "manifest.json"
    good = path.read_text()
    try:
        path.write_text(as_text(data.draw(mutated(json.loads(good)))))
        prepared = PreparedData.open(folder)
        for shard in prepared.shards_by_name.values():
            assert folder in (shard.stem or folder).resolve().parents
        prepared.summary()
        for language in prepared.languages:
            for corpus in (*prepared.train(language), prepared.heldout(language)):
                if corpus.num_documents:
                    corpus.document(0)
    except EloError as error:
        assert str(folder) in str(error)
    finally:
        path.write_text(good)


@fuzz(60)
@given(st.data())
def test_safetensors_header(data):
    counted("safetensors header")
    good = (world() / "detached" / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    path = world() / "work" / "model.safetensors"
    if data.draw(st.booleans()):
        text = as_text(data.draw(mutated(json.loads(good[8 : 8 + size])))).encode()
        content = len(text).to_bytes(8, "little") + text + good[8 + size :]
    else:
        damaged = bytearray(good)
        for _ in range(data.draw(st.integers(1, 5))):
            damaged[data.draw(st.integers(0, size + 7))] = data.draw(st.integers(0, 255))
        content = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except UnfinishedError as error:
        assert str(path) in str(error)
    else:
        assert sum(tensor.size for tensor in tensors) <= len(content)
        for tensor in tensors:
            assert len(tensor.read()) == tensor.size


@fuzz(40)
@given(st.data())
def test_weight_map(data):
    counted("weight map")
    folder = world() / "work" / "indexed"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(world() / "base" / "model.safetensors", folder / "model-1.safetensors")
    good = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(as_text(data.draw(mutated(good))))
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            assert tensor.file.parent == folder
    except EloError as error:
        assert str(folder) in str(error)


@fuzz(15)
@given(st.data())
def test_detach_record(data):
    counted("detach record")
    folder = world() / "work" / "detached"
    out = world() / "work" / "attached"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(world() / "detached", folder)
    config = json.loads((folder / "config.json").read_text())
    config["elo_detached"] = data.draw(mutated(config["elo_detached"]))
    (folder / "config.json").write_text(as_text(config))
    try:
        attach(folder, world() / "base", output=out)
    except EloError as error:
        assert str(error)
        assert not out.exists()
    else:  # what was changed did not matter: the untrained layers are back where they were
        ours, theirs = load_file(out / "model.safetensors"), load_file(world() / "base" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


@fuzz(15)
@given(st.data())
def test_model_config(data):
    counted("model config.json")
    folder = world() / "work" / "model"
    out = world() / "work" / "small"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(world() / "base", folder)
    good = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(as_text(data.draw(mutated(good))))
    try:
        detach(folder, "0,-1", output=out)
    except EloError as error:
        assert str(error)
        assert not out.exists()


RESULTS = {
    "schema_version": 2,
    "kind": "run",
    "model": {"name": "m"},
    "languages": {"targets": ["xx"], "sources": ["en"]},
    "base": {"bpb": {"xx": 1.0}, "document_nats": {"xx": [1.0, 2.0]}, "document_bytes": {"xx": [2, 3]}},
    "contestants": [{"name": "elo", "method": "elo", "layers": [0, 3]}],
    "budgets": [{"name": "b", "kind": "tokens", "value": 1}],
    "trials": [
        {
            "contestant": "elo",
            "budget": "b",
            "seed": 1,
            "measured": {"bpb": {"xx": 1.0}, "measures": [{"measure": "cloze", "language": "xx", "value": 0.5}]},
            "stages": [{"name": "elo", "seconds": 1.0, "tokens": 1}],
        }
    ],
}


@fuzz(40)
@given(st.data())
def test_results(data):
    counted("results.json")
    path = world() / "work" / "results.json"
    path.write_text(as_text(data.draw(mutated(RESULTS))))
    try:
        read_results(path)
    except EloError as error:
        assert str(path) in str(error)


@fuzz(40)
@given(st.data())
def test_training_checkpoint(data):
    counted("training checkpoint manifest")
    folder = world() / "checkpoint-3"
    path = folder / "elo_checkpoint.json"
    good = path.read_text()
    try:
        path.write_text(as_text(data.draw(mutated(json.loads(good)))))
        check_checkpoint(folder)
    except UnfinishedError as error:
        assert str(folder) in str(error)
    finally:
        path.write_text(good)
