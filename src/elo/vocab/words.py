"""Words as a tokenizer sees them before it looks at its vocabulary, and how many tokens a language takes."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, decoders

from elo.data.tokenizing import batched, token_ids
from elo.errors import EloError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""
_AT_SPACES = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_LEVEL = decoders.ByteLevel()
_PART_CHARACTERS = 1 << 18
_SPACE_IN_TEXT = re.compile(r"(?<=\S)\s")


@dataclass(frozen=True)
class Fertility:
    """How many tokens some text takes.

    Attributes:
        words: runs of anything but white space.
    """

    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a token stands for on average: the more, the less there is to compute."""
        return self.bytes / self.tokens

    @property
    def tokens_per_word(self) -> float:
        """What the literature calls fertility; means little for languages that are written without spaces."""
        return self.tokens / self.words


def measure_fertility(backend: Tokenizer, texts: Iterable[str]) -> Fertility:
    """Count the tokens of texts, without special tokens.

    Raises:
        EloError: there are none.
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
            f"vocab: {documents:,} documents make no token at all; the text is empty, or the tokenizer drops all of it"
        )
    return Fertility(documents, size, characters, words, tokens)


def split_words(backend: Tokenizer, text: str) -> Iterator[str]:
    """The pieces of a text that no token spans, spelled as the vocabulary spells them.

    They are what the pre-tokenizer gives; where it leaves texts whole (Llama-2, Gemma), each SentencePiece space begins
    one.
    """
    for part in _parts(text):
        yield from _words_of(backend, part)


def _parts(text: str) -> Iterator[str]:
    """A long text in parts that begin at white space: the pre-tokenizer needs hundreds of bytes a character."""
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
    """How a vocabulary writes text: in byte-level letters (GPT-2, Llama-3, Qwen), or in SentencePiece's way."""

    def __init__(self, backend: Tokenizer) -> None:
        state = json.loads(backend.to_str())
        self.byte_level = '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])

    def text(self, piece: str) -> str:
        """The text that a token or word stands for; bytes that make no whole character are left out."""
        return _byte_level_text(piece) if self.byte_level else _sentencepiece_text(piece)


@lru_cache(maxsize=1 << 18)
def _byte_level_text(piece: str) -> str:
    return _BYTE_LEVEL.decode([piece]).replace("\N{REPLACEMENT CHARACTER}", "")


def _sentencepiece_text(piece: str) -> str:
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)]).decode("ascii", errors="ignore")
    return piece.replace(_SPACE, " ")
