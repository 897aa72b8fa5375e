"""One reading of a tokenizer: token ids are those of tokenizer.json and of transformers, or both are named."""

import functools
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from bad_input_fixtures import run_elo
from data_fixtures import make_texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer

from elo.data.tokenizer import load_tokenizer
from elo.data.tokenizer_reading import _first_difference
from elo.errors import EloError

_TIKTOKEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEXTS = [
    *make_texts(20, seed=5),
    "Ordinary words, 12345 numbers and WE'RE shouting.",
    "cafe\u0301 naïve ＦＵＬＬ width",
    "한국어 문장이 있다. 2024년",
    "a  b   c\n\n\td  ",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def _byte_level(*steps: pre_tokenizers.PreTokenizer, norm: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if norm is not None:
        tokenizer.normalizer = norm
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*make_texts(300), "12345 1234 2024 " * 50, "WE'RE don't " * 50],
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _sentencepiece(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A BPE with byte fallback, as converters of SentencePiece models write it."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    learnt.train_from_iterator(
        make_texts(300), trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    state = json.loads(learnt.to_str())
    tokenizer = Tokenizer(
        models.BPE(
            vocab=state["model"]["vocab"],
            merges=[tuple(pair) for pair in state["model"]["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@functools.cache
def backend(kind: str) -> Tokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match kind:
        case "gpt2":
            return _byte_level(plain)
        case "neox":
            return _byte_level(plain, norm=normalizers.NFC())
        case "llama3":
            split = pre_tokenizers.Split(Regex(_TIKTOKEN), "isolated")
            return _byte_level(split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        case "spaced":
            return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
        case "llama2":
            marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            return _sentencepiece(marks, None)
        case "metaspace":
            return _sentencepiece(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False))
        case "gemma":
            return _sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))
    raise ValueError(kind)


def write(folder: Path, kind: str, tokenizer_class: str | None, model_type: str) -> Path:
    folder.mkdir(parents=True)
    backend(kind).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if tokenizer_class is not None:
        settings["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoConfig.for_model(model_type).save_pretrained(folder)
    return folder


# What tokenizer.json holds, tokenizer_class, model type; whether transformers reads the same.
COMBINATIONS = [
    ("gpt2", "PreTrainedTokenizerFast", "llama", True),
    ("gpt2", "LlamaTokenizerFast", "llama", True),
    ("gpt2", "LlamaTokenizer", "mistral3", True),
    ("gpt2", "GPT2Tokenizer", "gpt2", True),
    ("gpt2", "GPT2TokenizerFast", "llama", True),
    ("gpt2", "Qwen2Tokenizer", "llama", False),
    ("gpt2", "Qwen2TokenizerFast", "qwen3", False),
    ("gpt2", "GPTNeoXTokenizer", "llama", False),
    ("gpt2", "CohereTokenizer", "llama", False),
    ("gpt2", "CodeLlamaTokenizer", "llama", False),
    ("gpt2", "GemmaTokenizer", "llama", False),
    ("gpt2", None, "llama", True),
    ("gpt2", None, "gemma3", False),
    ("spaced", "GPT2Tokenizer", "llama", False),
    ("spaced", "PreTrainedTokenizerFast", "llama", True),
    ("neox", "GPTNeoXTokenizerFast", "gpt_neox", True),
    ("neox", "GPT2Tokenizer", "llama", False),
    ("neox", "PreTrainedTokenizerFast", "gpt_neox", True),
    ("llama3", "PreTrainedTokenizerFast", "llama", True),
    ("llama3", "LlamaTokenizerFast", "llama4", True),
    ("llama3", "GPT2Tokenizer", "llama", False),
    ("llama3", "Qwen2Tokenizer", "qwen2", False),
    ("llama3", "LlamaTokenizer", "qwen2", False),  # a model type for which transformers prescribes Qwen2Tokenizer
    ("llama3", "CohereTokenizerFast", "cohere", False),
    ("llama2", "LlamaTokenizer", "llama", True),
    ("llama2", "LlamaTokenizerFast", "mistral", True),
    ("llama2", "CodeLlamaTokenizer", "llama", True),
    ("llama2", "GemmaTokenizer", "gemma", False),
    ("metaspace", "LlamaTokenizer", "llama", True),
    ("metaspace", "GPT2Tokenizer", "llama", False),
    ("gemma", "GemmaTokenizer", "gemma3", True),
    ("gemma", "GemmaTokenizerFast", "gemma", True),
    ("gemma", "LlamaTokenizer", "llama", False),
    ("gemma", "PreTrainedTokenizerFast", "gemma3_text", True),
]


@pytest.mark.parametrize(("kind", "tokenizer_class", "model_type", "agrees"), COMBINATIONS)
def test_ids_are_those_of_tokenizer_json_and_of_transformers_or_both_are_named(
    kind: str, tokenizer_class: str | None, model_type: str, agrees: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path / "it", kind, tokenizer_class, model_type)
    wanted = [each.ids for each in backend(kind).encode_batch(TEXTS, add_special_tokens=False)]
    theirs = AutoTokenizer.from_pretrained(folder)
    found = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert not agrees or found == wanted
    if not agrees:
        words = r"ambiguous: .* in tokenizer\.json and .* in transformers, which loads \w+ .*PreTrainedTokenizerFast"
        with pytest.raises(EloError, match=words):
            load_tokenizer(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the cure that the message names
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if model_type == "qwen2":  # for which transformers prescribes the class
            (folder / "config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == wanted
    assert AutoTokenizer.from_pretrained(folder)(TEXTS, add_special_tokens=False)["input_ids"] == wanted
    assert (tokenizer.prefix_token_id, tokenizer.eos_token_id) == (1, 2)


def test_ids_that_only_one_of_the_two_gives_are_shown() -> None:
    letters = "abcdefghij"
    stored, loaded = (Tokenizer(models.BPE({c: i for i, c in enumerate(letters[:n])}, [])) for n in (10, 9))
    assert _first_difference(stored, loaded, [letters]) == (letters, [9], [])


def test_white_space_at_the_start_is_warned_of_and_read_as_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "it", "llama2", "LlamaTokenizer", "llama")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert "white space" in caplog.text and "LlamaTokenizer" in caplog.text
    text = "  two spaces"
    assert tokenizer.encode_batch([text])[0].tolist() == backend("llama2").encode(text, add_special_tokens=False).ids


def test_tokens_of_tokenizer_config_are_there_with_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    folder = write(tmp_path / "it", "gpt2", "PreTrainedTokenizerFast", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == theirs.eos_token_id == backend("gpt2").get_vocab_size()
    assert tokenizer.backend.get_vocab() == theirs.get_vocab()


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_model_alone_names_the_packages_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(EloError, match=r"needs sentencepiece.*pip install sentencepiece") as it:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(it.value)
    (tmp_path / "text.txt").write_text("some text\n")
    status, said = run_elo(["vocab", "measure", tmp_path, "--corpus", f"en={tmp_path / 'text.txt'}"], capsys)
    assert status == 2 and "sentencepiece" in said
