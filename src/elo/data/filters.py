"""Filters that drop training documents before they are tokenised (`data.filters`)."""

import zlib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elo.data.language import require_identifier, share_in

FILTERS = ("duplicate", "too_short", "too_long", "repetitive", "other_language")
"""Names under which dropped documents are counted."""


class Filters(BaseModel):
    """Training documents to drop before tokenising; by default none. A corpus of held-out text is never filtered."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    exact_duplicates: bool = False
    """Keep the first of several equal documents of a language, in the order of its corpora and files."""
    min_characters: int = Field(0, ge=0)
    """Minimum length of a document, in characters."""
    max_characters: int | None = Field(None, ge=1)
    """Maximum length of a document, in characters; null is no limit."""
    max_repetition: float | None = Field(None, gt=0, lt=1)
    """Maximum share of a document's bytes that compression (zlib) removes; null is no limit. Prose has 0.4 to 0.6, and
    lines or phrases that are repeated over and over have more than 0.9."""
    min_language_share: float | None = Field(None, gt=0, le=1)
    """Minimum share of a document in the language of its corpus, by py3langid (extra `chat`); null is no limit. It
    is measured on up to eight pieces of the document, and needs ISO 639 codes as names of languages."""

    @model_validator(mode="after")
    def _ordered(self) -> "Filters":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters: is {self.max_characters}, below min_characters, {self.min_characters}; raise it"
            )
        return self

    def check(self, languages: Iterable[str]) -> None:
        """Raise EloError if the filters cannot be applied to text in these languages."""
        if self.min_language_share:
            require_identifier("data.filters.min_language_share", languages)

    def reason(self, text: bytes, language: str | None) -> str | None:
        """Return the name of the filter that drops a document because of its own text, or None.

        Args:
            text: document in UTF-8.
            language: language that the document should be in; None, for text in several languages, is not checked.
        """
        if self.min_characters or self.max_characters:
            length = len(text.decode())
            if length < self.min_characters:
                return "too_short"
            if self.max_characters and length > self.max_characters:
                return "too_long"
        if self.max_repetition and 1 - len(zlib.compress(text, 1)) / len(text) > self.max_repetition:
            return "repetitive"
        if self.min_language_share and language and share_in(language, text.decode()) < self.min_language_share:
            return "other_language"
        return None

    def plan(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults; empty if nothing is filtered."""
        return self.model_dump(exclude_defaults=True)
