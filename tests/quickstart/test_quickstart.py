"""The quickstart runs with the contestants, base and corpus that it ships."""

from pathlib import Path

import yaml

from elo.config import load_comparison
from elo.quickstart.quickstart import WORLD, quickstart


def test_the_shipped_comparison_runs_when_it_is_shortened(tmp_path: Path) -> None:
    output = tmp_path / "out"
    few = ["budgets=[{tokens: 4096}]", "run.evaluation.cloze={}"]
    few += ["run.evaluation.max_bytes=2000", "run.evaluation.max_new_tokens=1"]
    results = quickstart(output, few)
    shipped = yaml.safe_load((WORLD / "config.yaml").read_text(encoding="utf-8"))
    names = list(shipped["contestants"])
    assert [each["name"] for each in results["contestants"]] == names
    trials = {trial["contestant"]: trial for trial in results["trials"]}
    assert list(trials) == names
    for name, trial in trials.items():
        assert trial["failed"] is None and trial["measured"]["bpb"].keys() == {"tavuni", "en"}, name
        assert set(trial["learning_rates"].values()) == set(shipped["contestants"][name]["learning_rates"])
    written = load_comparison(output / "config.yaml")
    assert list(written.contestants) == names
    assert [budget.cpu_seconds for budget in written.budgets] == [each["cpu_seconds"] for each in shipped["budgets"]]
    assert (output / "report.html").is_file()
