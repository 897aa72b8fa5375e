"""Split text into words as a tokenizer does before it applies its vocabulary, and measure tokens per language.

A vocabulary writes text in its own spelling: " the" is `Ġthe` in byte-level vocabularies and `▁the` in SentencePiece.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, decoders

from elo.data.tokenizing import batched, token_ids
from elo.errors import EloError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Character that represents a space in SentencePiece."""
_AT_SPACES = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_LEVEL = decoders.ByteLevel()
_PART_CHARACTERS = 1 << 18
_SPACE_IN_TEXT = re.compile(r"(?<=\S)\s")


@dataclass(frozen=True)
class Fertility:
    """Sizes of a text.

    Attributes:
        documents: number of documents.
        bytes: size in UTF-8 bytes.
        characters: number of Unicode characters.
        words: number of runs of characters other than white space.
        tokens: number of tokens.
    """

    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Average UTF-8 bytes per token. Higher is better, because the same text takes less compute."""
        return self.bytes / self.tokens

    @property
    def tokens_per_word(self) -> float:
        """Average tokens per word, called fertility. Not meaningful for languages written without spaces."""
        return self.tokens / self.words


def measure_fertility(backend: Tokenizer, texts: Iterable[str]) -> Fertility:
    """Count the tokens of texts, without special tokens.

    Raises:
        EloError: the texts have no tokens.
    """
    documents = size = characters = words = tokens = 0
    for batch in batched(texts):
        documents += len(batch)
        size += sum(len(text.encode()) for text in batch)
        characters += sum(map(len, batch))
        words += sum(len(text.split()) for text in batch)
        tokens += sum(map(len, token_ids(backend, batch)))
    if not tokens:
        raise EloError(
            f"vocab: {documents:,} documents have no tokens: the text is empty, or the tokenizer drops all of it; "
            "check both"
        )
    return Fertility(documents, size, characters, words, tokens)


def split_words(backend: Tokenizer, text: str) -> Iterator[str]:
    """Yield the words of a text in the vocabulary's spelling. No token crosses a word boundary.

    Words are the pieces of the pre-tokenizer. If it does not split text (Llama-2, Gemma), a word begins at each
    SentencePiece space.
    """
    for part in _parts(text):
        yield from _words_of(backend, part)


def _parts(text: str) -> Iterator[str]:
    """Split a long text at white space, because the pre-tokenizer needs hundreds of bytes per character."""
    start = 0
    while start < len(text):
        space = _SPACE_IN_TEXT.search(text, start + _PART_CHARACTERS)
        stop = space.start() if space else len(text)
        yield text[start:stop]
        start = stop


def _words_of(backend: Tokenizer, text: str) -> Iterator[str]:
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    pieces = [text] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
    for piece in pieces:
        if _SPACE in piece[1:]:
            yield from _AT_SPACES.findall(piece)
        elif piece:
            yield piece


class Spelling:
    """Spelling of text in a vocabulary: byte-level letters (GPT-2, Llama-3, Qwen), or SentencePiece."""

    def __init__(self, backend: Tokenizer) -> None:
        state = json.loads(backend.to_str())
        self.byte_level = '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])

    def text(self, piece: str) -> str:
        """Return the text of a token or word, without bytes that form no complete character."""
        return _byte_level_text(piece) if self.byte_level else _sentencepiece_text(piece)


@lru_cache(maxsize=1 << 18)
def _byte_level_text(piece: str) -> str:
    return _BYTE_LEVEL.decode([piece]).replace("\N{REPLACEMENT CHARACTER}", "")


def _sentencepiece_text(piece: str) -> str:
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)]).decode("ascii", errors="ignore")
    return piece.replace(_SPACE, " ")
