"""Train with only those vocabulary rows that the text uses, and restore the whole vocabulary afterwards.

In a small model with a large vocabulary, most parameters are in the embedding and LM head, but the text of a run uses
only a fraction of their rows (Vocabulary Trimming, arXiv 2305.15020). Training keeps the rows that its text uses, the
special tokens, and a random sample of the others, so that the softmax still accounts for unused tokens.
Shapes: K kept vocabulary rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.counting import read_config
from elo.checkpoint.model_config import text_config_of
from elo.data.packing import IGNORE_INDEX
from elo.data.shards import PreparedData
from elo.errors import EloError
from elo.store.files import read_json

_TOKENS_AT_A_TIME = 1 << 24


def choose_rows(
    data: PreparedData, base: Path | str, *, sample: int, seed: int, trust_remote_code: bool = False
) -> np.ndarray:
    """Return the ids of the rows that training computes with, ascending: int64 [K].

    All training text counts, not only the sequences that the run reads. Otherwise, rows that only other text of these
    languages needs would be left out of training and lose probability (dev/LOG.md, section 23).

    Args:
        data: prepared data, whose training shards are counted.
        base: checkpoint folder or hub id, whose configuration names the special tokens.
        sample: number of unused rows to draw at random and keep.
        seed: seed of the draw.
        trust_remote_code: run code that ships with the checkpoint.
    """
    config = text_config_of(read_config(str(base), trust_remote_code=trust_remote_code))
    used = np.zeros(int(config.vocab_size), bool)
    for language in data.languages:
        for corpus in data.train(language):
            for shard in corpus.shards:
                tokens = shard.arrays.tokens
                for start in range(0, len(tokens), _TOKENS_AT_A_TIME):
                    used[np.unique(tokens[start : start + _TOKENS_AT_A_TIME])] = True
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        ids = getattr(config, name, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and 0 <= token < len(used):
                used[token] = True
    used[[data.prefix_token_id, data.eos_token_id]] = True
    others = np.flatnonzero(~used)
    drawn = np.random.default_rng(seed).choice(others, min(sample, len(others)), replace=False)
    used[drawn] = True
    return np.flatnonzero(used)


class VocabularyCut:
    """Embedding and LM head of a model, reduced to some of their rows during training. The other rows do not change."""

    def __init__(self, model: PreTrainedModel, rows_file: Path) -> None:
        """Reduce `model` to the rows that `rows_file` lists.

        Raises:
            EloError: the file lists no rows, or rows that the model does not have.
        """
        self.ids = torch.tensor(read_json(rows_file), dtype=torch.int64)
        parts = find_architecture(model)
        modules = [model.get_submodule(path) for path in (parts.embedding_path, parts.head_path)]
        self._whole: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._cut: dict[int, nn.Parameter] = {}
        num_rows = len(modules[0].weight)  # type: ignore[arg-type]
        if not len(self.ids) or int(self.ids[-1]) >= num_rows:
            raise EloError(f"{rows_file}: lists no rows, or rows beyond the model's {num_rows}; restart the run")
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                self._whole.append((module, name, parameter))
        self._lookup = torch.full((num_rows,), -1, dtype=torch.int64)
        self._lookup[self.ids] = torch.arange(len(self.ids))
        self._embedding, self._padding_idx = modules[0], getattr(modules[0], "padding_idx", None)
        self.install()

    def install(self) -> None:
        """Install the chosen rows as the weights of embedding and head."""
        for module, name, whole in self._whole:
            if id(whole) not in self._cut:
                chosen = whole.detach()[self.ids.to(whole.device)].clone()
                rows = nn.Parameter(chosen, requires_grad=whole.requires_grad)
                self._cut[id(whole)] = rows
            setattr(module, name, self._cut[id(whole)])
        if self._padding_idx is not None:
            place = int(self._lookup[self._padding_idx])
            self._embedding.padding_idx = place if place >= 0 else None  # type: ignore[assignment]

    def restore(self) -> None:
        """Install the whole weights again, with the trained values of the chosen rows."""
        with torch.no_grad():
            for module, name, whole in self._whole:
                rows = self._cut[id(whole)]
                whole.requires_grad_(rows.requires_grad)
                whole.data = whole.data.to(rows.device)
                whole.data[self.ids.to(rows.device)] = rows.detach().to(whole.dtype)
                setattr(module, name, whole)
        if self._padding_idx is not None:
            self._embedding.padding_idx = self._padding_idx

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Restore the whole vocabulary within the context, for measurements during training."""
        self.restore()
        try:
            yield
        finally:
            self.install()

    def first_row(self, first: int) -> int:
        """Return the position among the chosen rows of the first one whose id is at least `first`."""
        return int(torch.searchsorted(self.ids, first))

    def renumber(self, ids: Tensor) -> Tensor:
        """Convert token ids to positions among the chosen rows. Ignored labels (-100) remain unchanged.

        Raises:
            EloError: a token is not among the chosen rows.
        """
        ignored = ids == IGNORE_INDEX
        places = self._lookup[ids.masked_fill(ignored, int(self.ids[0]))]
        if bool((places < 0).any()):
            raise EloError("training.vocabulary: corpus: the text has tokens that were not counted; prepare it again")
        return places.masked_fill_(ignored, IGNORE_INDEX)


class CutSequences(Dataset[dict[str, Any]]):
    """Sequences whose token ids are positions among the chosen rows."""

    def __init__(self, sequences: Any, cut: VocabularyCut) -> None:
        self.sequences, self.cut = sequences, cut

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.sequences[index])
        for name in ("input_ids", "shift_labels"):
            row[name] = self.cut.renumber(torch.as_tensor(row[name])).numpy()
        return row
