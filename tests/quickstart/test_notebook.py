"""The notebook runs from top to bottom and draws the charts."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # figures of one machine are not committed
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    few = ["budgets=[{tokens: 4096}]", "contestants={full: {learning_rates: [1.0e-3]}}", "run.evaluation.cloze={}"]
    few += ["run.evaluation.max_bytes=2000", "run.evaluation.max_new_tokens=1"]
    settings.source = f"output = {str(tmp_path / 'out')!r}\noverrides = {few!r}"
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert all(f"{name:12}" in text for name in ("base model", "full"))
    charts = list((tmp_path / "out/charts").glob("*.png"))
    assert charts and len(images) == 1 + len(charts)
