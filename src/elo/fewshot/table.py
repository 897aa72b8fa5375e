"""Render the results of `elo fewshot` as a table."""

from statistics import fmean
from typing import Any

from rich.table import Table

from elo.format import duration, flops, signed
from elo.report.schema import MIN_SEEDS


def render(results: dict[str, Any]) -> Table:
    """Return the table for the results of `few_shot`."""
    seeds, items = len(results["seeds"]), results["task"]["items"]
    title = f"{results['model']}: {items} items, {seeds} seed{'s' * (seeds != 1)}, "
    table = Table(title=f"{title}largest class {results['task']['majority']:.1%}", title_justify="left")
    if seeds < MIN_SEEDS and any(row["examples"] for row in results["rows"]):
        table.caption = "With one seed, intervals cover test items alone and support no difference."
    table.add_column("way")
    for heading in (
        "examples",
        "accuracy ↑",
        "95 % interval",
        "minus in-context",
        "training",
        "training compute",
        "test, per item",
        "compute per item",
    ):
        table.add_column(heading, justify="right")
    against = {(each["way"], each["examples"]): each for each in results["differences"]}
    for row in results["rows"]:
        used = fmean(row["used_examples"])
        difference = against.get((row["way"], row["examples"]))
        table.add_row(
            row["way"],
            f"{row['examples']}" + (f" ({used:g} fit)" if used != row["examples"] else ""),
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            f"{signed(100 * difference['value'], 1)} ({signed(100 * difference['low'], 1)} to "
            f"{signed(100 * difference['high'], 1)})"
            if difference
            else "",
            f"{duration(row['train_cpu_seconds'])} CPU" if row["train_tokens"] else "",
            flops(row["train_flops"]) if row["train_tokens"] else "",
            f"{duration(row['test_cpu_seconds_per_item'])} CPU",
            flops(row["test_flops_per_item"]),
        )
    return table
