"""Users' mistakes with checkpoints: one EloError with what, where and what to do, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from surgery_fixtures import edit_config, llama, store, stored
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from elo.checkpoint.counting import read_config
from elo.data.tokenizer import load_tokenizer
from elo.detach_attach import attach, detach
from elo.errors import EloError
from elo.evaluate.loading import load_model
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    llama().save_pretrained(folder / "base", max_shard_size="20KB")
    detach_checkpoint(folder / "base", (0, -1), folder / "detached")
    return folder


@pytest.fixture
def here(pristine: Path, tmp_path: Path) -> Path:
    """A sharded base and what was detached from it."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def redirect(folder: Path, target: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def corrupt_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")


BROKEN_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda b: shutil.rmtree(b), "no such folder"),
    "no config": (lambda b: (b / "config.json").unlink(), r"no config\.json"),
    "config not json": (lambda b: (b / "config.json").write_text("{"), "not JSON"),
    "config a list": (lambda b: (b / "config.json").write_text("[]"), "not a JSON object"),
    "unknown type": (lambda b: edit_config(b, model_type="frobnicator"), "transformers cannot read it"),
    "no type": (lambda b: edit_config(b, model_type=None), "transformers cannot read it"),
    "quantised": (lambda b: edit_config(b, quantization_config={"quant_method": "fp8"}), "quantised"),
    "other layer count": (
        lambda b: edit_config(b, num_hidden_layers=5),
        r"layers\.4.* is missing|has 5 decoder layers",
    ),
    "other width": (lambda b: edit_config(b, intermediate_size=50), "has another shape"),
    "impossible width": (lambda b: edit_config(b, hidden_size=30, num_attention_heads=7), "hidden_size|multiple|shape"),
    "missing shard": (lambda b: shard(b).unlink(), "is missing, but"),
    "truncated shard": (lambda b: truncate(shard(b), shard(b).stat().st_size - 10), "truncated"),
    "tiny shard": (lambda b: truncate(shard(b), 5), "not a safetensors file"),
    "empty shard": (lambda b: truncate(shard(b), 0), "not a safetensors file"),
    "corrupt header": (lambda b: corrupt_header(shard(b)), "header is damaged"),
    "trailing bytes": (lambda b: shard(b).write_bytes(shard(b).read_bytes() + b"0"), "header asks for"),
    "index escapes": (lambda b: redirect(b, "../../x.safetensors"), "not in the folder"),
    "index absolute": (lambda b: redirect(b, "/etc/passwd"), "not in the folder"),
    "index lies": (lambda b: redirect(b, shard(b).name), "but it is not"),
    "index not safetensors": (lambda b: redirect(b, "config.json"), "not a safetensors file"),
    "index empty": (lambda b: (b / INDEX).write_text("{}"), "no weight_map"),
    "index not json": (lambda b: (b / INDEX).write_text("x"), "not JSON"),
    "adapter": (lambda b: only(b, "adapter_config.json", "adapter_model.safetensors"), "holds an adapter"),
    "pickled": (lambda b: only(b, "pytorch_model.bin"), "pickled.*save_pretrained"),
    "gguf": (lambda b: only(b, "llama.gguf"), "GGUF"),
    "no weights": (lambda b: only(b), "no model.safetensors"),
}


@pytest.mark.parametrize("fault", BROKEN_BASES)
def test_broken_base(fault: str, here: Path) -> None:
    break_it, words = BROKEN_BASES[fault]
    break_it(here / "base")
    with pytest.raises(EloError, match=words) as caught:
        detach_checkpoint(here / "base", (0, -1), here / "out")
    assert str(here / "base") in str(caught.value) or fault in ("quantised", "impossible width")
    with pytest.raises(EloError, match=words):
        attach_checkpoint(here / "detached", here / "base", here / "out")
    assert {path.name for path in here.iterdir()} <= {"base", "detached"}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("7", "names layer 7"),
        ("first:9", "9 layers"),
        ("0-3", "all 4 layers"),
        ("middle", "cannot read"),
        ("", "cannot"),
    ],
)
def test_impossible_selection(layers: str, words: str, here: Path) -> None:
    with pytest.raises(EloError, match=words):
        detach_checkpoint(here / "base", layers, here / "out")
    assert not (here / "out").exists()


def test_outputs_that_would_destroy_something(here: Path) -> None:
    with pytest.raises(EloError, match="already exists"):
        detach_checkpoint(here / "base", (0, -1), here / "detached")
    for output in (here / "base", here / "base" / "inside", here):
        with pytest.raises(EloError, match="overlaps the input"):
            detach_checkpoint(here / "base", (0, -1), output, overwrite=True)
        with pytest.raises(EloError, match="overlaps the input"):
            attach_checkpoint(here / "detached", here / "base", output, overwrite=True)
    assert stored(here / "base")


def test_exchanged_arguments(here: Path) -> None:
    with pytest.raises(EloError, match="was not detached by elo"):
        attach_checkpoint(here / "base", here / "base", here / "out")
    with pytest.raises(EloError, match="is a detached checkpoint"):
        attach_checkpoint(here / "detached", here / "detached", here / "out")
    with pytest.raises(EloError, match="already a detached checkpoint"):
        detach_checkpoint(here / "detached", "0", here / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.embed_tokens.weight", r"embed_tokens\.weight differs"),
        ("lm_head.weight", r"lm_head\.weight differs"),
        ("model.layers.2.mlp.up_proj.weight", r"layer 2 \(model\.layers\.2\.\*\) differs"),
        ("model.layers.3.input_layernorm.weight", "layer 3"),
    ],
)
def test_another_base(name: str, words: str, here: Path) -> None:
    llama().save_pretrained(here / "other")
    attach_checkpoint(here / "detached", here / "other", here / "same")  # the same weights in one file are the same
    tensors = stored(here / "other")
    tensors[name] = tensors[name] + 1
    store(here / "other", tensors)
    with pytest.raises(EloError, match=words):
        attach_checkpoint(here / "detached", here / "other", here / "out")
    assert not (here / "out").exists()


def test_base_of_another_kind(here: Path) -> None:
    llama(layers=5).save_pretrained(here / "longer")
    with pytest.raises(EloError, match="has 5 decoder layers"):
        attach_checkpoint(here / "detached", here / "longer", here / "out")
    edit_config(here / "base", model_type="mistral")
    with pytest.raises(EloError, match="is a mistral"):
        attach_checkpoint(here / "detached", here / "base", here / "out")


CHANGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "norm trained": (lambda t: t["model.norm.weight"].add_(1), r"model\.norm\.weight is not in a detached layer"),
    "head trained": (lambda t: t["lm_head.weight"][3].add_(1), "include: head"),
    "tensor gone": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "is missing|up_proj"),
    "vocabulary grew": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(70, 32)}), r"\[70, 32\]"),
    "adapter within": (lambda t: t.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(1)}), "lora_A"),
}


@pytest.mark.parametrize("fault", CHANGED)
def test_detached_checkpoint_changed_elsewhere(fault: str, here: Path) -> None:
    change, words = CHANGED[fault]
    tensors = stored(here / "detached")
    change(tensors)
    store(here / "detached", tensors)
    with pytest.raises(EloError, match=words):
        attach_checkpoint(here / "detached", here / "base", here / "out")
    assert not (here / "out").exists()


def test_tied_head_that_came_back_untied(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    tensors = stored(tmp_path / "detached")
    store(tmp_path / "detached", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "same")  # a copy is no harm
    store(tmp_path / "detached", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(EloError, match=r"lm_head\.weight is tied"):
        attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "out")
    edit_config(tmp_path / "detached", tie_word_embeddings=False)
    with pytest.raises(EloError, match="tie_word_embeddings"):
        attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize(
    "record",
    [{}, [], {"layers": [3, 0], "num_base_layers": 4}, {"layers": [0, 9], "num_base_layers": 4}, {"format": 99}],
)
def test_damaged_record(record: object, here: Path) -> None:
    edit_config(here / "detached", elo_detached=record)
    with pytest.raises(EloError, match="record is damaged"):
        attach_checkpoint(here / "detached", here / "base", here / "out")


def test_unknown_include(here: Path) -> None:
    with pytest.raises(EloError, match="cannot attach 'lm_head'"):
        attach_checkpoint(here / "detached", here / "base", here / "out", include=["lm_head"])


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    small = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=64, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, **small)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(EloError, match="encoder-decoder"):
        detach_checkpoint(tmp_path / "base", "0", tmp_path / "out")


def test_in_memory_mistakes() -> None:
    model, other = llama(), llama(seed=1)
    detached = detach_layers(model, (0, -1))
    with pytest.raises(EloError, match="already"):
        detach_layers(detached, "0")
    with pytest.raises(EloError, match="differs from the base's"):
        attach_layers(other, detached)
    with pytest.raises(EloError, match="is a llama model with 5"):
        attach_layers(llama(layers=5), detached)
    with pytest.raises(EloError, match="was not detached by elo"):
        attach_layers(model, other)
    with pytest.raises(EloError, match="cannot attach"):
        attach_layers(model, detached, include=["everything"])


def test_recipes_take_folders_and_say_when_a_hub_id_cannot_be_had(here: Path) -> None:
    record = detach(here / "base", "1,2", output=here / "small")
    assert record["layers"] == [1, 2]
    assert attach(str(here / "small"), str(here / "base"), output=here / "whole")["layers"] == [1, 2]
    with pytest.raises(EloError, match="cannot be downloaded from the Hugging Face hub"):
        detach("nobody/nothing", output=here / "out")
    with pytest.raises(EloError, match="no such folder"):
        detach(here / "nowhere", output=here / "out")
    with pytest.raises(EloError, match="is not a folder"):
        detach(here / "base" / "config.json", output=here / "out")


@pytest.mark.parametrize("use", ["detach", "tokenizer", "evaluate", "plan"])
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(use: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.parent)
    calls: dict[str, Callable[[str], object]] = {
        "detach": lambda name: detach(name, output=here / "out"),
        "tokenizer": load_tokenizer,
        "evaluate": lambda name: load_model(name, device="cpu"),
        "plan": read_config,
    }
    with pytest.raises(EloError, match=rf"bas: no such .*did you mean {here.name}/base\?.*hf download {here.name}/bas"):
        calls[use](f"{here.name}/bas")


def test_an_id_in_the_hubs_cache_is_not_hidden_by_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = here / "cache" / "models--owner--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(here / "base", cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.chdir(here)
    (here / "owner").mkdir()
    assert detach("owner/tiny", "1,2", output=here / "out")["layers"] == [1, 2]


def test_a_kill_leaves_no_half_written_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / ".tmp-out-0000dead").mkdir()  # what a killed run has left
    monkeypatch.setattr("elo.surgery.on_disk.copy_side_files", lambda *_, **__: 1 / 0)
    for write in (
        lambda: detach_checkpoint(here / "base", (0, -1), here / "out"),
        lambda: attach_checkpoint(here / "detached", here / "base", here / "out"),
    ):
        with pytest.raises(ZeroDivisionError):
            write()
    assert {path.name for path in here.iterdir()} == {"base", "detached"}
    assert AutoModelForCausalLM.from_pretrained(here / "detached") is not None
