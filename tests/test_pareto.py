"""What a comparison's report says: schema, the rule for winners, warnings, both kinds of `elo report`."""

import copy
import io
import json
import re
from pathlib import Path

import pytest
from elo.reporting import pareto_results as schema
from elo.reporting.comparison import flops, rate
from elo.reporting.pareto_charts import contestant_styles, draw_pareto_charts
from elo.reporting.pareto_pages import pareto_html_page, pareto_markdown_page
from elo.reporting.pareto_results import read_comparison
from elo.reporting.pareto_rows import Spread, budget_rows, changes_text, edges, pareto_front
from elo.reporting.pareto_terminal import render_pareto
from elo.reporting.pareto_verdict import chance_of_a_winner, dominated, headline, judge, progress
from elo.reporting.results import Record, read_results
from pareto_fixtures import duel, entry_of, example_comparison
from report_fixtures import TITLE, Page, example_results
from rich.console import Console

from elo.errors import EloError, UnfinishedError
from elo.report.write import report


@pytest.fixture(scope="module")
def drawn():
    return draw_pareto_charts(read_comparison(example_comparison()))


def judged(comparison, budget=0):
    return judge(read_comparison(comparison))[budget]


def said(comparison, budget=0):
    return " ".join(judged(comparison, budget).sentences)


def warned(comparison, budget=0):
    return " ".join(judged(comparison, budget).warnings)


def changed(path, value):
    """The example with the value at a dotted path replaced, or removed when it is `...`."""
    comparison = copy.deepcopy(example_comparison())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = comparison
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return comparison


def shown_in_terminal(comparison):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(render_pareto(comparison))
    return console.export_text()


def test_a_winner_is_named_where_its_seeds_are_below_all_others():
    comparison = duel(a=[1.80, 1.82], b=[1.83, 1.90], c=[1.95, 1.96])
    assert "ko: a, 1.810 ±0.010 bits per byte, is the winner: each of its 2 seeds is below" in said(comparison)
    assert "Next is b, 1.865 ±0.035 (+0.055)." in said(comparison)
    assert judged(comparison).winners == {("a", "target"), ("a", "source")}
    assert headline(read_comparison(comparison), judged(comparison)).startswith("lowest in ko is a, 1.810 ±0.010; ")


@pytest.mark.parametrize("touching", [1.83, 1.82])
def test_overlapping_or_equal_seeds_are_no_winner(touching):
    comparison = duel(a=[1.80, touching], b=[1.82, 1.90], c=[1.95, 1.96])
    assert "ko: no single winner. The seeds cannot tell apart a (" in said(comparison)
    assert "and b (1.860 ±0.040). The other contestant is higher, with every seed, than a with any." in said(comparison)
    assert judged(comparison).winners == set()
    assert "no winner can be named in ko" in headline(read_comparison(comparison), judged(comparison))


def test_one_seed_names_nobody():
    comparison = duel(a=[1.5], b=[2.5])
    assert "ko: no winner can be named from one seed. Lowest with it: a, 1.500 bits per byte." in said(comparison)
    assert "beat" not in said(comparison)
    assert judged(comparison).winners == set()


def test_a_contestant_that_has_not_come_to_two_seeds_holds_the_verdict_up():
    comparison = duel(a=[1.5, 1.5], b=[2.5, 2.5], c=[2.6, 2.6])
    comparison["entries"][1]["trials"].pop()
    comparison["entries"].pop()
    assert "no winner can be named while b and c have fewer than two seeds" in said(comparison)
    assert judged(comparison).winners == set()
    assert progress(read_comparison(comparison)) == "Not finished: 3 of 6 trials done. What follows may change."
    assert "Not finished: 3 of 6 trials done." in shown_in_terminal(comparison)


def test_a_failed_seed_is_above_all_others():
    beaten = duel(a=[1.80, 1.82], b=[1.90, None], c=[None, None])
    assert ("a", "target") in judged(beaten).winners
    assert "b, seed 2, failed: training diverged at step 7" in warned(beaten)
    unsteady = duel(a=[1.70, None], b=[1.80, 1.82], c=[1.9, 1.95])
    assert judged(unsteady).winners == set()
    assert "no winner. Lowest is a, 1.700 bits per byte, but 1 of its 2 seeds failed." in said(unsteady)
    assert "Of those that never failed the lowest is b, 1.810 ±0.010." in said(unsteady)
    nothing = duel(a=[None, None], b=[None, None])
    assert said(nothing) == "Every trial failed."


def test_dominance_needs_both_languages_and_all_seeds():
    both = duel(a=[1.80, 1.82], b=[1.83, 1.90])
    assert "ko and en together, with all seeds: a beats b. Beaten by nobody: a." in said(both)
    trade = copy.deepcopy(both)
    for trial in trade["entries"][0]["trials"]:
        trial["bpb"]["en"] = 1.6
    assert "no contestant beats another in both" in said(trade)
    assert judged(trade).winners == {("a", "target"), ("b", "source")}
    rows = budget_rows(read_comparison(both), 0)
    assert [(row.title, [lost.title for lost in others]) for row, others in dominated(rows, "ko", "en")] == [
        ("a", ["b"])
    ]
    overlapping = copy.deepcopy(both)
    overlapping["entries"][0]["trials"][0]["bpb"]["en"] = 1.39
    assert "no contestant beats another in both" in said(overlapping)


def test_the_source_language_is_held_against_the_base():
    comparison = duel(a=[1.80, 1.82], b=[1.83, 1.90], c=[1.95, 1.96])
    assert "every contestant forgets with every seed; by mean a the least (+0.063)." in said(comparison)
    comparison["base"]["bpb"]["en"] = 1.385
    assert (
        "en against the base (1.385): every seed at or below it: a; some seeds above it and some not: b; "
        "every seed above it: c." in said(comparison)
    )


def test_the_example_says_what_its_numbers_say():
    tokens, seconds = judge(read_comparison(example_comparison()))
    assert [row.contestant.name for row in tokens.rows][:2] == ["full", "lora"]
    assert tokens.winners == {("full", "target")}
    assert seconds.winners == {("full", "target"), ("lora", "source")}
    assert tokens.warnings == seconds.warnings == ()
    assert "“LoRA, rank 16” beats Middle frozen, Alignment alone and “ELO, six layers”" in tokens.sentences[-1]


def test_a_learning_rate_at_the_edge_of_what_was_tried_is_a_warning():
    comparison = example_comparison()
    for sweep in comparison["sweeps"]:
        if sweep["contestant"] == "lora" and sweep["budget"] == 1:
            for index, trial in enumerate(sweep["trials"]):
                trial["chosen"] = index == 4
    checked = read_comparison(comparison)
    (edge,) = [edge for sweep in checked.sweeps for edge in edges(sweep)]
    assert (edge.stage, edge.chosen, edge.highest, edge.tried) == ("lora", 8e-3, True, 5)
    assert warned(comparison, 0) == ""
    assert "at the edge of what was tried: “LoRA, rank 16”, lora 8e-3 (the highest of 5)." in warned(comparison, 1)
    assert "(the highest of 5)" in pareto_markdown_page(checked, [])
    for trial in sweep_of(comparison, "lora", 1)["trials"]:
        trial["chosen"] = trial["learning_rates"]["lora"] == 5e-4
    assert "lora 5e-4 (the lowest of 5)" in warned(comparison, 1)


def sweep_of(comparison, contestant, budget):
    return next(s for s in comparison["sweeps"] if (s["contestant"], s["budget"]) == (contestant, budget))


def test_a_rate_below_one_that_failed_is_no_edge_and_one_rate_is_no_sweep():
    comparison = example_comparison()
    trials = sweep_of(comparison, "full", 0)["trials"]
    for index, trial in enumerate(trials):
        trial["chosen"] = index == 3
    assert trials[4]["failed"]
    assert warned(comparison) == ""
    sweep_of(comparison, "full", 0)["trials"] = [{**trials[0], "chosen": True}]
    assert warned(comparison) == ""
    sweep_of(comparison, "full", 0)["trials"] = [trials[4]]
    assert warned(comparison) == "Full CPT: every learning rate tried failed."


@pytest.mark.parametrize(("seconds", "expected"), [(65.9, ""), (66.1, "+10%"), (54.1, ""), (48.0, "−20%")])
def test_trials_off_a_seconds_budget_are_flagged(seconds, expected):
    comparison = example_comparison()
    entry_of(comparison, "full", 1)["trials"][1]["wall_seconds"] = seconds
    entry_of(comparison, "full", 0)["trials"][1]["wall_seconds"] = 9999.0
    assert expected in warned(comparison, 1)
    assert ("more than 10% off the budget of 60 s: seed 2" in warned(comparison, 1)) is bool(expected)
    assert warned(comparison, 0) == "", "wall time is nothing that a token budget limits"


def test_numbers_of_the_table():
    (row, *_) = budget_rows(read_comparison(duel(a=[1.80, 1.90], b=[2.0, 2.0])), 0)
    assert str(row.bpb["ko"]) == "1.850 ±0.050"
    assert row.change["ko"] == pytest.approx(1.85 - 2.412)
    assert str(Spread((1.5,))) == "1.500"
    assert pareto_front([(3, 1), (1, 3), (2, 3), (2, 2), (2, 2), (4, 1)]) == [1, 3, 0]
    assert chance_of_a_winner([3, 3]) == pytest.approx(0.1)
    assert changes_text({"lora": {"rank": 16, "on": True}, "layers": "first:2", "x": None}) == (
        "lora.rank=16 · lora.on=true · layers=first:2 · x=none"
    )
    assert [rate(value) for value in (1e-3, 5e-4, 3.16e-5, 0.2, 1.0)] == ["1e-3", "5e-4", "3.16e-5", "2e-1", "1e0"]
    assert [flops(value) for value in (5e13, 1.234e15, 999.9e15)] == ["50 TFLOP", "1.23 PFLOP", "1 EFLOP"]


def test_report_takes_a_folder_with_a_comparison(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(example_comparison()), encoding="utf-8")
    page = report(tmp_path)
    assert page == tmp_path / "report.html"
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    assert not {"script", "link"} & set(parsed.tags)
    assert "url(" not in html
    assert parsed.headings[:3] == [TITLE, "At 500,000 tokens", "At 60 s"]
    assert [value[:26] for _, name, value in parsed.attributes if name == "src"] == ["data:image/svg+xml;base64,"] * 9
    assert "500,000 tokens: lowest in ko is Full CPT, 1.842 ±0.005; no winner can be named in en." in parsed.words
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((charts/[^)]+\.png)\)", markdown)
    assert sorted(f"charts/{path.name}" for path in (tmp_path / "charts").iterdir()) == sorted(linked)
    assert len(linked) == 9
    line = next(line for line in markdown.splitlines() if line.startswith("| Full CPT |"))
    assert line == (
        "| Full CPT | full 5e-4 | **1.842 ±0.005 (−0.570)** | 1.419 ±0.002 (+0.101) | – | – | 500 K | 70.1 s "
        "| 70 TFLOP | 1.31 GiB |"
    )


def test_which_report_is_told_by_file_and_kind(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("elo.report.write._run", lambda results: made.append("run") or ({}, []))
    monkeypatch.setattr("elo.report.write._comparison", lambda results: made.append("comparison") or ({}, []))
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name, content in (
        (run, "results.json", example_results()),
        (other, "comparison.json", example_comparison()),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "moved.json").write_text(json.dumps(example_comparison()), encoding="utf-8")
    for results in (run, other, tmp_path / "moved.json", run / "results.json"):
        report(results, tmp_path / "out")
    report(example_comparison(), tmp_path / "out")
    assert made == ["run", "comparison", "comparison", "run", "comparison"]
    (run / "comparison.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EloError, match=r"holds both results\.json and comparison\.json; give one"):
        report(run)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema 2 is newer than this version reads"),
        ("kind", "run", "kind: must be \"comparison\", got 'run'"),
        ("contestants", [], "contestants: "),
        ("contestants.1.name", "elo", "contestants: names must differ, got elo, elo"),
        ("budgets.0.kind", "hours", "budgets.0.kind: .* got 'hours'"),
        ("budgets.1.value", 0, "budgets.1.value: .* got 0"),
        ("seeds", [1, 1], "seeds: must differ, got 1, 1"),
        ("seeds", [1, 2], r"entries.0.trials.2.seed: 3 is none of seeds 1, 2$"),
        ("entries.2.contestant", "nobody", "entries.2.contestant: 'nobody' is none of elo, "),
        ("entries.2.budget", 7, "entries.2.budget: 7, but there are 2 budgets from 0"),
        ("entries.1.budget", 0, "entries.1: 'elo' at budget 0 is there already"),
        ("entries.3.trials.1.seed", 1, "entries.3.trials.1.seed: 1 is there already"),
        ("entries.3.trials.1.bpb", {"en": 1.0}, "entries.3.trials.1.bpb: lacks ko, though the trial did not fail"),
        ("entries.3.trials.1.bpb.ko", "low", "entries.3.trials.1.bpb.ko: .* got 'low'"),
        ("entries.0.learning_rates.elo_pretraining", -1, "entries.0.learning_rates.elo_pretraining: .* got -1"),
        ("sweeps.0.trials.0.score", float("inf"), "sweeps.0.trials.0.score: "),
        ("sweeps.0.trials.0.learning_rates", ..., "sweeps.0.trials.0.learning_rates: Field required"),
        ("languages", ..., "languages: Field required"),
    ],
)
def test_odd_comparisons_give_one_message(tmp_path, path, value, message):
    file = tmp_path / "comparison.json"
    file.write_text(json.dumps(changed(path, value)), encoding="utf-8")
    with pytest.raises(EloError, match=message) as caught:
        read_comparison(tmp_path)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_comparisons(tmp_path):
    with pytest.raises(EloError, match="holds a comparison of several methods, not the results of one run"):
        read_results(example_comparison())
    with pytest.raises(UnfinishedError, match=r"no such file; give a run folder"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(UnfinishedError, match="not JSON"):
        report(tmp_path)
    (tmp_path / "comparison.json").write_text("[1]")
    with pytest.raises(EloError, match="not a comparison: the file"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("entries", []),
        ("entries", example_comparison()["entries"][:1]),
        ("sweeps", []),
        ("base", {}),
        ("base.bpb.en", ...),
        ("data", ...),
        ("hardware", ...),
        ("config", ...),
        ("command", None),
        ("model", {"name": "m"}),
        ("contestants.0.label", None),
        ("entries.0.trials.0.flops", None),
        ("entries.0.trials.0.peak_memory_bytes", None),
        ("entries.0.trials.0.before_alignment", None),
        ("entries.0.trials.0.bpb.en", ...),
        ("entries.0.trials", [{"seed": 1, "failed": "training diverged"}]),
    ],
)
def test_missing_parts_leave_no_holes(path, value, drawn):
    results = read_comparison(changed(path, value))
    html, markdown = pareto_html_page(results, drawn[:1]), pareto_markdown_page(results, drawn[:1])
    page = Page(html)
    for word in ("None", "nan", "inf ", "Undefined", "{{", "{%"):
        assert word not in page.words
        assert word not in markdown
    assert "None" not in shown_in_terminal(changed(path, value))
    for table in re.findall(r"<table.*?</table>", html, re.S):
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.S)}) == 1


def test_what_comes_from_elsewhere_is_escaped(drawn):
    evil = "</div><script>alert(1)</script> | `x` *b* [l](http://x)\n# h [bold]x[/bold] \ud800"
    comparison = example_comparison(title=evil, command=evil)
    comparison["contestants"][0].update(label=evil, changes={evil: evil})
    comparison["budgets"][0]["name"] = evil
    entry = entry_of(comparison, "elo", 0)
    entry["learning_rates"] = {evil: 1e-3}
    entry["trials"][0] = {"seed": 1, "failed": evil}
    sweep = sweep_of(comparison, "elo", 0)
    for index, trial in enumerate(sweep["trials"]):
        trial.update(learning_rates={evil: 1e-3 * (1 + index)}, chosen=index == 0)
    checked = read_comparison(comparison)
    page = Page(pareto_html_page(checked, drawn[:1]))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert page.words.count("<script>alert(1)</script>") >= 8
    markdown = pareto_markdown_page(checked, [])
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.S | re.M)
    assert "<script>" not in outside.replace("\\<", "")
    assert len(re.findall(r"^# ", outside, re.M)) == 1
    assert "[bold]" in shown_in_terminal(json.loads(json.dumps(comparison).replace("\\ud800", "")))


def test_every_chart_comes_where_there_is_something_to_draw(drawn):
    assert [chart.name for chart in drawn] == [
        "target_bpb_for_wall_time",
        "both_languages_1",
        "both_languages_2",
        "target_bpb_for_flops",
        "target_bpb_for_memory",
        "learning_rates_1",
        "learning_rates_2",
        "reach_1",
        "reach_2",
    ]
    assert "The base model is above the chart, at 2.412." in drawn[0].caption
    assert "1 failed" in drawn[5].caption
    assert draw_pareto_charts(read_comparison(example_comparison(entries=[], sweeps=[]))) == []


def test_contestants_look_different():
    comparison = example_comparison(entries=[], sweeps=[])
    comparison["contestants"] = [{"name": f"c{index}", "method": "elo"} for index in range(20)] + [
        {"name": "elo", "label": "층 두 개", "method": "elo"}
    ]
    styles = contestant_styles(read_comparison(comparison))
    assert len({(style.colour, style.marker) for style in styles.values()}) == 21
    assert styles["elo"].label == "elo", "the font has no Hangul"
    assert len({style.colour for style in list(styles.values())[:8]}) == 8


def test_terminal_shows_every_contestant_and_the_verdict():
    shown = shown_in_terminal(example_comparison())
    assert "At 500,000 tokens" in shown
    for label in ("ELO, six layers", "LoRA, rank 16", "Middle frozen"):
        assert label in shown
    assert " ".join(shown.split()).count("is the winner: each of its 3 seeds") == 3


def test_every_key_is_described(request):
    described = Path(request.config.rootpath / "docs" / "results.md").read_text(encoding="utf-8")
    described = described.partition("## A comparison")[2].partition("\n## ")[0]
    own = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, Record)]
    own = [record for record in own if record.__module__ == schema.__name__]
    assert len(own) == 9
    for record in own:
        for name, field in record.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", described), f"{record.__name__}.{name} is not described"
