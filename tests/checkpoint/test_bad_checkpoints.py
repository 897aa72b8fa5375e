"""Checkpoints, detach records and surgery options that are wrong: refused in one sentence, nothing made or changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input_fixtures import assert_refused, copy_of
from run_fixtures import write_base
from safetensors.torch import load_file, save_file

from elo.detach_attach import detach

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_base(root / "base")
    detach(root / "base", "0,-1", output=root / "detached")
    return root


def config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def record(folder: Path, **changes: Any) -> None:
    """Set keys of the detach record; ... removes one."""
    value = json.loads((folder / "config.json").read_text())["elo_detached"] | changes
    config(folder, elo_detached={key: item for key, item in value.items() if item is not ...})


def header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of the weights; `edit` changes it in place or returns other JSON text."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    value = json.loads(data[8 : 8 + size])
    edited = edit(value)
    text = edited if isinstance(edited, bytes) else json.dumps(value).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: header(folder, lambda value: value[name].update(changes))


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def only(folder: Path, *names: str) -> None:
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")


def index(folder: Path, value: Any) -> None:
    """An index instead of the single file, which is not read where there is a single file."""
    if (folder / WEIGHTS).exists():
        (folder / WEIGHTS).rename(folder / SHARD)
    (folder / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))


def mapped(folder: Path, target: Any) -> None:
    """An index that places every tensor in the one file, but the norm in `target`."""
    names = dict.fromkeys(load_file(folder / WEIGHTS), SHARD)
    index(folder, {"weight_map": names | {NORM: target}})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


NORM, EMBED, UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
Damage = Callable[[Path], Any]
# What is done to a copy of the base before `elo detach`, and words of the message.
BASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("has no config.json",)),
    "config empty": (lambda f: (f / "config.json").write_text(""), ("config.json", "not JSON")),
    "config cut": (lambda f: cut(f / "config.json", 40), ("config.json", "not JSON")),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ("not a JSON object",)),
    "config a number": (lambda f: (f / "config.json").write_text("3"), ("not a JSON object",)),
    "config null": (lambda f: (f / "config.json").write_text("null"), ("not a JSON object",)),
    "config utf-16": (lambda f: (f / "config.json").write_bytes("{}".encode("utf-16")), ("not JSON",)),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), ("not JSON",)),
    "config a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), ("config.json",)),
    "config a dead link": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("gone")),
        ("has no config.json",),
    ),
    "config NaN": (lambda f: config(f, rms_norm_eps=float("nan"), hidden_size="NaN"), ("config.json",)),
    "type unknown": (lambda f: config(f, model_type="frobnicator"), ("transformers cannot read it",)),
    "type missing": (lambda f: config(f, model_type=None), ("transformers cannot read it",)),
    "type a number": (lambda f: config(f, model_type=5), ("transformers cannot read it",)),
    "own code": (
        lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}),
        ("trust_remote_code",),
    ),
    "layers text": (lambda f: config(f, num_hidden_layers="four"), ("config.json",)),
    "layers zero": (lambda f: config(f, num_hidden_layers=0), ()),
    "layers negative": (lambda f: config(f, num_hidden_layers=-4), ()),
    "layers more": (lambda f: config(f, num_hidden_layers=5), ("model.layers.4", "missing")),
    "layers fewer": (lambda f: config(f, num_hidden_layers=3), ("counts 3 decoder layers", "layer 3")),
    "width other": (lambda f: config(f, hidden_size=32), ("another shape",)),
    "width zero": (lambda f: config(f, hidden_size=0), ()),
    "width negative": (lambda f: config(f, intermediate_size=-1), ()),
    "width null heads": (lambda f: config(f, num_attention_heads=0), ()),
    "vocabulary other": (lambda f: config(f, vocab_size=77), ("lm_head", "another shape")),
    "vocabulary huge": (lambda f: config(f, vocab_size=10**15), ("lm_head", "another shape")),
    "tied by config only": (lambda f: config(f, tie_word_embeddings="perhaps"), ()),
    "activation unknown": (lambda f: config(f, hidden_act="wibble"), ("wibble",)),
    "quantised": (lambda f: config(f, quantization_config={"quant_method": "gptq", "bits": 4}), ("quantised",)),
    "quantised oddly": (lambda f: config(f, quantization_config="4bit"), ("quant",)),
    "dtype unknown": (lambda f: config(f, dtype="float7"), ()),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), ("no model.safetensors",)),
    "weights a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), (WEIGHTS,)),
    "weights a dead link": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("gone")),
        ("no model.safetensors",),
    ),
    "weights pickled": (lambda f: only(f, "pytorch_model.bin"), ("pickled", "save_pretrained")),
    "weights pickled, indexed": (
        lambda f: only(f, "pytorch_model.bin.index.json", "pytorch_model-1.bin"),
        ("pickled",),
    ),
    "weights of TensorFlow": (lambda f: only(f, "tf_model.h5"), ("another format",)),
    "weights of Flax": (lambda f: only(f, "flax_model.msgpack"), ("another format",)),
    "weights original": (lambda f: only(f, "consolidated.00.pth"), ("model.safetensors",)),
    "weights GGUF": (lambda f: only(f, "llama-q4.gguf"), ("GGUF",)),
    "weights adapter": (lambda f: only(f, "adapter_config.json", "adapter_model.safetensors"), ("adapter", "merge")),
    "weights under another name": (lambda f: only(f, "weights.safetensors"), ("found weights.safetensors",)),
    "file empty": (lambda f: cut(f / WEIGHTS, 0), ("not a safetensors file", "0 bytes")),
    "file of 7 bytes": (lambda f: cut(f / WEIGHTS, 7), ("not a safetensors file",)),
    "file ends in header": (lambda f: cut(f / WEIGHTS, 500), ("truncated",)),
    "file ends in data": (lambda f: cut(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1), ("truncated",)),
    "file too long": (lambda f: (f / WEIGHTS).open("ab").write(b"x"), ("header asks for",)),
    "file HTML": (lambda f: (f / WEIGHTS).write_text("<html>sign in</html>" * 9), ("not a safetensors file",)),
    "file LFS pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("not a safetensors file",),
    ),
    "header length huge": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), ("not a safetensors file",)),
    "header not JSON": (lambda f: header(f, lambda v: b"{" * 40), ("header is damaged",)),
    "header not UTF-8": (lambda f: header(f, lambda v: b"\xff" * 40), ("header is damaged",)),
    "header a list": (lambda f: header(f, lambda v: b"[1, 2]"), ("header is damaged",)),
    "header null": (lambda f: header(f, lambda v: b"null"), ("header is damaged",)),
    "header nested": (lambda f: header(f, lambda v: b"[" * 100_000), ("header is damaged",)),
    "header empty": (lambda f: header(f, lambda v: b"{}"), ("header asks for",)),
    "header number of digits": (lambda f: header(f, lambda v: b'{"a": %s}' % (b"9" * 5000)), ("header is damaged",)),
    "entry a list": (lambda f: header(f, lambda v: v.update({NORM: [1]})), ("header is damaged",)),
    "entry null": (lambda f: header(f, lambda v: v.update({NORM: None})), ("header is damaged",)),
    "entry without offsets": (lambda f: header(f, lambda v: v[NORM].pop("data_offsets")), ("header is damaged",)),
    "entry without shape": (lambda f: header(f, lambda v: v[NORM].pop("shape")), ("header is damaged",)),
    "entry without dtype": (lambda f: header(f, lambda v: v[NORM].pop("dtype")), ("header is damaged",)),
    "offsets one": (entry(NORM, data_offsets=[0]), ("header is damaged",)),
    "offsets three": (entry(NORM, data_offsets=[0, 1, 2]), ("header is damaged",)),
    "offsets backwards": (entry(NORM, data_offsets=[64, 0]), ("header is damaged", NORM)),
    "offsets negative": (entry(NORM, data_offsets=[-32, 0]), ("header is damaged", NORM)),
    "offsets text": (entry(NORM, data_offsets=["a", "b"]), ("header is damaged",)),
    "offsets infinite": (entry(NORM, data_offsets=[0, float("inf")]), ("header is damaged",)),
    "offsets overlapping": (entry(NORM, data_offsets=[0, 32]), ("header is damaged", "out of place")),
    "offsets beyond": (entry(NORM, data_offsets=[10**12, 10**12 + 32]), ("header is damaged",)),
    "shape larger": (entry(NORM, shape=[17]), ("header is damaged", NORM)),
    "shape negative": (entry(NORM, shape=[-16]), ("header is damaged", NORM)),
    "shape of two minus": (entry(NORM, shape=[-4, -4]), ("header is damaged", NORM)),
    "shape text": (entry(NORM, shape="big"), ("header is damaged",)),
    "shape a number": (entry(NORM, shape=16), ("header is damaged",)),
    "shape folded": (entry(NORM, shape=[4, 4]), (NORM, "another shape")),
    "dtype quantised": (entry(NORM, dtype="F4"), (NORM, "F4", "quantised")),
    "dtype wider": (entry(NORM, dtype="F64"), ("header is damaged", NORM)),
    "dtype a number": (entry(NORM, dtype=16), (NORM,)),
    "tensor missing": (lambda f: weights(f, lambda t: t.pop(NORM)), (NORM, "missing")),
    "tensor of a layer missing": (lambda f: weights(f, lambda t: t.pop(UP)), ("up_proj",)),
    "tensors none": (lambda f: weights(f, lambda t: t.clear()), ("base",)),
    "tensors of another model": (
        lambda f: weights(f, lambda t: (t.clear(), t.update({"h.0.attn.weight": torch.ones(2, 2)}))),
        ("base",),
    ),
    "index not JSON": (lambda f: index(f, "x"), (INDEX, "not JSON")),
    "index a list": (lambda f: index(f, []), ("no weight_map",)),
    "index empty": (lambda f: index(f, {}), ("no weight_map",)),
    "index without files": (lambda f: index(f, {"weight_map": {}}), ("no weight_map",)),
    "index of numbers": (lambda f: index(f, {"weight_map": {NORM: 3}}), ("no weight_map",)),
    "index escapes": (
        lambda f: mapped(f, "../detached/model.safetensors"),
        ("not in the folder", "not read for safety"),
    ),
    "index absolute": (lambda f: mapped(f, "/etc/passwd"), ("not in the folder", "/etc/passwd")),
    "index dot": (lambda f: mapped(f, "."), ("not in the folder",)),
    "index empty name": (lambda f: mapped(f, ""), ("not in the folder",)),
    "index null byte": (lambda f: mapped(f, "a\0b.safetensors"), ("not in the folder",)),
    "index backslash": (lambda f: mapped(f, "..\\x.safetensors"), ("not in the folder",)),
    "index folder below": (lambda f: mapped(f, "sub/x.safetensors"), ("not in the folder",)),
    "index of a pickle": (lambda f: mapped(f, "pytorch_model.bin"), ("not a safetensors file",)),
    "index of a missing file": (lambda f: mapped(f, "model-2.safetensors"), ("model-2.safetensors", "missing")),
    "index names what is not there": (
        lambda f: index(f, {"weight_map": {"model.ghost.weight": SHARD}}),
        ("model.ghost.weight", "but it is not"),
    ),
    "tensor stored twice": (
        lambda f: (shutil.copy(f / WEIGHTS, f / "other.safetensors"), mapped(f, "other.safetensors")),
        ("stored twice",),
    ),
    "detached already": (lambda f: config(f, elo_detached={"layers": [0]}), ("is already a detached checkpoint",)),
    "encoder-decoder": (lambda f: config(f, is_encoder_decoder=True), ("encoder-decoder",)),
}

# What is done to a copy of the detached checkpoint before `elo attach`.
DETACHED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no record": (lambda f: config(f, elo_detached=None), ("was not detached by elo",)),
    "record a list": (lambda f: config(f, elo_detached=[]), ("record is damaged",)),
    "record text": (lambda f: config(f, elo_detached="yes"), ("record is damaged",)),
    "record empty": (lambda f: config(f, elo_detached={}), ("record is damaged",)),
    "record of the future": (lambda f: record(f, format=2), ("record is damaged", "another version")),
    "record format text": (lambda f: record(f, format="one"), ("record is damaged",)),
    "record without layers": (lambda f: record(f, layers=...), ("record is damaged",)),
    "record layers none": (lambda f: record(f, layers=[]), ("record is damaged",)),
    "record layers text": (lambda f: record(f, layers="0,3"), ("record is damaged",)),
    "record layers of text": (lambda f: record(f, layers=["0", "3"]), ("record is damaged",)),
    "record layers true": (lambda f: record(f, layers=[False, True]), ("record is damaged",)),
    "record layers unordered": (lambda f: record(f, layers=[3, 0]), ("record is damaged",)),
    "record layers twice": (lambda f: record(f, layers=[0, 0]), ("record is damaged",)),
    "record layers negative": (lambda f: record(f, layers=[-4, -1]), ("record is damaged",)),
    "record layers beyond": (lambda f: record(f, layers=[0, 4]), ("record is damaged",)),
    "record layers other": (lambda f: record(f, layers=[0, 2]), ("not the base", "layer 2")),
    "record layers fewer": (lambda f: record(f, layers=[0]), ("has 2 decoder layers",)),
    "record count missing": (lambda f: record(f, num_base_layers=...), ("record is damaged",)),
    "record count text": (lambda f: record(f, num_base_layers="4"), ("record is damaged",)),
    "record count true": (lambda f: record(f, num_base_layers=True, layers=[0]), ("record is damaged",)),
    "record count other": (lambda f: record(f, num_base_layers=6), ("has 4 decoder layers", "model with 6")),
    "record frozen a list": (lambda f: record(f, frozen=[]), ("record is damaged",)),
    "record frozen of numbers": (lambda f: record(f, frozen={NORM: 7}), ("not the base", NORM)),
    "record frozen of another": (lambda f: record(f, frozen={NORM: "0" * 64}), ("not the base", NORM)),
    "record frozen of nothing": (lambda f: record(f, frozen={"ghost": "0" * 64}), ("not the base", "ghost")),
    "record layers' sums text": (lambda f: record(f, base_layers="x"), ("record is damaged",)),
    "record layers' sums short": (lambda f: record(f, base_layers=[]), ("not the base", "layer 0")),
    "record layers' sums wrong": (lambda f: record(f, base_layers=[1, 2, 3, 4]), ("not the base", "layer 0")),
    "config missing": (lambda f: (f / "config.json").unlink(), ("has no config.json",)),
    "config layer count": (lambda f: config(f, num_hidden_layers=3), ("has 3 decoder layers",)),
    "config type": (lambda f: config(f, model_type="mistral"), ("is a llama", "from a mistral")),
    "config tied": (lambda f: config(f, tie_word_embeddings=True), ("tie_word_embeddings is True",)),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), ("no model.safetensors",)),
    "weights cut": (lambda f: cut(f / WEIGHTS, 3000), ("truncated",)),
    "weights pickled": (lambda f: only(f, "pytorch_model.bin"), ("pickled",)),
    "adapter": (lambda f: only(f, "adapter_config.json", "adapter_model.safetensors"), ("adapter", "merge")),
    "adapter inside": (lambda f: weights(f, lambda t: t.update({UP + ".lora_A": torch.ones(1)})), ("lora_A",)),
    "embedding trained": (lambda f: weights(f, lambda t: t[EMBED].add_(1)), (EMBED, "include: embedding")),
    "norm trained": (lambda f: weights(f, lambda t: t[NORM].add_(1)), (NORM, "include: norm")),
    "head trained": (lambda f: weights(f, lambda t: t["lm_head.weight"].add_(1)), ("lm_head", "include: head")),
    "vocabulary grown": (lambda f: weights(f, lambda t: t.update({EMBED: torch.ones(400, 16)})), (EMBED, "[400, 16]")),
    "layer missing": (lambda f: weights(f, lambda t: t.pop(UP)), ("up_proj",)),
    "layer of another width": (lambda f: weights(f, lambda t: t.update({UP: torch.ones(25, 16)})), ("up_proj",)),
}


@pytest.mark.parametrize("fault", BASES)
def test_base(fault, pristine, tmp_path, capsys):
    damage, words = BASES[fault]
    damage(copy_of(pristine / "base", tmp_path / "base"))
    command = ["detach", tmp_path / "base", "--output", tmp_path / "out"]
    assert_refused(command, words, (pristine, tmp_path), capsys)


@pytest.mark.parametrize("fault", DETACHED)
def test_detached(fault, pristine, tmp_path, capsys):
    damage, words = DETACHED[fault]
    damage(copy_of(pristine / "detached", tmp_path / "detached"))
    command = ["attach", tmp_path / "detached", "--base", pristine / "base", "--output", tmp_path / "out"]
    assert_refused(command, words, (pristine, tmp_path), capsys)


B, D, OUT = "{p}/base", "{p}/detached", "{t}/out"
# Command lines and words; {p} is the folder of base and detached, {t} one of the case's own.
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no output": (["detach", B], ("output",)),
    "no checkpoint": (["detach", "-o", OUT], ("Missing argument",)),
    "no base": (["attach", D, "-o", OUT], ("base",)),
    "option unknown": (["detach", B, "-o", OUT, "--layer", "0"], ("--layer",)),
    "argument too many": (["detach", B, B, "-o", OUT], ("unexpected extra argument",)),
    "verb unknown": (["detatch", B, "-o", OUT], ("detatch",)),
    "folder missing": (["detach", "{t}/none", "-o", OUT], ("none: no such folder",)),
    "a file": (["detach", "{p}/base/config.json", "-o", OUT], ("is not a folder",)),
    "empty folder": (["detach", "{t}", "-o", OUT], ("has no config.json",)),
    "hub id unknown": (["detach", "nobody/nothing", "-o", OUT], ("nobody/nothing", "hub")),
    "hub id odd": (["detach", "no body", "-o", OUT], ("no body", "hub")),
    "name empty": (["detach", "", "-o", OUT], ()),
    "layers all": (["detach", B, "-o", OUT, "--layers", "0-3"], ("all 4 layers",)),
    "layers beyond": (["detach", B, "-o", OUT, "--layers", "first:1,7"], ("names layer 7",)),
    "layers twice": (["detach", B, "-o", OUT, "--layers", "0,-4"], ("layer 0 twice",)),
    "layers empty": (["detach", B, "-o", OUT, "--layers", ""], ("cannot read ''",)),
    "layers words": (["detach", B, "-o", OUT, "--layers", "the first"], ("cannot read",)),
    "layers Arabic digits": (["detach", B, "-o", OUT, "--layers", "٠,١"], ("cannot read",)),
    "layers spaces": (["detach", B, "-o", OUT, "--layers", "0 3"], ("cannot read '0 3'",)),
    "output exists": (["detach", B, "-o", D], ("already exists", "--overwrite")),
    "output a file": (["detach", B, "-o", "{p}/base/config.json"], ("overlaps the input",)),
    "output is the base": (["detach", B, "-o", B, "--overwrite"], ("overlaps the input",)),
    "output in the base": (["detach", B, "-o", B + "/in"], ("overlaps the input",)),
    "output around the base": (["detach", B, "-o", "{p}", "--overwrite"], ("not a checkpoint",)),
    "output below a file": (["detach", B, "-o", B + "/config.json/out"], ("config.json",)),
    "output not writable": (["detach", B, "-o", "/proc/elo/out"], ("/proc/elo/out", "cannot be written")),
    "output name too long": (["detach", B, "-o", "{t}/" + "x" * 250], ("File name too long",)),
    "overwrite a file": (["detach", B, "-o", "{p}/base/config.json", "--overwrite"], ("not a checkpoint",)),
    "attach a base": (["attach", B, "--base", B, "-o", OUT], ("was not detached by elo",)),
    "attach to a detached": (["attach", D, "--base", D, "-o", OUT], ("is a detached checkpoint, not a base",)),
    "attach exchanged": (["attach", B, "--base", D, "-o", OUT], ("was not detached by elo",)),
    "attach into the base": (["attach", D, "--base", B, "-o", B, "--overwrite"], ("overlaps the input",)),
    "attach into the detached": (["attach", D, "--base", B, "-o", D + "/x"], ("overlaps the input",)),
    "attach onto what exists": (["attach", D, "--base", B, "-o", D], ("overlaps the input",)),
    "scale text": (["attach", D, "--base", B, "-o", OUT, "--scale", "half"], ("--scale", "valid number")),
    "scale nan": (["attach", D, "--base", B, "-o", OUT, "--scale", "nan"], ("scale", "nan")),
    "scale inf": (["attach", D, "--base", B, "-o", OUT, "--scale", "inf"], ("scale", "inf")),
    "scale too large": (["attach", D, "--base", B, "-o", OUT, "--scale", "101"], ("scale", "101")),
    "scale too low": (["attach", D, "--base", B, "-o", OUT, "--scale=-1e9"], ("scale",)),
    "include unknown": (["attach", D, "--base", B, "-o", OUT, "--include", "lm_head"], ("cannot attach 'lm_head'",)),
    "include layers": (["attach", D, "--base", B, "-o", OUT, "--include", "layers"], ("cannot attach 'layers'",)),
    "evaluate items of no kind": (["evaluate", "{t}", "--cloze", "en={p}/base/config.json"], ("config.json:1",)),
    "evaluate nothing": (["evaluate", B], ("nothing to measure",)),
    "evaluate no language": (["evaluate", B, "--corpus", "x.jsonl"], ("LANGUAGE=FILE",)),
    "evaluate no file": (["evaluate", B, "--corpus", "en="], ("LANGUAGE=FILE",)),
    "evaluate missing file": (["evaluate", B, "--corpus", "en={t}/no.jsonl"], ("no.jsonl", "no such file")),
    "evaluate language twice": (["evaluate", B, "--cloze", "a=b", "--cloze", "a=c"], ("'a' is given twice",)),
    "evaluate cloze missing": (["evaluate", B, "--cloze", "en={t}/no.jsonl"], ("no.jsonl", "no such file")),
    "evaluate cloze folder": (["evaluate", B, "--cloze", "en={t}"], ("no such file", "cloze items")),
    "evaluate length 1": (["evaluate", B, "--corpus", "en=x", "--sequence-length", "1"], ("sequence-length",)),
    "evaluate tokens 0": (["evaluate", B, "--corpus", "en=x", "--max-tokens", "0"], ("max-tokens",)),
    "evaluate output a folder": (["evaluate", B, "--corpus", "en={p}/base", "-o", "{t}"], ("is a folder",)),
    "evaluate tokenizer missing": (
        ["evaluate", B, "--corpus", "en={p}/base/vocab.txt", "--tokenizer", "{t}"],
        ("no such file",),
    ),
    "plan nothing": (["plan", "{t}/none"], ("none",)),
    "plan device unknown": (["plan", B, "--device", "H1000"], ("H1000",)),
    "plan devices none": (["plan", B, "--device", "H100", "--devices", "0"], ("devices",)),
    "plan devices negative": (["plan", B, "--device", "H100", "--devices", "-8"], ("devices",)),
    "plan tokens none": (["plan", B, "--tokens", "0"], ("--tokens: got 0",)),
    "plan tokens inf": (["plan", B, "--tokens", "inf"], ("--tokens: got inf",)),
    "evaluate prompt without language": (["evaluate", B, "--prompt", "text"], ("LANGUAGE=TEXT", "'text'")),
    "evaluate prompt empty": (["evaluate", B, "--prompt", "en="], ("LANGUAGE=TEXT", "'en='")),
    "plan method unknown": (["plan", B, "--method", "most"], ("method", "'most'")),
    "plan share 1": (["plan", B, "--set", "method={name: elo, share: 1}"], ("share",)),
    "plan share nan": (["plan", B, "--set", "method={name: elo, share: .nan}"], ("share",)),
    "plan length 0": (["plan", B, "--set", "data.sequence_length=0"], ("sequence_length",)),
    "plan batch 0": (["plan", B, "--set", "training.per_device_train_batch_size=0"], ("batch",)),
    "plan optimizer": (["plan", B, "--set", "training.optim=lion"], ("lion",)),
    "plan layers": (["plan", B, "--set", "layers=first:9"], ("first:9",)),
    "plan price": (["plan", B, "--device", "H100", "--price-per-hour", "-1"], ("price",)),
    "plan price nan": (["plan", B, "--device", "H100", "--price-per-hour", "nan"], ("price",)),
    "plan too few tokens": (["plan", B, "--set", "tokens=1"], ("tokens", "less than one update")),
    "plan output a folder": (["plan", B, "-o", "{t}"], ("{t}",)),
    "quickstart unknown key": (["quickstart", "-o", OUT, "--set", "budgts=1"], ("budgts", "budgets")),
    "quickstart onto other things": (["quickstart", "-o", "{p}"], ("is not a quickstart",)),
    "prepare nothing": (["prepare", "{t}/none.yaml"], ("no such configuration file",)),
    "run nothing until a stage": (["run", "{t}/none.yaml", "--until", "attach"], ("no such configuration file",)),
    "run a folder": (["run", "{t}"], ("is a folder",)),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, pristine, tmp_path, capsys):
    arguments, words = COMMANDS[case]
    places = {"{p}": str(pristine), "{t}": str(tmp_path)}

    def filled(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    words = tuple(map(filled, words))
    assert_refused([filled(each) for each in arguments], words, (pristine, tmp_path), capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission(pristine, tmp_path, capsys):
    base = copy_of(pristine / "base", tmp_path / "base")
    (base / WEIGHTS).chmod(0)
    assert_refused(["detach", base, "-o", tmp_path / "out"], ("Permission denied", WEIGHTS), (pristine,), capsys)


def test_links_are_followed_when_read_and_replaced_when_written(pristine, tmp_path, capsys):
    from bad_input_fixtures import run_elo, unchanged

    base = tmp_path / "base"
    base.mkdir()
    for file in (pristine / "base").iterdir():  # as the hub's cache lays a checkpoint out
        (base / file.name).symlink_to(file)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with unchanged(pristine, tmp_path / "elsewhere"):
        command = ["attach", pristine / "detached", "--base", base, "-o", tmp_path / "out", "--overwrite"]
        status, said = run_elo(command, capsys)
    assert status == 0, said
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "precious"
    assert not (tmp_path / "out" / WEIGHTS).is_symlink(), "weights are copies, never links into the base"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (pristine / "base" / WEIGHTS).read_bytes()
    hard = copy_of(pristine / "base", tmp_path / "hard")
    (tmp_path / "twin").hardlink_to(hard / WEIGHTS)
    with unchanged(hard):
        assert run_elo(["attach", pristine / "detached", "--base", hard, "-o", tmp_path / "o2"], capsys)[0] == 0
    assert (tmp_path / "o2" / WEIGHTS).stat().st_nlink == 1
