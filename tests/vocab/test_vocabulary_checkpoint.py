"""Rows for new tokens: every old row and every other tensor bit for bit, and transformers loads the result."""

import json
from pathlib import Path

import pytest
import torch
from surgery_fixtures import edit_config, llama, stored
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import FAMILIES, tiny_config, tiny_model

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.counting import build_on_meta
from elo.checkpoint.new_rows import VOCABULARY_KEY, NewRows, read_new_rows, share_record
from elo.errors import EloError
from elo.methods.base import first_new_row
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint
from elo.vocab.rows import INITIALISATIONS, NewTokens, RowInit, extend_checkpoint

ORIGINS = [[5, 6, 7], [8, 9], [10]]
# Tied and untied, with a biased head, other names on disk, scaled embeddings, experts, state spaces, multipliers.
SOME = [
    "llama-untied", "llama-tied", "gpt2", "gptj", "phi", "gemma3", "cohere2", "opt", "bloom", "mamba", "gpt_neox",
    "qwen3_moe", "gpt_oss", "granite", "olmo2", "starcoder2", "falcon", "mistral",
]  # fmt: skip


def extend(base: Path, output: Path, first_id: int = 64, **arguments) -> dict:
    arguments = {"save_tokenizer": lambda folder: None, "pad_to_multiple_of": 8} | arguments
    return extend_checkpoint(base, output, NewTokens(first_id, ORIGINS), **arguments)


def base_of(folder: Path, **arguments):
    model = llama(**arguments)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", SOME)
def test_every_family_keeps_its_logits_and_gains_rows(family, tmp_path):
    model_type, particular = FAMILIES[family]
    model = tiny_model(tiny_config(model_type, **particular))
    model.save_pretrained(tmp_path / "base")
    record = extend(tmp_path / "base", tmp_path / "new")
    extended, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 23).unsqueeze(0) % 60
    with torch.no_grad():
        before, after = model.eval()(input_ids=ids).logits, extended.eval()(input_ids=ids).logits
    assert after.shape[-1] == 72
    assert torch.equal(after[..., :64], before), "old tokens' logits are those of the base"
    assert find_architecture(extended).tied == find_architecture(model).tied
    assert read_new_rows(extended.config) == NewRows(64, 67)
    assert record["rows"] == {"start": 64, "stop": 67}
    with torch.no_grad():
        assert torch.isfinite(extended(input_ids=torch.tensor([[64, 65, 66, 3]])).logits).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", INITIALISATIONS)
def test_new_rows_begin_as_asked(how, tied, tmp_path):
    base_of(tmp_path / "base", tied=tied)
    extend(tmp_path / "base", tmp_path / "new", init=RowInit(how, how, seed=3))
    before, after = stored(tmp_path / "base"), stored(tmp_path / "new")
    names = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    for name, tensor in before.items():
        if name not in names:
            assert torch.equal(tensor, after[name]), name
            continue
        new = after[name]
        assert new.shape == (72, 32)
        assert torch.equal(new[:64], tensor)
        assert torch.allclose(new[67:], tensor.mean(0).expand(5, -1), atol=1e-6)
        if how == "noise":
            if not tied:
                both = torch.stack([after[each][64:67].flatten() for each in sorted(names)])
                assert abs(float(torch.corrcoef(both)[0, 1])) < 0.5, "embedding and head are drawn apart"
            assert not torch.equal(new[64], new[65])
            assert 0.5 < float((new[64:67] - tensor.mean(0)).std() / tensor.std()) < 2
            continue
        wanted = {
            "pieces": [tensor[origin].mean(0) for origin in ORIGINS],
            "first": [tensor[origin[0]] for origin in ORIGINS],
            "mean": [tensor.mean(0)] * 3,
        }[how]
        assert torch.allclose(new[64:67], torch.stack(wanted), atol=1e-6)


def test_embedding_and_head_may_begin_differently(tmp_path):
    base_of(tmp_path / "base")
    extend(tmp_path / "base", tmp_path / "new", init=RowInit(head="first"))
    before, after = stored(tmp_path / "base"), stored(tmp_path / "new")
    assert torch.allclose(after["model.embed_tokens.weight"][64], before["model.embed_tokens.weight"][5:8].mean(0))
    assert torch.equal(after["lm_head.weight"][64], before["lm_head.weight"][5])


def test_unused_rows_of_the_base_are_taken_before_more_are_made(tmp_path):
    base_of(tmp_path / "base")
    extend(tmp_path / "base", tmp_path / "new", first_id=60)
    before, after = stored(tmp_path / "base"), stored(tmp_path / "new")
    weight = after["model.embed_tokens.weight"]
    assert weight.shape == (64, 32)
    assert torch.equal(weight[:60], before["model.embed_tokens.weight"][:60])
    assert torch.allclose(weight[61], before["model.embed_tokens.weight"][8:10].mean(0))
    assert torch.equal(weight[63], before["model.embed_tokens.weight"][63]), "padding of the base stays"


def test_a_tokenizer_with_tokens_beyond_the_embedding(tmp_path):
    base_of(tmp_path / "base")
    extend(tmp_path / "base", tmp_path / "new", first_id=66, pad_to_multiple_of=1)
    weight = stored(tmp_path / "new")["model.embed_tokens.weight"]
    assert weight.shape == (69, 32)
    assert torch.allclose(weight[64:66], weight[:64].mean(0).expand(2, -1), atol=1e-6)
    assert torch.equal(weight[68], weight[10])


def test_bf16_and_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("elo.checkpoint.tensor_files.MAX_SHARD_BYTES", 20_000)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    extend(tmp_path / "base", tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors.index.json").exists()
    before, after = stored(tmp_path / "base"), stored(tmp_path / "new")
    assert before.keys() == after.keys()
    assert after["lm_head.weight"].dtype == torch.bfloat16
    wanted = before["lm_head.weight"][[5, 6, 7]].float().mean(0).to(torch.bfloat16)
    assert torch.equal(after["lm_head.weight"][64], wanted)


def test_rows_computed_elsewhere(tmp_path):
    base_of(tmp_path / "base")
    given = {"embedding": torch.randn(3, 32), "head": torch.randn(3, 32)}
    record = extend(tmp_path / "base", tmp_path / "new", init=RowInit(given=given))
    after = stored(tmp_path / "new")
    assert torch.equal(after["model.embed_tokens.weight"][64:67], given["embedding"])
    assert torch.equal(after["lm_head.weight"][64:67], given["head"])
    assert record["embedding_init"] == "given"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"embedding": torch.zeros(3, 32)}, "must contain embedding and head"),
        ({"embedding": torch.zeros(3, 32), "head": torch.zeros(2, 32)}, r"head is \[2, 32\].*\[3, 32\]"),
        ({"embedding": torch.zeros(3, 31), "head": torch.zeros(3, 32)}, r"embedding is \[3, 31\]"),
        ({"embedding": torch.full((3, 32), torch.nan), "head": torch.zeros(3, 32)}, "not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(given, said, tmp_path):
    base_of(tmp_path / "base")
    with pytest.raises(EloError, match=said):
        extend(tmp_path / "base", tmp_path / "new", init=RowInit(given=given))
    assert not (tmp_path / "new").exists()


def test_old_tokenizer_files_stay_behind_and_other_files_come_along(tmp_path):
    base_of(tmp_path / "base")
    for name in ("tokenizer.json", "merges.txt", "LICENSE", "chat_template.jinja"):
        (tmp_path / "base" / name).write_text("old")
    extend(
        tmp_path / "base", tmp_path / "new", save_tokenizer=lambda folder: (folder / "tokenizer.json").write_text("new")
    )
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "new"
    assert not (tmp_path / "new" / "merges.txt").exists()
    assert (tmp_path / "new" / "LICENSE").exists()
    assert (tmp_path / "new" / "chat_template.jinja").exists()


def test_a_detached_checkpoint_is_refused(tmp_path):
    base_of(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", [0, 3], tmp_path / "small")
    with pytest.raises(EloError, match="detached checkpoint; extend the vocabulary of its base"):
        extend(tmp_path / "small", tmp_path / "new")


@pytest.mark.parametrize(
    "record", [3, {}, {"rows": {"start": 5}}, {"rows": {"start": 70, "stop": 64}}, {"rows": {"start": 60, "stop": 99}}]
)
def test_a_damaged_record_is_told(record, tmp_path):
    base_of(tmp_path / "base")
    edit_config(tmp_path / "base", **{VOCABULARY_KEY: record})
    with pytest.raises(EloError, match="record is damaged"):
        read_new_rows(AutoConfig.from_pretrained(tmp_path / "base"))


def test_the_record_of_a_wrapper_is_found_by_whatever_loads_its_decoder_alone(tmp_path):
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tiny_model(tiny_config("gemma3", text_config=text, vision_config=vision)).save_pretrained(tmp_path / "base")
    extend(tmp_path / "base", tmp_path / "new")
    longer = {name for name, tensor in stored(tmp_path / "new").items() if tensor.shape[0] == 72}
    assert longer == {"language_model.model.embed_tokens.weight"}
    config = AutoConfig.from_pretrained(tmp_path / "new")
    rows = NewRows(64, 67)
    assert read_new_rows(config) == read_new_rows(config.text_config) == rows
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    for kept in ({VOCABULARY_KEY: None}, {"text_config": {**written["text_config"], VOCABULARY_KEY: None}}):
        edit_config(tmp_path / "new", **{**written, **kept})  # another tool may keep one of the two
        config = AutoConfig.from_pretrained(tmp_path / "new")
        assert read_new_rows(config) == rows
        model = build_on_meta(config)
        share_record(config, model.config)
        assert first_new_row(model) == 64


@pytest.mark.parametrize("tied", [False, True])
def test_attached_at_a_scale_new_rows_are_put_back_whole(tied, tmp_path):
    base_of(tmp_path / "old", tied=tied)
    extend(tmp_path / "old", tmp_path / "base")
    detach_checkpoint(tmp_path / "base", [0, 3], tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.5
    small.save_pretrained(tmp_path / "trained")
    include = ["embedding", "norm", "head"]
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "whole", scale=0.5, include=include)
    base, whole = stored(tmp_path / "base"), stored(tmp_path / "whole")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(base):
        assert torch.allclose(whole[name][:64], base[name][:64] + 0.25, atol=1e-6)
        assert torch.equal(whole[name][64:], base[name][64:] + 0.5), "a new row has nothing to go back to"
    assert torch.allclose(whole["model.norm.weight"], base["model.norm.weight"] + 0.25)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = detach_layers(model, [0, 3])
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.5
    attach_layers(model, trained, scale=0.5, include=include)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_attach_refuses_a_base_with_another_vocabulary(tmp_path):
    base_of(tmp_path / "old")
    extend(tmp_path / "old", tmp_path / "base")
    detach_checkpoint(tmp_path / "base", [0, 3], tmp_path / "small")
    with pytest.raises(EloError, match=r"is not the base.*embed_tokens|lm_head"):
        attach_checkpoint(tmp_path / "small", tmp_path / "old", tmp_path / "whole")
    assert json.loads((tmp_path / "small" / "config.json").read_text())[VOCABULARY_KEY]["rows"]["start"] == 64
