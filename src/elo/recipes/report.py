"""`elo report`: one page that says what a run did, from its results.json alone."""

from pathlib import Path
from typing import Any

from elo.errors import EloError
from elo.records import atomic_directory, write_text


def report(results: dict[str, Any] | str | Path, output: str | Path | None = None) -> Path:
    """Write report.html (self-contained), report.md and the charts as PNG.

    Args:
        results: results.json of a run, the run folder that holds it, or its content (docs/results.md).
        output: folder to write into, made if need be; by default the one that results.json is in. Earlier reports in
            it are replaced.

    Returns:
        The path of report.html.

    Raises:
        EloError: the results are missing, damaged or not those of a run; or the output cannot be written.
    """
    from elo.reporting.charts import draw_charts
    from elo.reporting.pages import CHART_FOLDER, html_page, markdown_page
    from elo.reporting.results import read_results

    checked = read_results(results)
    folder = _output_folder(results, output)
    charts = draw_charts(checked)
    pages = {"report.md": markdown_page(checked, charts), "report.html": html_page(checked, charts)}

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


def _output_folder(results: dict[str, Any] | str | Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(results, dict):
        raise EloError("report: results in memory have no folder of their own; give an output folder")
    path = Path(results)
    return path if path.is_dir() else path.parent
