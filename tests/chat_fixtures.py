"""A tiny base and chat model with ChatML's tokens, and bilingual conversations, for the tests of chat stages."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from run_fixtures import SOURCE, TARGET, write_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from elo.data.chat_template import TEMPLATES


def write_conversations(path: Path, words: list[str], count: int, seed: int) -> Path:
    """Different questions that name a word; the answer repeats it."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            word = draw.choice(words)
            messages = [{"role": "user", "content": f"{number} say {word}"}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def write_chat_world(root: Path) -> dict[str, Any]:
    """Write a base, its chat model, corpora and conversations; return a configuration with the section `chat`."""
    config = write_world(root)
    config["method"] = "full"
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name, seed in (("base", 1), ("chat", 2)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, dtype=parameter.dtype)
        if name == "chat":
            tokenizer.chat_template = TEMPLATES["chatml"]
            tokenizer.eos_token = "<|im_end|>"
            model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    config["chat"] = {
        "model": str(root / "chat"),
        "data": {
            "ko": [str(write_conversations(root / "chat-ko.jsonl", TARGET, 40, 1))],
            "en": str(write_conversations(root / "chat-en.jsonl", SOURCE, 40, 2)),
        },
        "sequence_length": 64,
        "epochs": 1,
        "training": {"tokens_per_step": 128, "save_steps": 2, "logging_steps": 2, "bf16": False, "learning_rate": 1e-2},
        "prompts": 4,
        "max_new_tokens": 8,
    }
    return config
