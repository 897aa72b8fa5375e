"""Load and save a model's fast tokenizer, and define the two tokens that frame every document."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from elo.checkpoint.download import fetch_checkpoint
from elo.checkpoint.local_names import require_path_or_id
from elo.data.shards import token_dtype
from elo.data.text_loss import special_spellings, text_encoder
from elo.data.tokenizer_reading import one_reading, read_stored, require_sentencepiece
from elo.data.tokenizing import TextChecker, encode_documents
from elo.errors import EloError, error_line
from elo.store.remote import is_remote

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A fast tokenizer for plain text: no chat template, no truncation, no padding."""

    name: str
    backend: Tokenizer
    prefix_token_id: int
    """First token of every document, the context of its first text token: bos, or eos for families without a bos."""
    eos_token_id: int
    """Last token of every document."""
    vocab_size: int
    """Highest token id plus one, including added tokens."""
    base_vocab_size: int
    """Highest token id plus one, without added tokens."""
    sha256: str
    """SHA-256 of the tokenizer's content."""
    split_special_tokens: bool = True
    """Whether special tokens that occur in a text are tokenised as text, not as special tokens."""

    @cached_property
    def special_tokens(self) -> list[str]:
        """Text of the special tokens, except tokens of one character."""
        return special_spellings(self.backend, {self.prefix_token_id, self.eos_token_id})

    @cached_property
    def encoder(self) -> Tokenizer:
        """Tokenizer that encodes text: `backend`, or a copy that encodes special tokens as text."""
        return text_encoder(self.backend, self.special_tokens) if self.split_special_tokens else self.backend

    @cached_property
    def checker(self) -> TextChecker:
        """Counter of special tokens in text, and of text that the tokenizer loses."""
        return TextChecker(self.backend, self.special_tokens)

    @property
    def dtype(self) -> np.dtype:
        """Type of token ids in shards of this tokenizer."""
        return token_dtype(self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, without prefix and eos."""
        encodings = self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, without prefix and eos."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text in stored form: prefix, text tokens, eos."""
        return self._split(*self._encode(texts))

    def encode_and_check(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the result of `encode_documents`, and the `TextCounts` of each text, int64 [texts, 3]."""
        tokens, lengths = self._encode(texts)
        checked = np.ones(len(texts), np.bool_)
        return self._split(tokens, lengths), self.checker.count(self.encoder, texts, tokens, lengths, checked)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_documents(self.encoder, list(texts), self.prefix_token_id, self.eos_token_id, self.dtype)

    @staticmethod
    def _split(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def check_embedding(self, rows: int, where: str = "the model") -> None:
        """Raise EloError if this cannot be the tokenizer of a model with `rows` embedding rows.

        Added tokens beyond the embedding are accepted here (Gemma 3 1B has one). Text that uses them is rejected later.
        """
        highest = max(self.base_vocab_size - 1, self.prefix_token_id, self.eos_token_id)
        if highest >= rows:
            raise EloError(
                f"tokenizer {self.name}: gives token ids up to {highest}, but {where} has {rows} embedding rows; "
                "give the tokenizer that belongs to the model"
            )


def load_tokenizer(path_or_id: str | Path, trust_remote_code: bool = False) -> TextTokenizer:
    """Load the fast tokenizer of a checkpoint folder or a Hugging Face hub id.

    Raises:
        EloError: there is no tokenizer or only a slow one, it has neither a bos nor an eos token, or transformers
            loads a different one than tokenizer.json holds.
    """
    return load_with_settings(path_or_id, trust_remote_code)[1]


def load_with_settings(path_or_id: str | Path, trust_remote_code: bool = False) -> tuple[Any, TextTokenizer]:
    """Load a tokenizer as `load_tokenizer` does; return transformers' tokenizer and the `TextTokenizer`."""
    name = str(path_or_id).removeprefix("hf://")
    remote = is_remote(path_or_id)
    folder = fetch_checkpoint(str(path_or_id), trust_remote_code, weights=False) if remote else Path(name)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise EloError(
                f"{folder}: has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); give a folder with a tokenizer"
            )
        require_sentencepiece(folder)
    else:
        require_path_or_id(name, "give a folder with a tokenizer, or a Hugging Face hub id")
    source = str(folder) if folder.is_dir() else name
    tokenizer = _load(source, trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise EloError(
            f"{name}: has only a slow tokenizer ({type(tokenizer).__name__}); give one with a tokenizer.json, "
            "as save_pretrained of a fast tokenizer writes it"
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise EloError(
            f"{name}: the tokenizer has neither a bos nor an eos token, so documents cannot be separated; "
            "set eos_token in its tokenizer_config.json"
        )
    stored = read_stored(source)
    if stored is not None:
        backend = one_reading(stored, backend, name, type(tokenizer).__name__)
    return tokenizer, wrap_tokenizer(backend, bos, eos, name)


def wrap_tokenizer(backend: Tokenizer, bos: int | None, eos: int | None, name: str) -> TextTokenizer:
    """Wrap a copy of `backend` in a `TextTokenizer`; at least one of `bos` and `eos` is needed."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    prefix = bos if bos is not None else eos
    end = eos if eos is not None else bos
    if prefix is None or end is None:
        raise ValueError("neither bos nor eos")
    highest = max([*backend.get_vocab(with_added_tokens=True).values(), prefix, end])
    base = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return TextTokenizer(name, backend, prefix, end, highest + 1, base + 1, digest)


def save_with_backend(
    path_or_id: str | Path, backend: Tokenizer, folder: Path, trust_remote_code: bool = False
) -> None:
    """Write a tokenizer's files into `folder`, with its settings and chat template but another `backend`.

    Raises:
        EloError: loading the files does not give the same tokenizer, as with some tokenizer classes.
    """
    tokenizer = _load(str(path_or_id), trust_remote_code)
    tokenizer._tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # some classes also write these, with the old vocabulary
        (folder / name).unlink(missing_ok=True)
    try:
        copied = Tokenizer.from_str(backend.to_str())
        one_reading(copied, _load(str(folder), trust_remote_code).backend_tokenizer, str(folder), "transformers")
    except EloError:
        raise EloError(
            f"{path_or_id}: {type(tokenizer).__name__} loses an extended vocabulary when it is saved and loaded; "
            "extend it with the tool that made it and give the result with --tokenizer"
        ) from None


def _load(name: str, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise EloError(
            f"{name}: its tokenizer cannot be loaded ({type(error).__name__}: {error_line(error)}); to load "
            'tokenizer.json unchanged, write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        ) from None
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        if type(error) is not Exception:
            raise
        raise EloError(f"{name}: its tokenizer.json is damaged ({str(error)[:300]}); fetch it again") from None
