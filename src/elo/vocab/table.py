"""Render the results of `elo vocab` for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_vocabulary(measured: Mapping[str, Any]) -> RenderableType:
    """Render the results of `elo.vocab.vocabulary.measure_vocabulary` as tables."""
    languages = Table(title=f"{measured['model']}: {measured['tokens']:,} tokens", title_justify="left")
    for column in ("language", "bytes per token", "tokens per word", "documents", "tokens", "text lost"):
        languages.add_column(column, justify="left" if column == "language" else "right")
    for language, each in measured["languages"].items():
        languages.add_row(
            language,
            f"{each['bytes_per_token']:.2f}",
            f"{each['tokens_per_word']:.2f}",
            f"{each['documents']:,}",
            f"{each['tokens']:,}",
            f"{each['lost_text']:.2%}",
        )
    parts: list[RenderableType] = [languages]
    for language, each in measured["languages"].items():
        if each["special_tokens"]:
            parts.append(Text(f"{language}: {each['special_tokens']:,} special tokens occur in the text"))
    parts += [Text(warning) for warning in measured["warnings"]]
    if measured["candidates"]:
        candidates = Table(title="With new pieces", title_justify="left")
        for column in ("pieces", "bytes per token", "tokens", "training FLOPs", "new parameters", "source unchanged"):
            candidates.add_column(column, justify="right")
        for each in measured["candidates"]:
            candidates.add_row(
                f"{each['pieces']:,}",
                f"{each['bytes_per_token']:.2f}",
                ", ".join(f"{language} {share:.0%}" for language, share in each["target"].items())
                if len(each["target"]) > 1
                else f"{each['tokens']:.0%}",
                f"{each['flops_per_byte']:.0%}",
                f"{each['new_parameters']:,}",
                ", ".join(f"{language}: {_alike(found)}" for language, found in each["source"].items()) or "-",
            )
        parts += [candidates, Text(measured["advice"])]
    return Group(*parts)


def extension_line(record: Mapping[str, Any]) -> str:
    """Summarise the record of `elo.vocab.vocabulary.extend_vocabulary` in one line."""
    start, stop = record["rows"]["start"], record["rows"]["stop"]
    parts = [f"{stop - start:,} new tokens, ids {start:,} to {stop - 1:,}"]
    for name in ("target", "source"):
        if rates := record.get(f"{name}_bytes_per_token"):
            parts.append(f"{name} {rates[0]:.2f} -> {rates[1]:.2f} bytes per token")
    if found := record.get("source_identity"):
        parts.append(f"source text {_alike(found)}")
        if found["words"]:
            parts.append("words with other tokens: " + ", ".join(found["words"][:5]))
    return "; ".join(parts)


def _alike(found: Mapping[str, Any]) -> str:
    """Describe how many documents keep their tokens, apart from names and quotations in foreign scripts."""
    alike = found["identical"] + found["foreign"]
    quoted = f", {found['foreign']} except foreign words" if found["foreign"] else ""
    return f"{alike} of {found['documents']} documents unchanged{quoted}"
