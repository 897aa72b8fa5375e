"""Small tokenizers of the kinds that language models come with, and text of two scripts."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    "the cat sat on a mat and saw one small red hen by the old mill near our town while several other people were "
    "walking slowly towards that river because nobody had told them about bridges",
    "강물 돌다리 등불 푸른 천천히 걷는다 사람들이 이야기를 나누었다 오래된 물레방아 마을에서 다시 만났습니다",
    "etxea ibaia etxetik ibaitik zubian zubitik mendia menditik gizona gizonak ikusi zuen handia txikia",
)
ENGLISH, KOREAN, BASQUE = (words.split() for words in _WORDS)


def texts(words: list[str], count: int, seed: int, quoted: list[str] = ()) -> list[str]:  # type: ignore[assignment]
    """Documents of `words`, some with a word of `quoted` in them."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        chosen = generator.choices(words, k=generator.randint(8, 60))
        if quoted and generator.random() < 0.2:
            chosen.insert(3, generator.choice(quoted))
        made.append(" ".join(chosen).capitalize() + generator.choice([".", " (1984).", "!\n\nNext, 25 %."]))
    return made


def byte_level(words: list[str] = ENGLISH) -> Tokenizer:
    """As GPT-2, Llama-3 and Qwen: BPE on bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(words, 200, 0), trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama-2, Mistral and Gemma: BPE on characters, bytes for those it has not."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trainer.vocab_size += 256
    tokenizer.train_from_iterator(texts(ENGLISH, 200, 0), trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def _parts(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer as transformers makes it for a family; some have special tokens after the vocabulary."""
    if kind == "fast":
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>", bos_token="<bos>")
    if kind == "qwen":
        vocabulary, merges = _parts(byte_level())
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return tokenizer
    vocabulary, merges = _parts(byte_fallback())
    if kind == "gemma":
        renamed = {"<s>": "<bos>", "</s>": "<eos>"}
        vocabulary = {renamed.get(token, token): index for token, index in vocabulary.items()}
        vocabulary["<pad>"] = len(vocabulary)
        return GemmaTokenizer(vocab=vocabulary, merges=merges)
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


KINDS = ("fast", "qwen", "llama", "gemma")


def write_texts(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path
