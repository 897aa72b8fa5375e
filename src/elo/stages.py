"""The stages of a run: each makes one output folder from its arguments and returns a JSON record.

`elo.run` and `elo.compare` call them through `RunFolder.once`, which skips what is done.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elo.data.mixture import MixtureRows
from elo.data.prepare import corpus_identity, corpus_sources, prepare, tokenizer_identity
from elo.data.shards import PreparedData
from elo.evaluate.evaluate import evaluate
from elo.evaluate.loading import load_model
from elo.evaluate.scale_search import search_scale
from elo.methods import Method, Phase, Setup
from elo.store.run_folder import Artifact, file_identity
from elo.surgery.detach_attach import attach, detach
from elo.surgery.scale_change import scale_change
from elo.train.bridge import BRIDGE_FILE, Bridge, choose_bridge
from elo.train.peak_memory import peak_memory_bytes, reset_peak_memory
from elo.train.phase import heldout_evaluator, train_checkpoint
from elo.train.settings import TrainingSettings


class Measured:
    """Data that a model is measured on, with an identity for stages.

    Attributes:
        prepared: token shards.
        languages: target first, then source.
    """

    def __init__(self, prepared: PreparedData, languages: Sequence[str], split: str = "heldout") -> None:
        self.prepared, self.languages, self.split = prepared, tuple(languages), split

    def identity(self) -> dict[str, str]:
        return {language: self.prepared.heldout(language).fingerprint for language in self.languages}
