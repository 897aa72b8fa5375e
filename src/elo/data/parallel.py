"""Parallel text: rows of sentences and their translations become documents that end in one language.

A document counts entirely towards the language it ends in, because a token shard belongs to one language and shares
count tokens of shards. A corpus that is listed under both languages gives each pair once in each direction, so each
language gets half of the tokens.
"""

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elo.data.sources import FileReader, Record, list_inputs
from elo.errors import EloError

FIELDS = ("source", "target", "source_language", "target_language")
DEFAULT_TEMPLATE = "{source_language}: {source}\n{target_language}: {target}"


@dataclass(frozen=True)
class Parallel:
    """How the rows of a parallel corpus become documents.

    Attributes:
        columns: column of the sentence that is translated, and of its translation.
        languages: languages of the columns. The document ends in the second.
        templates: layouts of a pair, used in turn.
        pairs: number of consecutive rows in a document.
        code_switched: share of documents that alternate between the languages from sentence to sentence instead.
    """

    columns: tuple[str, str]
    languages: tuple[str, str]
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    pairs: int = 1
    code_switched: float = 0.0

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the documents, as JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def documents(self, records: Iterable[Record]) -> Iterator[Record]:
        """Join each group of `pairs` rows into a document, and pass on problems.

        A document gets the number of the last row of its group, so that reading can resume after any document.
        """
        group: list[Record] = []
        for record in records:
            if group and (record.ends_file or record.number // self.pairs > group[0].number // self.pairs):
                yield self._document(group)
                group = []
            if record.problem is not None:
                yield record
            else:
                group.append(record)
        if group:
            yield self._document(group)

    def prompt(self, source: str, template: str) -> str:
        """Return the text before the translation, without a final space, which tokenizers join to the next word."""
        return self._filled(template, source, "").rstrip(" ")

    def example(self, source: str, target: str, template: str) -> str:
        """Return one pair in the layout of `template`."""
        return self._filled(template, source, target)

    def _filled(self, template: str, source: str, target: str) -> str:
        of, into = self.languages
        return template.format(source=source, target=target, source_language=of, target_language=into)

    def _document(self, group: Sequence[Record]) -> Record:
        index = group[0].number // self.pairs
        pairs = [(each.text.decode().strip(), each.translation.decode().strip()) for each in group]
        pairs = [pair for pair in pairs if all(pair)]
        mixed_before = int(index * self.code_switched)
        if int((index + 1) * self.code_switched) > mixed_before:
            parts = [pair[1 - (len(pairs) - 1 - place) % 2] for place, pair in enumerate(pairs)]
        else:
            template = self.templates[(index - mixed_before) % len(self.templates)]
            parts = [self.example(*pair, template) for pair in pairs]
        return Record((index + 1) * self.pairs - 1, group[0].line, "\n".join(parts).encode())


def template_problem(template: str) -> str | None:
    """Return why a template cannot be used; None if it can."""
    try:
        fields = [name for _, name, form, conversion in string.Formatter().parse(template) if name is not None]
        plain = all(not form and conversion is None for _, _, form, conversion in string.Formatter().parse(template))
    except ValueError as error:
        return f"template {template!r} has an unpaired brace ({error}); write {{{{ and }}}} for braces in the text"
    if not plain or not set(fields) <= set(FIELDS):
        return f"template {template!r} has an unknown field; use {', '.join('{' + name + '}' for name in FIELDS)}"
    if fields.count("source") != 1 or fields.count("target") != 1 or not template.endswith("{target}"):
        return f"template {template!r} must hold {{source}} and {{target}} once and end with {{target}}"
    return None


def read_pairs(path: str, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a parallel file, each side on one line. Rows with an empty side are skipped.

    Raises:
        EloError: the file, or a row of it, cannot be read.
    """
    for file in list_inputs(path):
        for record in FileReader(file, *columns).records():
            if record.problem is not None:
                raise EloError(record.problem)
            pair = (" ".join(record.text.decode().split()), " ".join(record.translation.decode().split()))
            if all(pair):
                yield pair
