"""Identification of languages by py3langid (extra `chat`)."""

import importlib.util
from collections.abc import Iterable
from functools import cache
from math import ceil
from typing import Any

from elo.errors import EloError

PIECES, PIECE_CHARACTERS = 8, 300
"""Pieces of a document that are identified, evenly spaced, and their maximum length."""


def require_identifier(where: str, languages: Iterable[str] = ()) -> None:
    """Raise EloError if py3langid is not installed or does not know one of the languages."""
    if importlib.util.find_spec("py3langid") is None:
        raise EloError(f"{where}: py3langid is not installed; run: pip install 'elo-cpt[chat]'")
    for language in languages:
        if not is_identifiable(language):
            raise EloError(
                f"{where}: {language!r} is not a language code that py3langid knows; name the language by its "
                f"ISO 639 code, such as ko, or remove {where}"
            )


def is_identifiable(language: str) -> bool:
    """Return whether a name is an ISO 639 code that py3langid knows."""
    return language in _identifier().labels


def is_in(language: str, text: str) -> bool:
    """Return whether a text is identified as being in a language."""
    return bool(text) and _identifier().classify(text)[0] == language


def share_in(language: str, text: str) -> float:
    """Return the share of pieces of a text that are identified as being in a language."""
    pieces = min(PIECES, ceil(len(text) / PIECE_CHARACTERS))
    size = min(PIECE_CHARACTERS, ceil(len(text) / pieces))
    starts = (index * len(text) // pieces for index in range(pieces))
    return sum(is_in(language, text[start : start + size]) for start in starts) / pieces


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
