"""Read values of command-line options: names, numbers, texts or files by language, and which options are given."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import typer

from elo.errors import EloError

_Number = TypeVar("_Number", int, float)


def given(context: typer.Context, *parameters: str) -> list[str]:
    """Return the options among `parameters` that are on the command line."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    return [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name != "DEFAULT"]


def names(joined: str) -> list[str]:
    """Split names that are separated by commas."""
    return [name.strip() for name in joined.split(",") if name.strip()]


def numbers(option: str, joined: str) -> list[int]:
    """Parse integers that are separated by commas.

    Raises:
        EloError: an item is not an integer.
    """
    return _parsed(option, joined, int, "integers", "4000,8000")


def decimals(option: str, joined: str) -> list[float]:
    """Parse numbers that are separated by commas.

    Raises:
        EloError: an item is not a number.
    """
    return _parsed(option, joined, float, "numbers", "0,0.5,1")


def _parsed(option: str, joined: str, kind: Callable[[str], _Number], what: str, example: str) -> list[_Number]:
    try:
        return [kind(number) for number in names(joined)]
    except ValueError:
        raise EloError(f"{option} {joined!r}: not {what} separated by commas; write, for example, {example}") from None


def texts_by_language(pairs: list[str] | None) -> dict[str, list[str]]:
    """Parse LANGUAGE=TEXT pairs, any number per language.

    Raises:
        EloError: an item is not LANGUAGE=TEXT.
    """
    found: dict[str, list[str]] = {}
    for language, text in _pairs("--prompt", "LANGUAGE=TEXT", "'ko=강 건너 마을에는'", pairs):
        found.setdefault(language, []).append(text)
    return found


def files_by_language(option: str, pairs: list[str] | None) -> dict[str, str]:
    """Parse LANGUAGE=FILE pairs, one per language.

    Raises:
        EloError: an item is not LANGUAGE=FILE, or a language is given twice.
    """
    found: dict[str, str] = {}
    for language, path in _pairs(option, "LANGUAGE=FILE", "ko=heldout.jsonl", pairs):
        if language in found:
            raise EloError(f"{option}: {language!r} is given twice; give one file per language")
        found[language] = path
    return found


def words_by_label(pairs: list[str] | None) -> dict[str, str]:
    """Parse LABEL=WORD pairs.

    Raises:
        EloError: an item is not LABEL=WORD.
    """
    return dict(_pairs("--word", "LABEL=WORD", "1=positive", pairs))


def _pairs(option: str, form: str, example: str, pairs: list[str] | None) -> Iterator[tuple[str, str]]:
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise EloError(f"{option} {pair!r}: write {form}, for example {option} {example}")
        yield name, value
