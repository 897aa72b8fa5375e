"""`elo report`: one page that says what a run or a comparison did, from its results file alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.errors import EloError
from elo.store.files import atomic_directory, read_json, write_text

if TYPE_CHECKING:
    from elo.reporting.drawing import Chart

_RUN, _COMPARISON = "results.json", "comparison.json"


def report(results: dict[str, Any] | str | Path, output: str | Path | None = None) -> Path:
    """Write report.html (self-contained), report.md and the charts as PNG.

    Args:
        results: results.json of a run or comparison.json of a comparison, the folder that holds it, or its content
            (docs/results.md).
        output: folder to write into, made if need be; by default the one that the results are in. Earlier reports in
            it are replaced.

    Returns:
        The path of report.html.

    Raises:
        EloError: the results are missing, damaged or of neither kind; or the output cannot be written.
    """
    from elo.reporting.markup import CHART_FOLDER

    folder = _output_folder(results, output)
    pages, charts = _comparison(results) if _is_comparison(results) else _run(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(folder / CHART_FOLDER, overwrite=True) as drawn:
            for chart in charts:
                (drawn / f"{chart.name}.png").write_bytes(chart.png)
        for name, page in pages.items():
            write_text(folder / name, page)
    except OSError as error:
        raise EloError(f"{folder}: the report cannot be written ({error.strerror}); choose another output") from None
    return folder / "report.html"


def _run(results: dict[str, Any] | str | Path) -> tuple[dict[str, str], Sequence["Chart"]]:
    from elo.reporting.charts import draw_charts
    from elo.reporting.pages import html_page, markdown_page
    from elo.reporting.results import read_results

    checked = read_results(results)
    charts = draw_charts(checked)
    return {"report.md": markdown_page(checked, charts), "report.html": html_page(checked, charts)}, charts


def _comparison(results: dict[str, Any] | str | Path) -> tuple[dict[str, str], Sequence["Chart"]]:
    from elo.reporting.pareto_charts import draw_pareto_charts
    from elo.reporting.pareto_pages import pareto_html_page, pareto_markdown_page
    from elo.reporting.pareto_results import read_comparison

    checked = read_comparison(results)
    charts = draw_pareto_charts(checked)
    pages = {"report.md": pareto_markdown_page(checked, charts), "report.html": pareto_html_page(checked, charts)}
    return pages, charts


def _is_comparison(results: dict[str, Any] | str | Path) -> bool:
    """By which file a folder holds, and by the `kind` that a file or its content says."""
    if isinstance(results, dict):
        return results.get("kind") == "comparison"
    path = Path(results)
    if path.is_dir():
        there = [name for name in (_RUN, _COMPARISON) if (path / name).exists()]
        if len(there) == 2:
            raise EloError(f"{path}: holds both {_RUN} and {_COMPARISON}; give one of the two files")
        return there == [_COMPARISON]
    value = read_json(path)
    return isinstance(value, dict) and value.get("kind") == "comparison"


def _output_folder(results: dict[str, Any] | str | Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(results, dict):
        raise EloError("report: results in memory have no folder of their own; give an output folder")
    path = Path(results)
    return path if path.is_dir() else path.parent
