"""Tiny real models, a byte-level tokenizer and corpora in memory, for the tests of evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from elo.data.shards import TokenCorpus
from elo.data.tokenizer import TextTokenizer, wrap_tokenizer

TEXTS = [
    "The river runs past the mill and the miller counts the sacks of grain before the evening bell.",
    "고양이가 창가에 앉아 있다. 비가 온다.",
    "a",
    "No one knew why the lamp was lit. " * 6,
    "Bread, salt and water: that is all the ferryman ever asked of anyone who crossed.",
    "산 너머 마을에는 우물이 하나 있고 그 물은 달다.",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries with only an end-of-text token, as GPT-2's has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def text_tokenizer() -> TextTokenizer:
    """The same, as the data part wraps it."""
    tokenizer = tiny_tokenizer()
    return wrap_tokenizer(tokenizer.backend_tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, "tiny")


SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "gemma3_text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
    },
}


def tiny_model(model_type: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers; weights wide enough for every token of context to matter."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, **SIZES[model_type]} if model_type != "gpt2" else SIZES[model_type]
    config = CONFIG_MAPPING[model_type](vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15.0)
    return model


def memory_corpus(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> TokenCorpus:
    """Documents tokenised in memory, laid out as token shards are: prefix, text, end of text."""
    end = tokenizer.eos_token_id
    documents = [
        np.asarray([end, *tokenizer(text, add_special_tokens=False)["input_ids"], end], np.uint16) for text in texts
    ]
    return TokenCorpus.from_documents(documents, [len(text.encode()) for text in texts])
