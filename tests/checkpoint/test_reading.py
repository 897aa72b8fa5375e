"""One reading of a checkpoint folder, which is that of transformers: its weight files, and wrappers as a whole."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bad_input_fixtures import assert_refused, copy_of
from run_fixtures import write_base
from safetensors.torch import load_file, save_file
from surgery_fixtures import assert_same, edit_config, llama, stored
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from zoo import tiny_config, tiny_model

from elo.chat.chat_vector import add_chat_vector
from elo.checkpoint.architecture import layers_of
from elo.checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE, open_checkpoint
from elo.config import load_config
from elo.errors import EloError
from elo.evaluate.bits_per_byte import isolates_documents
from elo.evaluate.loading import load_model
from elo.evaluate.scoring import evaluating
from elo.methods import METHODS
from elo.preflight import check_model
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 16,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
EXPERTS = {"intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 1}
PROJECTOR = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
# Class of the wrapper, further keys of the text part, of the vision part and of the whole.
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 8}, VISION, {"mm_tokens_per_image": 4, "image_token_index": 3}),
    "llama4": ("Llama4", EXPERTS, VISION | PROJECTOR, {"image_token_index": 3}),
    "llava": ("Llava", {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {"image_token_index": 3}),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral"},
        VISION | {"model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 3},
    ),
    "lfm2_vl": (
        "Lfm2Vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
        VISION | {"model_type": "siglip2_vision_model", "num_patches": 4},
        {"image_token_id": 3, "projector_hidden_size": 16},
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", SECTIONS, TOWER, {"image_token_id": 3}),
    "glm4v": ("Glm4v", SECTIONS, TOWER, {"image_token_id": 3}),
    "qwen3_vl": ("Qwen3VL", SECTIONS, TOWER | {"deepstack_visual_indexes": [0]}, {"image_token_id": 3}),
}

DATA = {
    "tokens": 4096,
    "data": {"target": "ko", "source": "en", "corpora": {"ko": "ko.jsonl", "en": "en.jsonl"}, "sequence_length": 32},
}


def wrapper(family: str) -> PreTrainedModel:
    name, text, vision, whole = WRAPPERS[family]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=vision, **whole)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_is_read_whole_detached_and_attached(family: str, tmp_path: Path) -> None:
    wrapper(family).save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", "0,-1", tmp_path / "detached")
    ids = torch.tensor([[1, 7, 8, 9]])
    small = load_model(str(tmp_path / "detached"), device="cpu")
    assert small.config.get_text_config(decoder=True).num_hidden_layers == 2
    assert type(small).__name__.endswith("ForConditionalGeneration")
    with torch.no_grad():
        assert torch.isfinite(small(input_ids=ids).logits).all()
    attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "attached")
    assert_same(stored(tmp_path / "attached"), stored(tmp_path / "base"))
    whole = load_model(str(tmp_path / "attached"), device="cpu")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, theirs(input_ids=ids).logits)
    # What a training tool saves of the detached wrapper comes back under the base's names.
    small.save_pretrained(tmp_path / "trained")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "again")
    assert_same(stored(tmp_path / "again"), stored(tmp_path / "base"))


@pytest.mark.parametrize("family", WRAPPERS)
def test_only_what_changed_in_a_wrapper_is_attached_and_added(family: str, tmp_path: Path) -> None:
    model = wrapper(family)
    model.save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", "0,-1", tmp_path / "detached")
    small = load_model(str(tmp_path / "detached"), device="cpu")
    with torch.no_grad():
        for parameter in layers_of(small)[1].parameters():
            parameter += 0.1
        for parameter in model.parameters():
            parameter += 0.05
    small.save_pretrained(tmp_path / "trained")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "adapted")
    base, adapted = stored(tmp_path / "base"), stored(tmp_path / "adapted")
    changed = {name for name in base if not torch.equal(base[name], adapted[name])}
    assert changed == {name for name in base if ".layers.3." in name and "vision" not in name}
    model.save_pretrained(tmp_path / "chat")
    places = (tmp_path / name for name in ("adapted", "base", "chat", "sum"))
    add_chat_vector(*places, save_tokenizer=lambda folder: None, leave_out=["embedding", "head"])
    summed = stored(tmp_path / "sum")
    kept = {name for name in base if torch.equal(adapted[name], summed[name])}
    assert kept == {name for name in base if name.endswith(("embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("family", ["llama4", "mistral3"])
def test_a_run_checks_the_wrapper_that_it_trains_before_tokenising(family: str, tmp_path: Path) -> None:
    wrapper(family).save_pretrained(tmp_path / "base")
    config = load_config(
        {"model": str(tmp_path / "base"), "output": str(tmp_path / "run"), **DATA, "layers": "0,-1", "method": "frozen"}
    )
    assert check_model(config, tmp_path / "base") == (0, 3)
    edit_config(tmp_path / "base", model_type="voxtral", architectures=None)  # of which transformers has no causal LM
    with pytest.raises(EloError, match=r"causal language model|cannot be read"):
        check_model(config, tmp_path / "base")


@pytest.mark.parametrize("family", WRAPPERS)
def test_packing_is_refused_before_tokenising_where_training_would_refuse_it(family: str, tmp_path: Path) -> None:
    model = wrapper(family)
    model.save_pretrained(tmp_path / "base")
    config = load_config(
        {"model": str(tmp_path / "base"), "output": str(tmp_path / "run"), **DATA, "layers": "0,-1", "method": "frozen"}
    )
    with evaluating(model) as device:
        separates = isolates_documents(model, device)
    assert separates == (family not in ("qwen2_5_vl", "glm4v", "lfm2_vl"))
    if separates:
        check_model(config, tmp_path / "base")
        return
    with pytest.raises(EloError, match=r"data\.packing: .* where they restart.*write data\.packing: false"):
        check_model(config, tmp_path / "base")
    unpacked = config.model_copy(update={"data": config.data.model_copy(update={"packing": False})})
    check_model(unpacked, tmp_path / "base")


def test_a_head_loss_without_the_transform_of_the_logits_is_refused_before_tokenising(tmp_path: Path) -> None:
    tiny_model(tiny_config("gemma2")).save_pretrained(tmp_path / "base")
    settings = {"training": {"head_loss": "linear_cross_entropy"}, "method": "full"}
    config = load_config({"model": str(tmp_path / "base"), "output": str(tmp_path / "run"), **DATA, **settings})
    with pytest.raises(EloError, match=r"training\.head_loss: linear_cross_entropy .* write chunked"):
        check_model(config, tmp_path / "base")
    write_base(tmp_path / "plain")
    check_model(config, tmp_path / "plain")


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_use_layers_need_a_choice_of_them(method: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", layers=2)  # the default, first:1,last:1, is all of them
    config = load_config({"model": str(base), "output": str(tmp_path / "run"), **DATA, "method": method})
    if not METHODS[method].uses_layers:
        assert check_model(config, base) == ()
        return
    with pytest.raises(EloError, match="selects all 2 layers"):
        check_model(config, base)
    assert check_model(config.model_copy(update={"layers": "last:1"}), base) == (1,)


def test_adapters_are_refused_before_tokenising_where_training_would_refuse_them(tmp_path: Path) -> None:
    tiny_model(tiny_config("nemotron_h")).save_pretrained(tmp_path / "base")
    config = load_config({"model": str(tmp_path / "base"), "output": str(tmp_path / "run"), **DATA, "method": "lora"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": False})})
    with pytest.raises(EloError, match="nemotron_h cannot be trained with adapters"):
        check_model(config, tmp_path / "base")


def _weights(edit: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_FILE)
        save_file(edit(tensors), folder / SINGLE_FILE, {"format": "pt"})

    return damage


def _as(dtype: torch.dtype) -> Any:
    return _weights(lambda tensors: {n: t.to(dtype) if "proj" in n else t for n, t in tensors.items()})


OTHER_WEIGHTS: dict[str, tuple[Any, str]] = {
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "is quantised"),
    "fp8 without a word": (_as(torch.float8_e4m3fn), "stored as F8_E4M3"),
    "int8 without a word": (_as(torch.int8), "stored as I8"),
    "a tensor missing": (
        _weights(lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"}),
        r"model\.norm\.weight is missing",
    ),
    "names of a wrapper": (
        _weights(lambda tensors: {f"language_model.{n}": t for n, t in tensors.items()}),
        "is missing",
    ),
    "more rows in config.json": (lambda f: edit_config(f, vocab_size=9999), "has another shape"),
    "more layers in config.json": (lambda f: edit_config(f, num_hidden_layers=9), r"layers\.4\..* is missing"),
    "fewer layers in config.json": (lambda f: edit_config(f, num_hidden_layers=3), "counts 3 decoder layers"),
}


@pytest.mark.parametrize("method", ["lora", "full", "elo"])
@pytest.mark.parametrize("what", OTHER_WEIGHTS)
def test_weights_of_another_model_or_dtype_are_refused_before_tokenising(
    what: str, method: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    config = load_config({"model": str(base), "output": str(tmp_path / "run"), **DATA, "method": method})
    check_model(config, base)
    damage, words = OTHER_WEIGHTS[what]
    damage(base)
    with pytest.raises(EloError, match=words):
        check_model(config, base)


def test_no_command_adds_up_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    quantised = copy_of(base, tmp_path / "quantised")
    edit_config(quantised, quantization_config={"quant_method": "fp8"})
    vector = ["chat-vector", base, "--base", base, "--chat", quantised, "-o", tmp_path / "out"]
    assert_refused(vector, ("quantised", "dequantise"), (tmp_path,), capsys)
    assert_refused(["detach", quantised, "-o", tmp_path / "out"], ("quantised",), (tmp_path,), capsys)


@pytest.mark.parametrize("left", ["index alone", "index and shards"])
def test_a_single_file_is_read_before_an_index_as_transformers_does(
    left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    llama(seed=0).save_pretrained(old, max_shard_size="20KB")
    llama(seed=1).save_pretrained(new)
    for file in old.glob("model*" if left == "index and shards" else "*.index.json"):
        shutil.copy(file, new)
    assert (new / INDEX_FILE).exists()
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(new)
    assert checkpoint.files == [SINGLE_FILE]
    assert "index of other files" in caplog.text and str(new) in caplog.text
    detach_checkpoint(new, "0-2", tmp_path / "detached")  # whose layers keep their names
    taken, single = stored(tmp_path / "detached"), load_file(new / SINGLE_FILE)
    assert_same(taken, {name: single[name] for name in taken})
    theirs = AutoModelForCausalLM.from_pretrained(new).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in taken.items())


def test_a_weight_file_that_only_transformers_would_read_is_refused(tmp_path: Path) -> None:
    llama(seed=0).save_pretrained(tmp_path)
    save_file(llama(seed=1).state_dict(), tmp_path / "other.safetensors", {"format": "pt"})
    edit_config(tmp_path, transformers_weights="other.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not torch.equal(theirs["lm_head.weight"], load_file(tmp_path / SINGLE_FILE)["lm_head.weight"])
    with pytest.raises(EloError, match=r"config\.json: transformers_weights is 'other.safetensors'.*save it again"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_the_weights_is_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base")
    both = copy_of(base, tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    words = ("adapter_config.json", "whole model and an adapter", "remove", "merge")
    assert_refused(["detach", both, "-o", tmp_path / "out"], words, (tmp_path,), capsys)
    assert_refused(["evaluate", both, "--prompt", "en=a"], words, (tmp_path,), capsys)
    vector = ["chat-vector", base, "--base", base, "--chat", both, "-o", tmp_path / "out"]
    assert_refused(vector, words, (tmp_path,), capsys)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_a_prefix_of_every_name_is_named_with_the_cure(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_base(tmp_path / "base")
    tensors = load_file(folder / SINGLE_FILE)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})
    words = (repr(prefix), "removeprefix", "save_pretrained")
    assert_refused(["detach", folder, "-o", tmp_path / "out"], words, (tmp_path,), capsys)
    assert_refused(["evaluate", folder, "--prompt", "en=a"], words, (tmp_path,), capsys)


def test_a_pad_id_beyond_the_rows_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_base(tmp_path / "base")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit_config(folder, pad_token_id=rows)
    words = ("pad_token_id", f"is {rows}", f"{rows} embedding rows", "set it")
    for command in (["detach", folder, "-o", tmp_path / "out"], ["evaluate", folder, "--prompt", "en=a"]):
        assert_refused(command, words, (tmp_path,), capsys)
    assert_refused(["plan", folder], words, (tmp_path,), capsys)


def test_transformers_will_not_tie_is_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama(tied=False).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        load_model(str(tmp_path / "base"), device="cpu")
        assert not caplog.text
        edit_config(tmp_path / "base", tie_word_embeddings=True)
        model = load_model(str(tmp_path / "base"), device="cpu")
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert "does not tie" in caplog.text and "tie_word_embeddings" in caplog.text
