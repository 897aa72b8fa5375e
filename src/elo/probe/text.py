"""The text of a probe: a few sequences per language, and parallel sentences."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elo.data.sources import FileReader, list_inputs, read_documents
from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError

PAIRS = 48
"""Maximum number of parallel sentences per language."""


@dataclass(frozen=True)
class ProbeText:
    """Token ids: `sequences` [N, T] by language, and parallel `sentences` by language, in the same order."""

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
    """Concatenate the first T tokens of each document and cut the result into sequences [N, T], at least two.

    Raises:
        EloError: the text does not fill two sequences.
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
    """Make sequences of the first documents of a corpus; see `make_sequences`."""
    texts = (text[: 16 * sequence_length] for text in read_documents(path, text_column))
    documents = (document for text in texts for document in tokenizer.encode_documents([text]))
    return make_sequences(language, documents, tokens, sequence_length)


def read_sentences(
    path: str | Path, languages: Sequence[str], tokenizer: TextTokenizer, sequence_length: int
) -> dict[str, list[Tensor]]:
    """Read parallel sentences from a file with one column per language. Rows with an empty sentence are skipped.

    Raises:
        EloError: there are fewer than two languages, the file cannot be read or lacks a column, or no row is complete.
    """
    if len(languages) < 2:
        raise EloError(f"parallel text: {path}: only {', '.join(languages)} has a corpus; give at least two languages")
    try:
        rows = zip(*(_column(path, language) for language in languages), strict=True)
        complete = list(islice((row for row in rows if all(text.strip() for text in row)), PAIRS))
    except EloError as error:
        raise EloError(f"parallel text: {error}; name a file with one column per language") from None
    if not complete:
        raise EloError(f"parallel text: {path}: no row has text in all of {', '.join(languages)}; add such rows")
    return {
        language: [
            torch.from_numpy(ids[:sequence_length].astype(np.int64)) for ids in tokenizer.encode_documents(sentences)
        ]
        for language, sentences in zip(languages, map(list, zip(*complete, strict=True)), strict=True)
    }


def _column(path: str | Path, name: str) -> Iterator[str]:
    """Yield a column of a file with its empty cells, so that the columns of one file stay aligned."""
    for file in list_inputs(str(path)):
        for record in FileReader(file, name).records():
            if record.problem is not None:
                raise EloError(record.problem)
            yield record.text.decode()
