"""Learn new pieces for a byte-pair tokenizer from one language, without changing the tokens of another.

This continues the tokenizer's training (continued byte-pair training, Purason et al. 2025, arXiv 2512.03989): each word
of the target text is split into its current tokens, and byte-pair merges are learnt on top of them. The new merges rank
after all old ones, so the first new merge in a word joins two tokens that are adjacent in the old tokenisation. Text
without such a pair is therefore tokenised exactly as before. Pairs that are adjacent in words of the source language
are never joined.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from elo.data.tokenizing import batched, token_ids
from elo.errors import EloError
from elo.vocab.words import Spelling, split_words

# A private character for every token, so that the tokenizers library can train on tokens as if they were letters.
_FIRST_CODE_POINT = 0x10000
# Merges learnt per requested piece, since some are discarded afterwards.
_SURPLUS = 1.3
# A script with a smaller share of a text's letters and symbols comes from names and quotations, not from its language.
_OWN_SCRIPT = 0.01
# The same limit for a single symbol outside ASCII.
_OWN_SYMBOL = 1e-5
# New characters are added until they cover this share of the occurrences of unknown characters.
_CHARACTER_COVERAGE = 0.999
# Pairs and characters that occur less often are not learnt.
_LEAST_TIMES = 2
# Most times that a word is repeated in one string for the trainer, so that frequent words take few strings.
_REPEAT = 1000
# First words of Unicode names that identify a script; other letters (ª, µ, 々, ー) belong to several scripts.
_SCRIPTS = frozenset(
    """
    ADLAM ARABIC ARMENIAN BALINESE BAMUM BENGALI BOPOMOFO BUGINESE CANADIAN CHAM CHEROKEE CJK COPTIC CYRILLIC DEVANAGARI
    ETHIOPIC GEORGIAN GLAGOLITIC GOTHIC GREEK GUJARATI GURMUKHI HANGUL HEBREW HIRAGANA JAVANESE KANNADA KATAKANA KHMER
    LAO LATIN LEPCHA LIMBU LISU MALAYALAM MONGOLIAN MYANMAR NKO OGHAM OL ORIYA RUNIC SINHALA SUNDANESE SYRIAC TAGALOG
    TAI TAMIL TELUGU THAANA THAI TIBETAN TIFINAGH VAI YI
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Extension:
    """New pieces of a byte-pair vocabulary, the most useful first, and the merges that produce them.

    Attributes:
        pieces: new tokens in the vocabulary's spelling.
        merges: pairs of old or new tokens in order of rank. The result of a merge may also be an old token.
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Identity:
    """Agreement of two tokenizers on the same text.

    Attributes:
        documents: number of documents compared.
        identical: number of documents whose ids are all equal.
        foreign: number of documents that differ only in words of foreign scripts (names, quotations).
        words: first few words of the text's own scripts with different tokens.
    """

    documents: int
    identical: int
    foreign: int
    words: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all words of the language's own scripts keep their tokens."""
        return self.identical + self.foreign == self.documents


class PieceLearner:
    """Learns merges from target text once, to build extensions of several sizes.

    Args:
        backend: a byte-pair tokenizer, byte-level (Llama-3, Qwen) or with byte fallback (Llama-2, Mistral, Gemma).
        target: documents to learn from.
        sources: for each source language, documents whose words must keep their tokens. Words with letters of foreign
            scripts (less than 1 % of the language's letters) are ignored.
        most: number of pieces in the largest extension that will be requested.

    Raises:
        EloError: the tokenizer is of another kind, or the target text is empty.
    """

    def __init__(
        self,
        backend: Tokenizer,
        target: Iterable[str],
        sources: Iterable[Iterable[str]],
        most: int,
    ) -> None:
        require_extendable(backend)
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self._taken = backend.get_vocab(with_added_tokens=True)
        self._words = _WordTokenizer(backend)
        target_words = Counter(word for text in target for word in split_words(backend, text))
        if not target_words:
            raise EloError("vocab: the target text is empty; give text to learn pieces from")
        forbidden_pairs: set[tuple[str, str]] = set()
        forbidden_characters: set[str] = set()
        for source in sources:
            pairs, characters = _used_by(
                Counter(word for text in source for word in split_words(backend, text)), self._words
            )
            forbidden_pairs |= pairs
            forbidden_characters |= characters
        self._characters = _new_characters(target_words, self._taken, forbidden_characters)

        letters: dict[str, str] = {}
        words: Counter[str] = Counter()
        for word, times in target_words.items():
            for part in self._words.joinable_parts(word, forbidden_pairs):
                written = "".join(letters.setdefault(token, chr(_FIRST_CODE_POINT + len(letters))) for token in part)
                words[written] += times
        tokens = {letter: token for token, letter in letters.items()}
        merges = _train(words, len(letters) + int(_SURPLUS * most) + 1000)
        self._merges = [(_as_piece(left, tokens), _as_piece(right, tokens)) for left, right in merges]

    def extension(self, count: int) -> Extension:
        """Build an extension of `count` pieces: missing characters (at most half), then merges in order of rank.

        It has fewer pieces if the text has no more pairs to join.

        Raises:
            EloError: the text yields no new piece.
        """
        pieces = self._characters[: count // 2]
        known = {*self._vocabulary, *pieces}
        kept = []
        for left, right in self._merges:
            piece = left + right
            if left not in known or right not in known or not self._words.is_wanted(piece):
                continue
            if piece in self._taken and piece not in self._vocabulary:
                continue  # an added token, which no merge makes
            if piece not in known:
                if len(pieces) == count:
                    break
                known.add(piece)
                pieces.append(piece)
            kept.append((left, right))
        if not pieces:
            raise EloError(
                "vocab: the target text yields no new piece, because the tokenizer has all its words or the text is "
                "short; give more text"
            )
        return Extension(tuple(pieces), tuple(kept))


def extend_tokenizer(backend: Tokenizer, extension: Extension) -> Tokenizer:
    """Return a tokenizer with the extension's pieces after all ids of `backend`. Old ids keep their tokens."""
    state = require_extendable(backend)
    model = state["model"]
    # Loading numbers added tokens from the size of the vocabulary, unless the vocabulary contains them.
    for token in state.get("added_tokens") or []:
        model["vocab"].setdefault(token["content"], token["id"])
    next_id = max(model["vocab"].values()) + 1
    for number, piece in enumerate(extension.pieces):
        model["vocab"][piece] = next_id + number
    model["merges"] += [[left, right] for left, right in extension.merges]
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def require_extendable(backend: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer's state after checking that it uses byte-pair encoding whose merges can be continued.

    Raises:
        EloError: the tokenizer is of another kind.
    """
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    kind = model.get("type", type(backend.model).__name__)
    why = None
    if kind == "Unigram":
        why = "a Unigram tokenizer splits any text into its most probable pieces, so a new piece changes old text too"
    elif kind != "BPE":
        why = f"a {kind} tokenizer has no merges that could be continued"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        why = "its tokens are marked by their place in the word, which is not supported"
    elif model.get("dropout"):
        why = "it drops merges at random"
    if why is not None:
        raise EloError(
            f"vocab: this tokenizer cannot be extended: {why}; extend it with the tool that made it and give the "
            "result with --tokenizer"
        )
    return state


def compare_tokenizers(old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> Identity:
    """Tokenise texts of one language with both tokenizers and compare the ids."""
    changed = []
    for batch in batched(texts):
        both = zip(batch, token_ids(old, batch), token_ids(new, batch), strict=True)
        changed += [text for text, a, b in both if not np.array_equal(a, b)]
    words_old, words_new = _WordTokenizer(old), _WordTokenizer(new)
    scripts = words_old.own_scripts(Counter(word for text in texts for word in split_words(old, text)))
    foreign, words = 0, dict[str, None]()
    for text in changed:
        moved = [word for word in set(split_words(old, text)) if words_old.tokenize(word) != words_new.tokenize(word)]
        ours = sorted(words_old.text(word) for word in moved if words_old.scripts(word) <= scripts)
        # If no word changed, the text is split into other words, which foreign words cannot explain.
        foreign += bool(moved) and not ours
        words.update(dict.fromkeys(ours or ([] if moved else [text[:40]])))
    return Identity(len(texts), len(texts) - len(changed), foreign, tuple(words)[:20])


def require_old_ids(old: Tokenizer, new: Tokenizer, name: str) -> None:
    """Raise EloError if `new` gives an old token another id, or none."""
    ours, theirs = old.get_vocab(), new.get_vocab()
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            found = "has no such token" if token not in theirs else f"gives it id {theirs[token]}"
            raise EloError(
                f"tokenizer {name}: the model's tokenizer has {token!r} as id {index}, but this one {found}; give an "
                "extended tokenizer that keeps all old ids and numbers new tokens after them"
            )


class _WordTokenizer:
    """Tokenises words of `split_words`, and classifies their letters by script."""

    def __init__(self, backend: Tokenizer) -> None:
        self._model = backend.model
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self.text = Spelling(backend).text
        self._joining: dict[tuple[str, bool], bool] = {}

    def tokenize(self, word: str) -> list[str]:
        """Return the tokens of a word. Characters that are not in the vocabulary are returned unchanged."""
        if all(each in self._vocabulary for each in word):
            return [token.value for token in self._model.tokenize(word)]
        tokens: list[str] = []
        start = 0
        for end in range(len(word) + 1):
            if end == len(word) or word[end] not in self._vocabulary:
                if end > start:
                    tokens += [token.value for token in self._model.tokenize(word[start:end])]
                tokens += word[end : end + 1]
                start = end + 1
        return tokens

    def scripts(self, word: str) -> set[str]:
        """Return the scripts of a word's letters, and its symbols."""
        return {_script(character) for character in self.text(word)} - {""}

    def own_scripts(self, words: Counter[str]) -> set[str]:
        """Return the scripts and symbols of a text of these words, without those that are very rare."""
        scripts: Counter[str] = Counter()
        for word, times in words.items():
            for character in self.text(word):
                scripts[_script(character)] += times
        del scripts[""]
        total = sum(scripts.values())
        least = {script: _OWN_SYMBOL if len(script) == 1 else _OWN_SCRIPT for script in scripts}
        return {script for script, times in scripts.items() if times >= total * least[script]}

    def joinable_parts(self, word: str, forbidden: Collection[tuple[str, str]]) -> Iterator[list[str]]:
        """Yield runs of a word's tokens whose neighbours may be joined: letters and marks, no forbidden pair."""
        part: list[str] = []
        for token in self.tokenize(word):
            if part and ((part[-1], token) in forbidden or not (self._joins(part[-1]) and self._joins(token, False))):
                if len(part) > 1:
                    yield part
                part = []
            part.append(token)
        if len(part) > 1:
            yield part

    def is_wanted(self, piece: str) -> bool:
        """Return whether a piece is letters and marks after at most one space, or at most one character of any kind."""
        return self._joins(piece) or len(self.text(piece).strip()) <= 1

    def _joins(self, token: str, at_start: bool = True) -> bool:
        """Return whether a token consists of letters and marks, after a space if it may be `at_start` of a piece."""
        if (token, at_start) not in self._joining:
            text = self.text(token)
            if at_start and text[:1] == " ":
                text = text[1:]
            self._joining[token, at_start] = all(unicodedata.category(each)[0] in "LM" for each in text)
        return self._joining[token, at_start]


def _used_by(words: Counter[str], tokenizer: _WordTokenizer) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the adjacent token pairs and the characters of the words in a text's own scripts."""
    scripts = tokenizer.own_scripts(words)
    pairs: set[tuple[str, str]] = set()
    characters: set[str] = set()
    for word in words:
        if tokenizer.scripts(word) <= scripts:
            tokens = tokenizer.tokenize(word)
            pairs.update(pairwise(tokens))
            characters.update(word)
    return pairs, characters


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """Return a letter's script by its Unicode name (LATIN, HANGUL), a symbol itself, or "" for shared characters."""
    category = unicodedata.category(character)
    if category[0] == "L":
        words = unicodedata.name(character, "UNKNOWN").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split()
        return words[0] if words[0] in _SCRIPTS and category != "Lm" else ""
    return character if category[0] in "PS" and not character.isascii() else ""


def _new_characters(words: Counter[str], vocabulary: Collection[str], forbidden: Collection[str]) -> list[str]:
    """List characters missing in the vocabulary, most frequent first, until nearly all occurrences are covered."""
    unknown: Counter[str] = Counter()
    for word, times in words.items():
        for character in word:
            if character not in vocabulary and character not in forbidden and not _is_blank(character):
                unknown[character] += times
    chosen: list[str] = []
    covered, enough = 0, _CHARACTER_COVERAGE * sum(unknown.values())
    for character, times in sorted(unknown.items(), key=lambda item: (-item[1], item[0])):
        if covered >= enough or times < _LEAST_TIMES:
            break
        chosen.append(character)
        covered += times
    return chosen


def _is_blank(character: str) -> bool:
    """Return whether this is white space or a control character, which belong to no language."""
    return unicodedata.category(character)[0] in "ZC"


def _train(words: Counter[str], size: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=_LEAST_TIMES, special_tokens=[], show_progress=False)

    def lines() -> Iterator[str]:
        for word, times in sorted(words.items()):
            for _ in range(times // _REPEAT):
                yield f"{word} " * _REPEAT
            yield f"{word} " * (times % _REPEAT)

    tokenizer.train_from_iterator(lines(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]


def _as_piece(letters: str, tokens: dict[str, str]) -> str:
    return "".join(tokens[letter] for letter in letters)
