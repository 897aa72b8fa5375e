"""A tiny base, tokenizer and two corpora on disk, enough for a whole run in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SOURCE = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "small",
    "red",
    "hen",
    "by",
    "the",
    "old",
    "mill",
    "near",
    "our",
    "town",
]
TARGET = [
    "가나",
    "다라마",
    "바사",
    "아자차",
    "카타",
    "파하",
    "거너",
    "더러",
    "머버",
    "서어",
    "저처",
    "커터",
    "퍼허",
    "고노",
    "도로",
]


def write_documents(path: Path, words: list[str], count: int, seed: int) -> Path:
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = " ".join(generator.choices(words, k=generator.randint(5, 40)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def write_base(
    folder: Path,
    *,
    layers: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    vocab_size: int | None = None,
    tie: bool = False,
) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(SOURCE), " ".join(TARGET)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size or tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def write_world(root: Path) -> dict[str, Any]:
    """Write base and corpora under `root`; return a configuration of a run on them."""
    write_base(root / "base")
    training = {
        "learning_rate": 1e-3,
        "tokens_per_step": 64,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_steps": 2,
        "evaluations": 2,
        "bf16": False,
    }
    return {
        "model": str(root / "base"),
        "output": str(root / "run"),
        "tokens": 1280,
        "data": {
            "target": "xx",
            "source": "en",
            "corpora": {
                "xx": str(write_documents(root / "xx.jsonl", TARGET, 60, 1)),
                "en": str(write_documents(root / "en.jsonl", SOURCE, 30, 2)),
            },
            "heldout_share": 0.1,
            "sequence_length": 32,
            "workers": 1,
        },
        "method": {"name": "elo", "middle": "removed", "share": 0.2},
        "training": training,
        "evaluation": {"prompts": {"en": ["the cat"], "xx": ["가나"]}, "max_new_tokens": 4},
    }
