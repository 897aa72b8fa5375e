"""New pieces for a byte-pair tokenizer: learnt on one language, without changing how another is tokenised.

Training goes on where the tokenizer's own stopped: each word of the target text is taken as the tokens it has now, and
byte-pair merges are learnt on top of those (continued BPE training, Purason et al. 2025, arXiv 2512.03989). The new
merges rank behind all old ones, so that the first of them to fire in a word joins two old tokens that stand side by
side in the old tokenisation. Text in which no such pair stands side by side is therefore tokenised exactly as before;
pairs that do so in words of the source language are never joined.
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
# Merges learnt for each piece asked for, since some are left out afterwards.
_SURPLUS = 1.3
# A script with less than this share of a text's letters and symbols is not its language's own, but that of names and
# quotations; nor is a symbol beyond ASCII that is as rare as this.
_OWN_SCRIPT = 0.01
_OWN_SYMBOL = 1e-5
# New characters are taken until they make up this share of all occurrences of unknown ones.
_CHARACTER_COVERAGE = 0.999
# What occurs less often, a pair or a character, is not learnt.
_LEAST_TIMES = 2
_REPEAT = 1000
# First words of the names of letters that tell a script; other letters (ª, µ, 々, ー) belong to several.
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
    """New pieces of a byte-pair vocabulary, the most useful first, and the merges that make them.

    Attributes:
        pieces: new tokens as the vocabulary spells them.
        merges: pairs of tokens, old or new, in their order of rank; a merge may also lead to an old token.
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Identity:
    """How far two tokenizers agree on the same text.

    Attributes:
        documents: compared.
        identical: those with the same ids throughout.
        foreign: those that differ in words of other scripts than the text's own alone (names, quotations).
        words: words of the text's own scripts that are tokenised otherwise, the first few.
    """

    documents: int
    identical: int
    foreign: int
    words: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the language's own words are all tokenised as before."""
        return self.identical + self.foreign == self.documents


class PieceLearner:
    """Learns merges from target text once, and makes extensions of several sizes of them.

    Args:
        backend: a byte-pair tokenizer: byte-level (Llama-3, Qwen) or with byte fallback (Llama-2, Mistral, Gemma).
        target: documents to learn on.
        sources: by language, documents whose words must be tokenised as before. Words that hold letters of scripts
            other than their language's own (less than 1 % of its letters) do not count.
        most: pieces of the largest extension that will be asked for.

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
        spelled = {letter: token for token, letter in letters.items()}
        merges = _train(words, len(letters) + int(_SURPLUS * most) + 1000)
        self._merges = [(_spell(left, spelled), _spell(right, spelled)) for left, right in merges]

    def extension(self, count: int) -> Extension:
        """The extension by `count` pieces: characters that were missing, at most half of them, then merges in order.

        Fewer are given where the text has no more pairs to join.

        Raises:
            EloError: the text gives no new piece.
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
                "vocab: the target text gives no new piece; the tokenizer has all its words, or give more text"
            )
        return Extension(tuple(pieces), tuple(kept))


def extend_tokenizer(backend: Tokenizer, extension: Extension) -> Tokenizer:
    """A tokenizer with the extension's pieces after all the ids that `backend` has; each old id means what it meant."""
    state = require_extendable(backend)
    model = state["model"]
    # Added tokens are numbered from the size of the vocabulary on when a file is read, unless they stand in it.
    for token in state.get("added_tokens") or []:
        model["vocab"].setdefault(token["content"], token["id"])
    next_id = max(model["vocab"].values()) + 1
    for number, piece in enumerate(extension.pieces):
        model["vocab"][piece] = next_id + number
    model["merges"] += [[left, right] for left, right in extension.merges]
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def require_extendable(backend: Tokenizer) -> dict[str, Any]:
    """The tokenizer's state, once it is known to be byte-pair encoding whose merges can be continued.

    Raises:
        EloError: it is of another kind.
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
            f"vocab: this tokenizer cannot be extended: {why}; extend it with the tool it was made with, and give the "
            "result with --tokenizer"
        )
    return state


def compare_tokenizers(old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> Identity:
    """Tokenise texts of one language with both and compare, id by id."""
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
        # Nothing moved word by word: the words themselves are split otherwise, which is no quotation's fault.
        foreign += bool(moved) and not ours
        words.update(dict.fromkeys(ours or ([] if moved else [text[:40]])))
    return Identity(len(texts), len(texts) - len(changed), foreign, tuple(words)[:20])


def require_old_ids(old: Tokenizer, new: Tokenizer, name: str) -> None:
    """Raise EloError where `new` gives an old token another id, or none."""
    ours, theirs = old.get_vocab(), new.get_vocab()
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            found = "has no such token" if token not in theirs else f"gives it id {theirs[token]}"
            raise EloError(
                f"tokenizer {name}: the model's own has {token!r} as id {index}, but this one {found}; an extended "
                "tokenizer keeps all old ids, and numbers its new tokens after them"
            )


class _WordTokenizer:
    """Tokenises words of `split_words`, and tells what their letters are."""

    def __init__(self, backend: Tokenizer) -> None:
        self._model = backend.model
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self.text = Spelling(backend).text
        self._joining: dict[tuple[str, bool], bool] = {}

    def tokenize(self, word: str) -> list[str]:
        """The tokens of a word; characters that the vocabulary has not stand for themselves."""
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
        """The scripts of a word's letters, and its symbols."""
        return {_script(character) for character in self.text(word)} - {""}

    def own_scripts(self, words: Counter[str]) -> set[str]:
        """The scripts of a text of these words, but for those that are hardly used."""
        scripts: Counter[str] = Counter()
        for word, times in words.items():
            for character in self.text(word):
                scripts[_script(character)] += times
        del scripts[""]
        total = sum(scripts.values())
        least = {script: _OWN_SYMBOL if len(script) == 1 else _OWN_SCRIPT for script in scripts}
        return {script for script, times in scripts.items() if times >= total * least[script]}

    def joinable_parts(self, word: str, forbidden: Collection[tuple[str, str]]) -> Iterator[list[str]]:
        """Runs of a word's tokens in which each may be joined to the next: letters and marks, no forbidden pair."""
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
        """Letters and marks after at most one space, or a single character of any kind, or a part of one."""
        return self._joins(piece) or len(self.text(piece).strip()) <= 1

    def _joins(self, token: str, at_start: bool = True) -> bool:
        if (token, at_start) not in self._joining:
            text = self.text(token)
            if at_start and text[:1] == " ":
                text = text[1:]
            self._joining[token, at_start] = all(unicodedata.category(each)[0] in "LM" for each in text)
        return self._joining[token, at_start]


def _used_by(words: Counter[str], tokenizer: _WordTokenizer) -> tuple[set[tuple[str, str]], set[str]]:
    """Neighbouring tokens, and characters, of the words in a text's own scripts."""
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
    """The script of a letter by its Unicode name (LATIN, HANGUL ...), a symbol itself; empty for what all share."""
    category = unicodedata.category(character)
    if category[0] == "L":
        words = unicodedata.name(character, "UNKNOWN").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split()
        return words[0] if words[0] in _SCRIPTS and category != "Lm" else ""
    return character if category[0] in "PS" and not character.isascii() else ""


def _new_characters(words: Counter[str], vocabulary: Collection[str], forbidden: Collection[str]) -> list[str]:
    """Characters that the vocabulary lacks, the most frequent first, until nearly all occurrences are covered."""
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
    """Whether it is white space or a control character, which are the tokenizer's business and no language's."""
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


def _spell(letters: str, spelled: dict[str, str]) -> str:
    return "".join(spelled[letter] for letter in letters)
