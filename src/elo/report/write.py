"""`elo report`: write the report of a run or a comparison from its results file."""

from pathlib import Path
from typing import Any

from rich.console import Console

from elo.errors import EloError
from elo.report.charts import draw_charts
from elo.report.files import read_results
from elo.report.page import CHART_FOLDER, html_page, markdown_page, terminal
from elo.report.schema import Results
from elo.store.files import atomic_directory, write_text


def report(results: Results | dict[str, Any] | str | Path, output: str | Path | None = None) -> Path:
    """Write report.html (self-contained), report.md and the charts as PNG.

    Args:
        results: results.json of a run or a comparison, the folder that holds it, or its content (docs/results.md).
        output: folder to write into, created if needed; by default the folder of the results. An earlier report in it
            is replaced.

    Returns:
        Path of report.html.

    Raises:
        EloError: the results are missing, damaged or not results; or the output cannot be written.
    """
    folder = _output_folder(results, output)
    known = results if isinstance(results, Results) else read_results(results)
    charts = draw_charts(known)
    pages = {"report.md": markdown_page(known, charts), "report.html": html_page(known, charts)}
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


def show(results: Results | dict[str, Any]) -> None:
    """Print the results on the terminal."""
    console = Console()
    console.width = max(console.width, 118)  # a table that wraps in a log file cannot be read
    console.print(terminal(results if isinstance(results, Results) else read_results(results)))


def _output_folder(results: Results | dict[str, Any] | str | Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(results, Results | dict):
        raise EloError("report: results in memory have no folder; give an output folder")
    path = Path(results)
    return path if path.is_dir() else path.parent
