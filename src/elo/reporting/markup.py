"""Templates, and what HTML and Markdown need so that text from files stays text.

Whatever comes from corpora, models or configurations is escaped: HTML by jinja's autoescape, Markdown by `escaped`.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from elo.reporting.comparison import count, duration, memory, signed, standard_error
from elo.reporting.results import Cloze, ClozeGroup, Data, Model, Setting, TextSize, Vocabulary

_HERE = Path(__file__).parent
CHART_FOLDER = "charts"


def render(template: str, context: dict[str, Any]) -> str:
    """A page from a template of this package."""
    page = _environment().get_template(template).render(context)
    if template.endswith(".md.j2"):
        page = re.sub(r"\n{3,}", "\n\n", page)
    # JSON can spell half a surrogate pair, UTF-8 cannot.
    return page.encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "signed": signed,
        "duration": duration,
        "count": count,
        "memory": memory,
        "accuracy": accuracy,
        "standard_error": error_in_points,
        "base64": lambda data: base64.b64encode(data).decode(),
        "md": escaped,
        "fenced": fenced,
    }
    return environment


def stylesheet() -> Markup:
    """Our own file: nothing to escape."""
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


def texts(data: Data) -> list[tuple[str, TextSize]]:
    """(what it is for people, how much), language by language, training text first."""
    return [
        (f"{language}, {use}", size)
        for use, sizes in (("training", data.train), ("held out", data.heldout))
        for language, size in sizes.items()
    ]


def model_text(model: Model) -> str:
    """The base model's name and size."""
    sizes = [] if model.parameters is None else [f"{count(model.parameters)} parameters"]
    sizes += [] if model.num_layers is None else [f"{model.num_layers} decoder layers"]
    return f"{model.name} ({', '.join(sizes)})" if sizes else model.name


def facts(results: Setting, seeds: Sequence[int]) -> list[tuple[str, str]]:
    """What it takes to do it again, as (name, text)."""
    model, data = results.model, results.data
    found = [("Model", model.name)]
    if model.layers:
        trained = f"; {model.trainable_parameters:,} parameters train" if model.trainable_parameters else ""
        found.append(("Layers that ELO trains", ", ".join(map(str, model.layers)) + trained))
    if model.vocabulary is not None:
        found.append(("Vocabulary", _extended(model.vocabulary)))
    if data.sequence_length is not None:
        found.append(("Sequence length", f"{data.sequence_length:,} tokens"))
    if data.replay_ratio is not None:
        found.append(("Replay ratio", f"{data.replay_ratio:g}"))
    if seeds:
        found.append(("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds))))
    if results.hardware:
        shown = {**results.hardware}
        size = shown.pop("memory_bytes", None)
        parts = [f"{key} {value}" for key, value in shown.items()]
        parts += [f"memory {memory(size)}"] if isinstance(size, int | float) else []
        found.append(("Hardware", ", ".join(parts)))
    if results.versions:
        found.append(("Versions", ", ".join(f"{name} {number}" for name, number in results.versions.items())))
    if results.created:
        found.append(("Created", results.created))
    return found


def _extended(vocabulary: Vocabulary) -> str:
    told = f"extended by {len(vocabulary.rows):,} tokens"
    for name in ("target", "source"):
        if rates := getattr(vocabulary, f"{name}_bytes_per_token"):
            told += f"; {name} language {rates[0]:.2f} to {rates[1]:.2f} bytes a token"
    return told


def data_table(rows: Sequence[tuple[str, TextSize]]) -> str:
    """`texts` as Markdown."""
    if not rows:
        return ""
    lines = [
        [
            escaped(name),
            *("–" if number is None else f"{number:,}" for number in (size.documents, size.tokens, size.bytes)),
            "–" if size.bytes_per_token is None else f"{size.bytes_per_token:.2f}",
        ]
        for name, size in rows
    ]
    return table(["Text", "Documents", "Tokens", "UTF-8 bytes", "Bytes a token"], lines)


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already; all columns but the first to the right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


def accuracy(cloze: Cloze | ClozeGroup | None) -> str:
    return "–" if cloze is None else f"{cloze.accuracy:.1%}"


def error_in_points(group: ClozeGroup | None) -> str:
    """Of the accuracy, in points."""
    error = standard_error(group)
    return "" if error is None else f"±{100 * error:.1f}"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    lines = " ⏎ ".join(text.splitlines())
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", lines)


def fenced(text: str) -> str:
    """Text as a Markdown code block."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
