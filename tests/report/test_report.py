"""results.json and its report: schema, pages, charts, terminal; a run and a comparison alike."""

import copy
import io
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_fixtures import SAMPLES, TITLE, Page, duel, example_comparison, example_run
from rich.console import Console

from elo import run_results
from elo.errors import EloError, UnfinishedError
from elo.format import count, duration, flops, learning_rate, memory, signed
from elo.inputs import Adapted
from elo.report import collect, schema
from elo.report.charts import bpb_segments, contestant_styles, draw_charts
from elo.report.files import judged, read_results, write_results
from elo.report.page import CHART_FOLDER, changes_text, html_page, markdown_page, terminal
from elo.report.schema_markdown import results_schema_markdown
from elo.report.tables import results_table
from elo.report.verdict import judge, score, source_excess
from elo.report.write import report
from elo.store.files import scratch_directory
from elo.store.run_folder import Artifact, RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def charts():
    return {kind: draw_charts(read_results(example)) for kind, example in EXAMPLES.items()}


EXAMPLES = {"run": example_run(), "comparison": example_comparison()}


def changed(results, path, value):
    """A copy with the value at a dotted path replaced, or removed when it is `...`."""
    results = copy.deepcopy(results)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = results
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return results


def shown_in_terminal(results):
    console = Console(file=io.StringIO(), width=118, color_system=None)
    console.print(terminal(read_results(results)))
    return console.file.getvalue()


def rows_of(results, budget=0):
    known = read_results(results)
    table = results_table(known, known.budgets[budget], judge(known).budgets[budget])
    titles = [column.title for column in table.columns]
    return [dict(zip(titles, row, strict=True)) for row in table.rows]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_is_written_is_what_is_read(kind, tmp_path):
    results = judged(read_results(EXAMPLES[kind]))
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path) == results == read_results(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["verdict"]["budgets"][0]["differences"][0]["p_value"] < 0.05
    assert max(map(len, text.splitlines())) > 300, "lists of numbers take one line"


def test_the_documentation_of_the_schema_is_up_to_date():
    """If it fails: python -m elo.report.schema_markdown > docs/results.md"""
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results_schema_markdown()


def test_every_field_is_described():
    models = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema.Record)]
    assert len(models) > 15
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_report_is_beside_the_results_and_always_the_same(kind, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(EXAMPLES[kind]), encoding="utf-8")
    page = report(tmp_path)
    assert page == tmp_path / "report.html"
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    assert not {"script", "link"} & set(parsed.tags)
    assert not [value for _, name, value in parsed.attributes if name == "href"]
    assert "url(" not in html
    number = {"run": 3, "comparison": 6}[kind]
    assert [value[:26] for _, name, value in parsed.attributes if name == "src"] == [
        "data:image/svg+xml;base64,"
    ] * number
    assert parsed.headings[:2] == [TITLE, "What was compared"]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((charts/[^)]+\.png)\)", markdown)
    assert sorted(f"charts/{path.name}" for path in (tmp_path / "charts").iterdir()) == sorted(linked)
    assert len(linked) == number
    assert all((tmp_path / link).read_bytes().startswith(b"\x89PNG") for link in linked)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report(tmp_path / "results.json")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_base_is_the_first_row_and_the_lowest_follows():
    rows = rows_of(EXAMPLES["comparison"])
    assert [row["Contestant"].text for row in rows] == ["Base model", "LoRA, rank 16", "LISA", "Full CPT", "ELO"]
    assert rows[0]["ko, target"].text == "2.412"
    best = rows[1]
    assert (best["ko, target"].text, best["ko, target"].detail, best["ko, target"].bold) == ("1.956", "−0.456", True)
    assert best["ko − Full CPT"].text == "−0.038"
    assert best["ko − Full CPT"].bold
    assert re.fullmatch(r"−0\.0\d\d to −0\.0\d\d", best["ko − Full CPT"].detail)
    assert rows[3]["ko − Full CPT"].text == "reference"
    assert (best["Tokens"].text, best["CPU time"].text, best["Peak memory"].text) == ("500 K", "1.98 min", "727 MiB")
    assert (rows[2]["Warnings"].text, best["Warnings"].text) == ("1", "–")
    assert not rows[2]["ko, target"].bold


def test_benchmarks_have_columns_with_the_direction_and_chance():
    (base, own) = rows_of(EXAMPLES["run"])
    assert (base["cloze ko"].text, own["cloze ko"].text, own["cloze ko"].detail) == ("27.0%", "44.0%", "±2.9")
    markdown = markdown_page(read_results(EXAMPLES["run"]), [])
    assert "cloze ko (↑, chance 25%)" in markdown
    assert "| cloze ko: told in ko (↑, chance 25%) | 32.0% (±3.8) | 49.0% (±4.1) |" in markdown


@pytest.mark.parametrize("kind", EXAMPLES)
def test_pages_say_what_the_verdict_says(kind, charts):
    results = read_results(EXAMPLES[kind])
    verdict = judge(results)
    words = Page(html_page(results, charts[kind])).words
    markdown = markdown_page(results, charts[kind]).replace("\\", "")
    shown = " ".join(shown_in_terminal(EXAMPLES[kind]).split())
    sentences = [sentence for budget in verdict.budgets for sentence in budget.sentences]
    assert sentences
    assert kind == "run" or verdict.warnings
    for sentence in (*sentences, *verdict.warnings):
        assert sentence in words
        assert sentence in markdown
        assert sentence in shown
    assert verdict.rule in words


def test_every_setting_that_was_tried_is_shown_with_its_score():
    markdown = markdown_page(read_results(EXAMPLES["comparison"]), [])
    line = next(line for line in markdown.splitlines() if "| 1.25e-4: " in line)
    assert line == (
        "| Full CPT (500,000 tokens) | full | 5e-4 "
        "| 1.25e-4: 2.054, 2.5e-4: 2.018, 5e-4: 2.002, 1e-3: 2.018 (+0.013), 2e-3: failed |"
    )
    assert "| ELO (500,000 tokens) | elo pretraining / layer alignment | 1e-3 / 5e-4 |" in markdown


def test_rates_that_keep_the_source_languages_come_first():
    def trial(target, excess=None, failed=None):
        validation = schema.Measured(bpb={"xx": target, "en": 1.0})
        return schema.Trial(
            contestant="full", budget="", seed=1, validation=validation, source_excess_bpb=excess, failed=failed
        )

    tried = [trial(1.9, 0.01), trial(2.1, 0.0), trial(2.0, 0.0), trial(1.8, 0.03), trial(1.0, 0.0, "diverged")]
    ordered = sorted(tried, key=lambda each: score(each, ("xx",)))
    assert [tried.index(each) for each in ordered] == [2, 1, 0, 3, 4]
    assert score(trial(1.9), ("xx",)) < score(trial(2.0), ("xx",)), "older results have no excess"
    before = schema.Measured(bpb={"xx": 3.0, "en": 1.0, "de": 1.0})
    after = schema.Measured(bpb={"xx": 4.0, "en": 0.5, "de": 1.05})
    assert source_excess(after, before, ("en", "de"), 0.02) == pytest.approx(0.03)
    assert source_excess(after, before, ("en", "fr"), 0.02) == 0.0


def test_samples_stand_side_by_side():
    page = Page(html_page(read_results(EXAMPLES["run"]), []))
    for prompt, (before, after) in SAMPLES.values():
        for text in (prompt, before.strip(), after.strip()):
            assert text in page.words
    assert "40 characters/s before, 80 with ELO." in page.words
    assert "Samples" not in Page(html_page(read_results(EXAMPLES["comparison"]), [])).headings


def test_every_chart_comes_where_there_is_something_to_draw(charts):
    assert [chart.name for chart in charts["run"]] == ["curve_1", "curve_2", "loss"]
    assert [chart.name for chart in charts["comparison"]] == [
        "target_over_cost", "retention_1", "retention_2", "curve_1", "curve_2", "loss",
    ]  # fmt: skip
    assert draw_charts(read_results(example_comparison(trials=[]))) == []


def test_a_curve_changes_model_when_the_layers_are_attached():
    results = read_results(EXAMPLES["run"])
    (trial,) = results.trials
    detached, whole = bpb_segments(results, trial, "ko")
    assert (detached.detached, whole.detached) == (True, False)
    assert detached.points[-1][1] == pytest.approx(2.53)
    attached = sum(stage.seconds for stage in trial.stages[:3])
    assert whole.points[0] == (pytest.approx(attached), 2.25)
    assert whole.points[-1] == (pytest.approx(trial.seconds), 1.824)
    comparison = read_results(EXAMPLES["comparison"])
    (full,) = bpb_segments(comparison, comparison.finished("full", "500,000 tokens")[0], "ko")
    assert full.points[0] == (0.0, 2.412)


def test_contestants_look_different():
    results = example_comparison(trials=[])
    results["contestants"] = [{"name": f"c{index}", "method": "elo"} for index in range(20)]
    results["contestants"].append({"name": "elo", "label": "층 두 개", "method": "elo"})
    styles = contestant_styles(read_results(results))
    assert len({(style.colour, style.marker) for style in styles.values()}) == 21
    assert styles["elo"].label == "elo", "the font has no Hangul"


def test_charts_draw_only_what_the_font_has():
    results = json.loads(json.dumps(EXAMPLES["run"]).replace('"ko"', '"한국어"'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw_charts(read_results(results))) == 3


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("run", "base", {}),
        ("run", "base.bpb.en", ...),
        ("run", "base.measures", []),
        ("run", "trials", []),
        ("run", "trials.0.stages", []),
        ("run", "trials.0.before_alignment", None),
        ("run", "trials.0.evaluations", []),
        ("run", "trials.0.losses", []),
        ("run", "trials.0.measured.samples", []),
        ("run", "languages.sources", []),
        ("run", "data", ...),
        ("run", "hardware", ...),
        ("run", "config", ...),
        ("run", "command", None),
        ("run", "model", {"name": "m"}),
        ("comparison", "trials", example_comparison()["trials"][:5]),
        ("comparison", "base_validation", None),
        ("comparison", "contestants.0.label", None),
    ],
)
def test_missing_parts_leave_no_holes(kind, path, value):
    given = changed(EXAMPLES[kind], path, value)
    results = read_results(given)
    html, markdown = html_page(results, []), markdown_page(results, [])
    page = Page(html)
    for word in ("None", "nan", "inf ", "Undefined", "{{", "{%"):
        assert word not in page.words
        assert word not in markdown
    assert "None" not in shown_in_terminal(given)
    assert not re.search(r"</h2>\s*(<h2|</main)", html), "a heading with nothing under it"
    assert not re.search(r"<tbody>\s*</tbody>", html)
    for table in re.findall(r"<table.*?</table>", html, re.S):
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.S)}) == 1


def test_what_comes_from_elsewhere_is_escaped(charts):
    evil = "</div><script>alert(1)</script> | `x` *b* [l](http://x)\n# h [bold]x[/bold] \ud800"
    results = copy.deepcopy(example_run(title=evil, command=evil))
    results["model"]["name"] = results["contestants"][0]["label"] = results["budgets"][0]["name"] = evil
    results["contestants"][0]["changes"] = {evil: evil}
    trial = results["trials"][0]
    trial |= {"budget": evil, "warnings": [evil], "learning_rates": {evil: 1e-3}}
    trial["measured"]["samples"] = [{"language": '"><img src=x>', "prompt": evil, "text": evil}]
    trial["measured"]["measures"][1]["name"] = trial["stages"][0]["name"] = evil
    results["config"] = {"key": evil + "\n```\n"}
    results["hardware"] = {"cpu": evil}
    known = read_results(results)
    page = Page(html_page(known, charts["run"][:1]))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert page.words.count("<script>alert(1)</script>") >= 10
    markdown = markdown_page(known, [])
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.S | re.M)
    assert "<script>" not in outside.replace("\\<", "")
    assert not re.search(r"(?<!\\)\[l(?<!\\)\]\(", outside)
    assert len(re.findall(r"^# ", outside, re.M)) == 1
    assert "[bold]" in shown_in_terminal(json.loads(json.dumps(results).replace("\\ud800", "")))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 3, "schema version 3 is newer"),
        ("schema_version", 1, "schema version 1 was written by an earlier version"),
        ("kind", "evaluation", "is an evaluation of one model; give the results.json of"),
        ("kind", "race", "kind: .* got 'race'"),
        ("contestants", [], "contestants: "),
        ("contestants.1.name", "elo", "contestants: must differ, got elo, elo"),
        ("contestants.1.name", "base", "`base` is the name of the base model"),
        ("budgets.0.kind", "hours", "budgets.0.kind: .* got 'hours'"),
        ("budgets.1.value", 0, "budgets.1.value: .* got 0"),
        ("seeds", [1, 1], "seeds: must differ, got 1, 1"),
        ("trials.2.contestant", "nobody", "trials.2.contestant: 'nobody' is not one of elo, "),
        ("trials.2.budget", "ages", "trials.2.budget: 'ages' is not one of "),
        ("trials.5.seed", 1, r"trials.5: \('elo', '500,000 tokens', 1\) occurs twice"),
        ("trials.4.measured", {}, "trials.4.measured.bpb: ko missing, but the trial did not fail"),
        ("trials.4.measured.bpb.ko", "low", "trials.4.measured.bpb.ko: .* got 'low'"),
        ("trials.4.measured.document_bytes.ko", [1], r"document_bytes.ko: 1 values for 60 documents"),
        ("trials.4.measured.document_bytes.ko", [9] * 60, "the documents are not those of the base model"),
        ("trials.0.learning_rates.elo_pretraining", -1, "learning_rates.elo_pretraining: .* got -1"),
        ("trials.0.stages.0.seconds", float("inf"), "trials.0.stages.0.seconds: "),
        ("trials.0.seed", ..., "trials.0.seed: Field required"),
        ("languages", ..., "languages: Field required"),
        ("base.bpb.ko", -1, "base.bpb.ko: .* got -1"),
    ],
)
def test_a_wrong_file_gives_one_message(tmp_path, path, value, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(changed(EXAMPLES["comparison"], path, value)), encoding="utf-8")
    with pytest.raises(EloError, match=message) as caught:
        report(tmp_path)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UnfinishedError, match=r"no such file; give a finished run or comparison folder"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UnfinishedError, match="not JSON"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(EloError, match="not results of a run or comparison: the file"):
        report(tmp_path)
    with pytest.raises(EloError, match="give an output folder"):
        report(example_run())


def test_an_evaluation_record_becomes_a_measurement():
    record = {
        "bpb": {"ko": 1.5},
        "heldout": {"ko": {"documents": 2, "tokens": 30, "bytes": 100}},
        "documents_nats": {"ko": [51.98604, 52.0]},
        "documents_bytes": {"ko": [40, 60]},
        "measures": [
            {"measure": "cloze", "language": "ko", "value": 0.25, "items": 300, "standard_error": 0.025},
            {"measure": "in_context_nats", "value": 2.5, "unit": "number", "higher_is_better": False},
        ],
        "samples": [{"language": "ko", "prompt": "a", "text": "b"}],
        "generation": {"ko": {"characters": 1, "seconds": 2.0}},
    }
    found = collect.measured(record)
    assert found.document_nats == {"ko": (51.986, 52.0)}
    assert found.document_bytes == {"ko": (40, 60)}
    assert found.heldout["ko"].documents == 2
    assert [(each.language, each.value, each.items) for each in found.measures] == [("ko", 0.25, 300), ("", 2.5, None)]
    assert found.measures[0].standard_error == 0.025
    assert collect.measured({"bpb": {"ko": 1.0}}).document_nats == {}


def test_stage_records_become_a_trial():
    record = {"seconds": 2.0, "tokens": 0, "tokens_per_second": None, "peak_memory_bytes": 5}
    point = {"tokens": 4, "seconds": 1.0}
    trained = {
        **record, "tokens": 8, "losses": [{**point, "loss": 3.0}], "evaluations": [{**point, "bpb": {"ko": 2.0}}],
        "trainable_parameters": 7, "warnings": ["loss jumped"],
    }  # fmt: skip
    stages = {
        "detach": record, "vocabulary-elo_pretraining": record, "elo_pretraining": trained, "attach": record,
        "scale": {**record, "scale": 0.5}, "layer_alignment": trained,
    }  # fmt: skip
    trial = collect.trial(
        "elo",
        "b",
        3,
        stages,
        {"bpb": {"ko": 1.5}},
        before_alignment={"bpb": {"ko": 1.9}},
        flops={"elo_pretraining": 10.0, "layer_alignment": 5.0},
    )
    assert (trial.tokens, trial.seconds, trial.flops, trial.peak_memory_bytes) == (16, 12.0, 15.0, 5)
    assert trial.cpu_seconds is None
    assert [stage.name for stage in trial.stages if stage.detached] == ["elo_pretraining"]
    assert [(each.stage, each.tokens, each.seconds) for each in trial.losses] == [
        ("elo_pretraining", 4, 5.0), ("layer_alignment", 12, 11.0),
    ]  # fmt: skip
    assert trial.evaluations[1].tokens == 12
    assert (trial.attach_scale, trial.before_alignment.bpb["ko"]) == (0.5, 1.9)
    assert trial.stages[2].trainable_parameters == 7
    assert trial.warnings == ("loss jumped", "loss jumped")


def test_numbers_as_people_read_them():
    assert [signed(value) for value in (0.0204, -0.5, -0.0001)] == ["+0.020", "−0.500", "±0.000"]
    assert [duration(value) for value in (0.6, 89.4, 120, 6000)] == ["0.6 s", "89.4 s", "2 min", "1.67 h"]
    assert [count(value) for value in (999, 1500, 2e6, 3.1e9)] == ["999", "1.5 K", "2 M", "3.1 B"]
    assert [memory(value) for value in (5, 2**20, 1.5 * 2**30)] == ["5 B", "1 MiB", "1.5 GiB"]
    assert [learning_rate(value) for value in (1e-3, 5e-4, 3.16e-5, 0.2, 1.0)] == [
        "1e-3", "5e-4", "3.16e-5", "2e-1", "1e0",
    ]  # fmt: skip
    assert [flops(value) for value in (5e13, 1.234e15, 999.9e15)] == ["50 TFLOP", "1.23 PFLOP", "1 EFLOP"]
    assert changes_text({"lora": {"rank": 16, "on": True}, "layers": "first:2", "x": None}) == (
        "lora.rank=16, lora.on=true, layers=first:2, x=none"
    )


def test_a_failed_contestant_keeps_its_row():
    rows = rows_of(duel(full=[1.9, 1.91], elo=[None, 1.8], lora=[None, None]))
    names = {row["Contestant"].text: row["Contestant"].detail for row in rows}
    assert names == {"Base model": "", "elo": "2 seeds, 1 failed", "full": "2 seeds", "lora": "2 seeds, 2 failed"}
    assert rows[-1]["ko, target"].text == "–"


def test_a_report_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    """As when `elo report` writes the same charts."""
    monkeypatch.setattr(run_results, "_results", lambda *arguments, **options: read_results(EXAMPLES["run"]))
    said = []
    inputs = SimpleNamespace(folder=RunFolder(tmp_path, said.append))
    now = inputs, None, {}, Adapted(Artifact(tmp_path, "")), "full", {"bpb": {}}
    with scratch_directory(tmp_path / CHART_FOLDER):
        run_results.report_progress(*now)
    assert len(said) == 1 and "another process is writing it" in said[0]
    run_results.report_progress(*now)
    assert len(said) == 1 and (tmp_path / "report.html").exists()
