"""Read the tokenizer of a folder from tokenizer.json, and verify that transformers loads the same one.

transformers rebuilds some tokenizer classes from the vocabulary of tokenizer.json, with the normalizer and
pre-tokenizer of the class. If `tokenizer_class` names another family than the one that wrote the file, token ids
silently differ from those that the model was trained on.
"""

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils import cached_file

from elo.errors import EloError

log = logging.getLogger(__name__)

_PROBES = (
    "Hello, world! It's 7:30; they're here, and he'll say \"don't\" (twice). WE'RE LATE.",
    "1 22 333 4444 55555 1234567890 3.14159 1,000,000 2024-12-31 v2.0.1 ½ ① ２０２４",
    "The  quick   brown    fox\tjumps\t\tover\n\n\nthe lazy dog. \r\n  Indented line\n\t- a list item \n",
    "def f(x):\n    if x >= 10:\n        return {'key': [x ** 2, x // 3]}  # comment\n\n\nprint(f(12))",
    "naïve café cafe\u0301 Ångström A\u030angstro\u0308m ﬁnal ｆｕｌｌ ＷＩＤＴＨ straße İstanbul ŒUVRE ☕️",
    "don’t “quoted” «guillemets» – dashes — and … dots",
    "오늘은 하늘이 푸르다. 안녕하세요! \u1112\u1161\u11ab\u1100\u1173\u11af 한글, 3월 1일 12시 30분",
    "日本語の文章です。東京は１２月２４日。ﾊﾝｶｸ カタカナ がぎぐ か\u3099",
    "这是中文句子,包含123数字和English单词。",
    "Привет, мир! Ёлка и йод. Ελληνικά γλώσσα. العَرَبِيَّة مرحبا ١٢٣. עִבְרִית שלום",
    "हिन्दी में लिखा हुआ। ภาษาไทยไม่มีช่องว่าง தமிழ் বাংলা ქართული ᏣᎳᎩ",
    "👩‍👩‍👧‍👦 👍🏽 🇰🇷 😀😀 ♥ \u200bzero\u00a0width\u2009spaces\u3000ideographic",
    "https://example.org/a_b-c?d=e&f=%20#g user.name+tag@mail.example $HOME/.bashrc C:\\Users\\x <b>x</b> --flag",
    "CamelCaseWord snake_case_word SCREAMING_CASE kebab-case-word ... !!! ??? --- === *** ///",
)
_LEADING = (" one space", "  two spaces", "\n\nlines first", "\t\ttabs first", "\u3000wide space", "   ", "trailing   ")
_SAMPLED = 2048  # tokens of the vocabulary whose text is compared, alone and in groups
_GROUP = 8


def read_stored(name: str) -> Tokenizer | None:
    """Read the tokenizer.json of a folder or hub id unchanged; return None if there is none.

    Raises:
        EloError: the file is damaged.
    """
    found = cached_file(
        name,
        "tokenizer.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    try:
        return Tokenizer.from_file(str(found))
    except Exception as error:  # tokenizers raises bare Exception
        raise EloError(f"{name}: its tokenizer.json is damaged ({str(error)[:300]}); fetch it again") from None


def one_reading(stored: Tokenizer, loaded: Tokenizer, name: str, class_name: str) -> Tokenizer:
    """Return the tokenizer of tokenizer.json, with the tokens that transformers adds to it.

    Args:
        stored: tokenizer of tokenizer.json; it is modified and returned.
        loaded: tokenizer that transformers loads from the folder; it is modified, too.
        name: folder or hub id, for the message.
        class_name: tokenizer class that transformers uses.

    Raises:
        EloError: the two give a text or a token different ids.
    """
    for each in (stored, loaded):
        each.no_truncation()
        each.no_padding()
    ours, theirs = (each.get_vocab(with_added_tokens=True) for each in (stored, loaded))
    for token, number in ours.items():
        if theirs.get(token) != number:
            raise _refusal(name, class_name, f"token {token!r}", number, theirs.get(token))
    # Additional tokens of transformers come from tokenizer_config.json, or from the class.
    added: dict[int, Any] = loaded.get_added_tokens_decoder()
    for number, token in sorted(added.items()):
        if token.content not in ours:
            stored.add_special_tokens([token]) if token.special else stored.add_tokens([token])
            if stored.token_to_id(token.content) != number:
                raise _refusal(name, class_name, f"token {token.content!r}", None, number)
    if difference := _first_difference(stored, loaded, [*_PROBES, *_of_vocabulary(stored, sorted(ours.values()))]):
        raise _refusal(name, class_name, *difference)
    if difference := _first_difference(stored, loaded, list(_LEADING)):
        text, own, other = difference
        _warn_once(
            f"warning: {name}: text that begins or ends with white space has other token ids in transformers "
            f"({class_name}: {other} for {text!r}) than in tokenizer.json ({own}); ELO uses tokenizer.json"
        )
    return stored


def require_sentencepiece(folder: Path) -> None:
    """Raise EloError if the folder has only a SentencePiece model and the packages that read it are not installed."""
    models = sorted(folder.glob("*.model"))
    if not models or (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return
    with models[0].open("rb") as file:
        if file.read(1) != b"\n":  # first byte of every SentencePiece model; tiktoken's files are base64 text
            return
    missing = [package for package, module in _SENTENCEPIECE.items() if not _is_installed(module)]
    if missing:
        raise EloError(
            f"{folder}: has {models[0].name} (SentencePiece) but no tokenizer.json, and reading it needs "
            f"{' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "pip install sentencepiece protobuf, or give a folder with a tokenizer.json"
        )


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _of_vocabulary(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Yield texts made of the tokenizer's own tokens, single and in groups."""
    added = tokenizer.get_added_tokens_decoder()
    step = max(1, len(ids) // _SAMPLED)
    sampled = [number for number in [*ids[::step], *ids[-_SAMPLED // 4 :]] if number not in added]
    groups = [sampled[start : start + _GROUP] for start in range(0, len(sampled), _GROUP)]
    for group in [*([number] for number in sampled), *groups]:
        if text := tokenizer.decode(group, skip_special_tokens=False).strip():
            yield text


def _first_difference(stored: Tokenizer, loaded: Tokenizer, texts: list[str]) -> tuple[str, Any, Any] | None:
    """Return the first text with different ids, and both lists of ids from where they differ; None if all agree."""
    for text, ours, theirs in zip(texts, _encode(stored, texts), _encode(loaded, texts), strict=True):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            return (text if len(text) <= 40 else f"{text[:40]}..."), ours[same:][:6], theirs[same:][:6]
    return None


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception:  # tokenizers raises bare Exception for a text that the model cannot encode
        if len(texts) == 1:
            return [[]]
        return [ids for text in texts for ids in _encode(tokenizer, [text])]


def _refusal(name: str, class_name: str, what: str, ours: Any, theirs: Any) -> EloError:
    return EloError(
        f"{name}: its tokenizer is ambiguous: {what if what.startswith('token ') else repr(what)} is {ours} in "
        f"tokenizer.json and {theirs} in transformers, which loads {class_name} (tokenizer_class in "
        "tokenizer_config.json, or the model type); if the model was trained with tokenizer.json, write "
        '"tokenizer_class": "PreTrainedTokenizerFast" there (if the model type prescribes a class, as qwen2 does, '
        "write it in a copy without config.json and give that as the tokenizer), otherwise replace tokenizer.json by "
        f"the one that {class_name} saves"
    )


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning(message)
