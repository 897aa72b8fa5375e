"""A tiny real model and packed rows to train it on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from elo.data.mixture import Mixture
from elo.data.packing import PackedStream
from elo.data.shards import TokenCorpus
from elo.train.arguments import sequences_per_step
from elo.train.loop import TrainingResult, train
from elo.train.settings import DeepSupervision, TrainingSettings

VOCAB = 61
LENGTH = 16
SETTINGS = TrainingSettings(
    learning_rate=3e-3,
    tokens_per_step=4 * LENGTH,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_steps=3,
    evaluations=2,
    bf16=False,
)


def tiny_llama(
    layers: int = 4, *, tie: bool = False, seed: int = 0, width: int = 16, vocab: int = VOCAB
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def corpus(seed: int = 0, documents: int = 60) -> TokenCorpus:
    """Documents in which each token is followed by the next one of a fixed cycle: something to learn."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(documents):
        start, count = generator.integers(1, VOCAB - 1), generator.integers(3, 40)
        texts.append(np.r_[0, 1 + (start + 7 * np.arange(count)) % (VOCAB - 1), 0].astype(np.uint16))
    return TokenCorpus.from_documents(texts, [2 * len(text) for text in texts])


def rows(count: int):
    mixture = Mixture(
        [("xx", 0.9, PackedStream(corpus(1), LENGTH, 1)), ("en", 0.1, PackedStream(corpus(2), LENGTH, 2))], seed=0
    )
    return mixture.sequences(0, count)


def train_steps(
    model: PreTrainedModel, folder: Path, *, steps: int, settings: TrainingSettings = SETTINGS, **options: Any
) -> TrainingResult:
    """Train a model on the first rows."""
    mixture = rows(steps * sequences_per_step(LENGTH, settings))
    return train(model, mixture, settings=settings, output_dir=folder, seed=5, **options)


def supervision(layers: Iterable[int | float], weight: float = 0.5) -> DeepSupervision | None:
    """Losses of one weight at these layers."""
    places = list(layers)
    return DeepSupervision(layers=places, weights=[weight] * len(places)) if places else None
