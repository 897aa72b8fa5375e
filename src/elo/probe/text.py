"""The text of a probe: a few sequences per language, and parallel sentences."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elo.data.sources import read_documents
from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError

PAIRS = 48
"""Number of parallel sentences."""


@dataclass(frozen=True)
class ProbeText:
    """Token ids: `sequences` [N, T] by language, `sentences` by language, in the same order."""

    sequences: Mapping[str, Tensor]
    sentences: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def identity(self) -> str:
        """Identify the text by its token ids."""
        digest = hashlib.sha256()
        for texts in (self.sequences, self.sentences):
            for language, ids in texts.items():
                digest.update(language.encode())
                for row in ids:
                    digest.update(row.numpy().tobytes() + b"|")
        return digest.hexdigest()


def make_sequences(language: str, documents: Iterable[np.ndarray], tokens: int, sequence_length: int) -> Tensor:
    """Fill sequences [N, T] with the first T tokens of each document, one after the other.

    Raises:
        EloError: there is less text than two sequences need.
    """
    wanted = max(2, -(-tokens // sequence_length)) * sequence_length
    pieces: list[np.ndarray] = []
    found = 0
    for document in documents:
        piece = np.asarray(document[:sequence_length], np.int64)
        pieces.append(piece)
        found += len(piece)
        if found >= wanted:
            break
    whole = min(found, wanted) // sequence_length
    if whole < 2:
        raise EloError(
            f"probe: {language}: {found} tokens of text do not fill two sequences of {sequence_length}; give more "
            "text, or a smaller sequence length"
        )
    return torch.from_numpy(np.concatenate(pieces)[: whole * sequence_length].reshape(whole, sequence_length))


def read_sequences(
    language: str, path: str, tokenizer: TextTokenizer, tokens: int, sequence_length: int, text_column: str
) -> Tensor:
    """Fill sequences with the first documents of a corpus; see `make_sequences`."""
    texts = (text[: 16 * sequence_length] for text in read_documents(path, text_column))
    documents = (document for text in texts for document in tokenizer.encode_documents([text]))
    return make_sequences(language, documents, tokens, sequence_length)


def read_sentences(
    path: str | Path, languages: Sequence[str], tokenizer: TextTokenizer, sequence_length: int
) -> dict[str, list[Tensor]]:
    """Read parallel sentences from a file with one column per language.

    Raises:
        EloError: the file cannot be read, or it has columns for fewer than two of the languages.
    """
    found: dict[str, list[str]] = {}
    for language in languages:
        try:
            found[language] = list(islice(read_documents(path, language), PAIRS))
        except EloError as error:
            raise EloError(f"parallel text: {error}; name a file with one column per language") from None
    counts = {len(sentences) for sentences in found.values()}
    if len(found) < 2 or len(counts) > 1:
        listed = ", ".join(f"{language} {len(sentences)}" for language, sentences in found.items())
        raise EloError(f"parallel text: {path}: found sentences {listed}; give the same number for two languages")
    return {
        language: [
            torch.from_numpy(ids[:sequence_length].astype(np.int64)) for ids in tokenizer.encode_documents(sentences)
        ]
        for language, sentences in found.items()
    }
