import copy
import io
import json
import re
import warnings

import pytest
from elo.reporting import results as schema
from elo.reporting.charts import bpb_segments, draw_charts
from elo.reporting.comparison import (
    compare,
    count,
    duration,
    figures,
    findings,
    group_columns,
    group_note,
    memory,
    rate_speed_up,
    seconds_to_reach,
    signed,
    standard_error,
    verdict,
)
from elo.reporting.pages import html_page, markdown_page
from elo.reporting.results import ClozeGroup, read_results
from elo.reporting.terminal import render_comparison
from report_fixtures import TITLE, Page, example_results, grouped_results
from rich.console import Console

from elo.errors import EloError, UnfinishedError
from elo.report.write import report


@pytest.fixture(scope="module")
def charts():
    return draw_charts(read_results(example_results()))


def changed(path, value):
    """Example results with the value at a dotted path replaced, or removed when it is `...`."""
    results = copy.deepcopy(example_results())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = results
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return results


def test_a_run_folder_gets_its_report_beside_the_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(example_results()), encoding="utf-8")
    page = report(tmp_path)
    assert page == tmp_path / "report.html"
    parsed = Page(page.read_text(encoding="utf-8"))
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert [value[:26] for _, name, value in parsed.attributes if name == "src"] == ["data:image/svg+xml;base64,"] * 6
    assert not [value for _, name, value in parsed.attributes if name == "href"]
    assert "url(" not in page.read_text(encoding="utf-8")
    assert parsed.headings[:2] == [TITLE, "Comparison"]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((charts/[^)]+\.png)\)", markdown)
    assert len(linked) == 6
    assert sorted(f"charts/{path.name}" for path in (tmp_path / "charts").iterdir()) == sorted(linked)
    for link in linked:
        assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report(tmp_path / "results.json")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, "not the same bytes"


def test_both_pages_say_what_the_numbers_say(charts):
    results = read_results(example_results())
    words, markdown = Page(html_page(results, charts)).words, markdown_page(results, charts)
    for page in (words, markdown.replace("\\", "")):
        assert "ELO took ko from 2.412 to 1.824 bits per byte (−0.588) while en rose (+0.023)." in page
        assert "In the same wall time full CPT ends higher, at 1.902 (en +0.053)" in page
        assert "on the same tokens, in 3.67 times the wall time, full CPT ends lower, at 1.683 (en +0.084)." in page
        assert "5.45×" in page
        assert "elo run test.yaml --set seed=7" in page
        assert "강 건너 마을에는" in page
        assert "never across languages" in page
    row = next(line for line in markdown.splitlines() if line.startswith("| Full CPT |"))
    assert row == (
        "| Full CPT | 2 M | 6.87 min | 1.00× | **1.683 (−0.729)** | 1.402 (+0.084) | **52.0%** | 64.0% | 1.31 GiB |"
    )


@pytest.mark.parametrize(
    ("bpb", "outcome"),
    [
        (1.700, "In the same wall time full CPT ends lower, at 1.700"),
        (1.822, "In the same wall time full CPT ends level with it, at 1.822"),
        (1.950, "In the same wall time full CPT ends higher, at 1.950"),
    ],
)
def test_the_verdict_follows_the_numbers(bpb, outcome):
    assert outcome in verdict(read_results(changed("methods.2.bpb.ko", bpb)))


def test_the_verdict_without_controls_says_that_there_are_none():
    results = read_results(example_results(methods=example_results()["methods"][:1]))
    assert "No full-CPT control was run" in verdict(results)
    assert [figure.name for figure in figures(results)] == ["Target language (ko)", "Source language (en)"]


def test_source_language_that_is_kept_or_improves():
    assert "en stayed level (+0.002)" in verdict(read_results(changed("methods.0.bpb.en", 1.320)))
    assert "en fell (−0.018)" in verdict(read_results(changed("methods.0.bpb.en", 1.300)))


def test_ratios_are_of_what_they_say():
    results = read_results(example_results())
    rows = {row.method.name: row for row in compare(results)}
    own, full = results.methods[0], results.method("full")
    assert rows["elo"].speed_up == pytest.approx(full.wall_seconds / own.wall_seconds)
    assert rows["full_at_wall_time"].speed_up is None, "it saw fewer tokens: no ratio on the same tokens"
    assert rows["align_only"].speed_up is None
    assert rate_speed_up(results) == pytest.approx((1_800_000 / 68.0) / (2_000_000 / 412.0))
    assert {name for name, row in rows.items() if "target" in row.best} == {"full"}
    assert {name for name, row in rows.items() if "cloze_source" in row.best} == {"elo", "frozen"}
    assert {name for name, row in rows.items() if "memory" in row.best} == {"frozen"}


def shown_in_terminal(results):
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(render_comparison(results))
    return console.export_text()


def test_cloze_accuracy_by_group_is_in_every_view(charts):
    results = grouped_results()
    checked = read_results(results)
    markdown, html = markdown_page(checked, charts[:1]), html_page(checked, charts[:1])
    table = markdown.partition("## Cloze accuracy by group\n\n")[2].partition("\n\n")[0].splitlines()
    groups = [f"{language}: told in {name} (100 items)" for language in ("ko", "en") for name in ("ko", "en", "both")]
    assert table[0] == "| Method | " + " | ".join(groups) + " |"
    assert len(table) == 2 + 6
    assert table[2].startswith("| Base model, before | 35.0% ±4.8 | 19.0% ±3.9 | 27.0% ±4.4 | 41.0% ±4.9 |")
    assert table[3].startswith("| ELO | 52.0% ±5.0 | 36.0% ±4.8 | 44.0% ±5.0 | 39.0% ±4.9 |")
    page = Page(html)
    assert "Cloze accuracy by group" in page.headings
    assert "en: told in both 100 items" in page.words
    assert "ELO 52.0% ±5.0 36.0% ±4.8" in page.words
    rows = re.findall(r"<tr.*?</tr>", html.partition("Cloze accuracy by group")[2].partition("</table>")[0], re.S)
    assert [len(re.findall(r"<t[hd]\b", row)) for row in rows] == [7] * 7
    lines = shown_in_terminal(results).splitlines()
    row = next(line for line in lines if "ko: told in en" in line)
    assert row.replace("│", " ").split()[:8] == ["ko:", "told", "in", "en", "100", "19%", "±4", "36%"]
    for shown in (page.words, markdown.replace("\\", ""), " ".join(" ".join(lines).split())):
        assert "Guessing would give, over all items of a language: ko 25%, en 25%." in shown
        assert "one standard error" in shown
        assert "Items without a group" not in shown


def test_without_groups_nothing_is_said_of_them(charts):
    results = read_results(changed("base.cloze.ko.groups", {}))
    assert group_columns(results) == []
    for shown in (html_page(results, charts[:1]), markdown_page(results, charts[:1])):
        assert "by group" not in shown
    assert "by group" not in shown_in_terminal(example_results())


def test_groups_that_only_some_models_were_asked():
    results = grouped_results()
    for method in results["methods"]:
        del method["cloze"]["ko"]["groups"]
    del results["methods"][1]["cloze"]["en"]
    del results["base"]["cloze"]["en"]["groups"]["told_in_en"]
    results["base"]["cloze"]["ko"]["groups"] = {"a_b": {"accuracy": 1.0, "items": 1}}
    checked = read_results(results)
    columns = group_columns(checked)
    assert [(column.language, column.name) for column in columns] == [
        ("ko", "a b"),
        ("en", "told in ko"),
        ("en", "told in both"),
        ("en", "told in en"),
    ]
    assert [group is not None for group in columns[0].groups] == [True] + [False] * 5
    assert [group is not None for group in columns[3].groups] == [False, True, False, True, True, True]
    assert "Items without a group are in the overall accuracy alone." in group_note(checked)
    table = markdown_page(checked, []).partition("by group\n\n")[2].splitlines()
    assert table[2].startswith("| Base model, before | 100.0% | 41.0% ±4.9 | 71.0% ±4.5 | – |")
    assert table[4] == "| Full CPT | – | – | – | – |"
    page = Page(html_page(checked, []))
    assert "Full CPT – – – –" in page.words


def test_names_of_groups_are_shown_as_they_are():
    results = example_results()
    name = "<script>x</script> | [bold]*b*"
    results["base"]["cloze"]["ko"]["groups"] = {name: {"accuracy": 0.5, "items": 4}}
    checked = read_results(results)
    page = Page(html_page(checked, []))
    assert "script" not in page.tags
    assert f"ko: {name} 4 items" in page.words
    assert "ko: \\<script\\>x\\</script\\> \\| \\[bold\\]\\*b\\* (4 items)" in markdown_page(checked, [])
    assert "[bold]*b*" in shown_in_terminal(results)


def test_standard_error_is_that_of_a_share():
    assert standard_error(ClozeGroup(accuracy=0.25, items=300)) == pytest.approx(0.025)
    for accuracy, items in ((0.0, 10), (1.0, 10), (0.5, 0)):
        assert standard_error(ClozeGroup(accuracy=accuracy, items=items)) is None
    assert standard_error(None) is None


def test_slower_than_full_is_said_too():
    results = read_results(changed("methods.1.wall_seconds", 60.0))
    ratio = next(figure for figure in figures(results) if figure.name == "Wall time, same tokens")
    assert (ratio.value, ratio.tone) == ("0.53×", "bad")


def test_findings_name_every_control():
    found = findings(read_results(example_results()))
    assert len(found) == 5
    assert found[0] == (
        "Against ELO, Full CPT (the same tokens, 3.67 times the wall time) ends 0.141 lower in ko (target) and "
        "0.061 higher in en (source)."
    )
    assert "level in en (source)" in found[3]
    assert (
        found[4]
        == "Before layer alignment the attached model stood at 2.306 in ko (then 1.824) and 1.702 in en (then 1.341)."
    )


def test_time_to_a_value_is_interpolated():
    method = read_results(
        changed(
            "methods.1.evaluations",
            [
                {"stage": "full", "tokens": 10, "seconds": 10.0, "bpb": {"ko": 2.0}},
                {"stage": "full", "tokens": 20, "seconds": 30.0, "bpb": {"ko": 1.8}},
            ],
        )
    ).methods[1]
    assert seconds_to_reach(method, "ko", 1.9, 2.4) == pytest.approx(20.0)
    assert seconds_to_reach(method, "ko", 2.2, 2.4) == pytest.approx(5.0)
    assert seconds_to_reach(method, "ko", 1.0, 2.4) is None


def test_elo_curve_changes_model_at_alignment():
    method = read_results(example_results()).methods[0]
    detached, whole = bpb_segments(method, "ko", "tokens", 2.412)
    assert (detached.detached, whole.detached) == (True, False)
    assert detached.points[-1] == (1_800_000.0, pytest.approx(2.53))
    assert whole.points[0] == (1_800_000.0, 2.306)
    assert whole.points[-1] == (2_000_000.0, 1.824)
    assert all(at <= 1_800_000 for at, _ in detached.points)
    (full,) = bpb_segments(read_results(example_results()).methods[1], "ko", "seconds", 2.412)
    assert full.points[0] == (0.0, 2.412)
    assert full.points[-1] == (412.0, 1.683)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("methods", example_results()["methods"][:1]),
        ("methods", [{"name": "elo", "tokens": 0, "wall_seconds": 0.0}]),
        ("base", {}),
        ("base.bpb.en", ...),
        ("base.cloze", {}),
        ("methods.0.samples", ...),
        ("methods.0.stages", []),
        ("methods.0.before_alignment", None),
        ("methods.0.evaluations", []),
        ("methods.1.losses", []),
        ("methods.0.peak_memory_bytes", None),
        ("data", ...),
        ("hardware", ...),
        ("config", ...),
        ("command", None),
        ("model", {"name": "m"}),
    ],
)
def test_missing_parts_leave_no_holes(path, value, charts):
    results = read_results(changed(path, value))
    html = html_page(results, charts[:1])
    page = Page(html)
    for word in ("None", "nan", "Undefined", "{{", "{%"):
        assert word not in page.words
        assert word not in markdown_page(results, charts[:1])
    assert not re.search(r"</h2>\s*<h2", html), "a heading with nothing under it"
    assert not re.search(r"<tbody>\s*</tbody>", html)
    assert "None" not in shown_in_terminal(changed(path, value))
    cells = [re.findall(r"<t[hd]\b", row) for row in re.findall(r"<tr.*?</tr>", html, re.S)]
    assert all(cells)
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.S)}) == 1


def test_charts_come_only_with_points():
    bare = example_results()
    for method in bare["methods"]:
        method.update(losses=[], evaluations=[], before_alignment=None)
    bare["methods"] = bare["methods"][:1]
    bare["base"]["bpb"] = {}
    assert draw_charts(read_results(bare)) == []


def test_what_comes_from_elsewhere_is_escaped(charts):
    evil = "</div><script>alert(1)</script> | `x` *b* [l](http://x)\n# h \ud800"
    results = example_results(title=evil, command=evil, seed=None)
    results["model"]["name"] = results["methods"][0]["label"] = results["methods"][0]["note"] = evil
    results["methods"][0]["samples"] = [{"language": '"><img src=x>', "prompt": evil, "text": evil}]
    results["base"]["samples"] = []
    results["config"] = {"key": evil + "\n```\n"}
    results["hardware"] = {"cpu": evil}
    results["methods"][0]["stages"][0]["name"] = evil
    checked = read_results(results)
    page = Page(html_page(checked, charts[:1]))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert page.words.count("<script>alert(1)</script>") >= 8
    markdown = markdown_page(checked, [])
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.S | re.M)
    assert "<script>" not in outside.replace("\\<", "")
    assert not re.search(r"(?<!\\)\[l(?<!\\)\]\(", outside)
    assert len(re.findall(r"^# ", outside, re.M)) == 1
    tables = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "ELO" in line or "script" in line} <= {10, 8}


def test_labels_that_the_font_lacks_are_not_drawn():
    results = example_results(languages={"target": "한국어", "source": "en"})
    results["methods"] = results["methods"][:2]
    for measured in (results["base"], *results["methods"]):
        measured["bpb"] = {"한국어": measured["bpb"]["ko"], "en": measured["bpb"]["en"]}
    results["methods"][0]["label"] = "층 두 개"
    results["methods"][1]["label"] = "costs $1 and $2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_charts(read_results(results))
    assert drawn[0].title == "Target language (한국어) over wall time"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema 2 is newer than this version reads"),
        ("schema", ..., "schema: Field required"),
        ("methods", [], "methods: "),
        ("methods.0.tokens", "many", "methods.0.tokens: .* got 'many'"),
        ("methods.0.bpb.ko", -1, "methods.0.bpb.ko: .* got -1"),
        ("methods.1.name", "elo", "methods: names must differ, got elo, elo"),
        ("base.cloze.ko.accuracy", 44, "base.cloze.ko.accuracy: "),
        ("base.cloze.ko.groups", {"a": {"accuracy": 0.5}}, "base.cloze.ko.groups.a.items: Field required"),
        ("methods.0.losses.3.loss", float("nan"), "methods.0.losses.3.loss: "),
        ("kind", "evaluation", "what `elo evaluate` measured"),
        ("languages", ..., "languages: Field required"),
    ],
)
def test_odd_results_give_one_message(tmp_path, path, value, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(changed(path, value)), encoding="utf-8")
    with pytest.raises(EloError, match=message) as caught:
        report(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UnfinishedError, match="no such file"):
        report(tmp_path)
    with pytest.raises(UnfinishedError, match="no such file"):
        report(tmp_path / "other.json")
    (tmp_path / "results.json").write_text('{"schema": 1,')
    with pytest.raises(UnfinishedError, match="not JSON"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(EloError, match="not the results of a run: the file"):
        report(tmp_path)
    with pytest.raises(EloError, match="give an output folder"):
        report(example_results())


def test_numbers_as_people_write_them():
    assert [signed(value) for value in (0.1234, -0.5, 0.0001, -0.0004)] == ["+0.123", "−0.500", "±0.000", "±0.000"]
    assert [duration(s) for s in (0.512, 8, 89, 90, 3600, 9000)] == [
        "0.512 s",
        "8 s",
        "89 s",
        "1.5 min",
        "60 min",
        "2.5 h",
    ]
    assert [count(n) for n in (0, 999, 1000, 999_999, 24_117_248, 8e9)] == ["0", "999", "1 K", "1 M", "24.1 M", "8 B"]
    assert [memory(n) for n in (512, 2**30, 1.5 * 2**30, 1010 * 2**20)] == ["512 B", "1 GiB", "1.5 GiB", "0.986 GiB"]


def test_every_key_is_described(request):
    described = (request.config.rootpath / "docs" / "results.md").read_text(encoding="utf-8")
    records = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema.Record)]
    assert len(records) > 10
    for record in records:
        for name, field in record.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", described), (
                f"{record.__name__}.{name} is not in docs/results.md"
            )


def test_pretraining_in_the_whole_model_is_drawn_as_the_whole_model():
    """With a forward-only middle nothing is detached: its curve starts at the base and is not dashed."""
    results = example_results()
    own = results["methods"][0]
    own["stages"] = [stage for stage in own["stages"] if stage["name"] not in ("detach", "attach")]
    own["before_alignment"] = None
    method = read_results(results).methods[0]
    (segment,) = bpb_segments(method, "ko", "tokens", 3.0)
    assert not segment.detached
    assert segment.points[0] == (0.0, 3.0)
    assert len(segment.points) > len([e for e in method.evaluations if e.stage != "elo_pretraining"]) + 1
