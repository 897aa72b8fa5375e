"""Links between the Markdown files lead somewhere, and the site has every page."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "dev", "examples") for path in (ROOT / folder).rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)")


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for path, anchor in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {path} does not exist"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: {path} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_evidence_exists(page: Path) -> None:
    """Tests, benchmarks and results that a page names, by path or, for tests, by name."""
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"`(test_\w+\.py)", text)) - {path.name for path in (ROOT / "tests").rglob("*.py")}
    paths = {path for path in re.findall(r"`((?:benchmarks|tests)/[\w./-]+\.\w+)", text) if not (ROOT / path).exists()}
    assert not names | paths


def test_every_result_is_named_and_every_named_result_exists() -> None:
    files = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    evidence = set(re.findall(r"results/(\w+\.json)", text))
    assert evidence <= files
    in_groups = {name for group in re.findall(r"results/(\w+\*\.json)", text) for name in files if fnmatch(name, group)}
    assert files - in_groups <= set(re.findall(r"\w+\.json", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_follow_a_blank_line(page: Path) -> None:
    """GitHub shows a list that follows text at once; mkdocs shows it as text."""
    lines = without_code(page.read_text(encoding="utf-8")).split("\n")
    in_list = False
    for number, line in enumerate(lines):
        item = re.match(r"\s*([-*]|\d+\.) ", line) is not None
        starts = item and not in_list and number > 0 and not re.match(r"\s*$|#|> *$", lines[number - 1])
        assert not starts, f"{page.relative_to(ROOT)}: {line}"
        in_list = bool(line.strip()) and (item or in_list)


def test_the_site_has_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for each in entries for page in pages(each)]

    listed = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= listed
