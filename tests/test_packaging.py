"""The package as others get it: `python -m elo`, shell completion, and what is in the wheel and the sdist."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import elo

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def test_the_module_runs_as_the_command() -> None:
    assert run("-m", "elo", "--help").startswith("Usage: python -m elo")


def test_the_shell_completes_verbs() -> None:
    command = "import sys; from elo.cli import main; sys.argv = ['elo']; main()"
    found = run("-c", command, _ELO_COMPLETE="complete_bash", COMP_WORDS="elo ev", COMP_CWORD="1")
    assert found.split() == ["evaluate"]


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("elo/")}
        metadata = Parser().parsestr(archive.read(f"elo_cpt-{elo.__version__}.dist-info/METADATA").decode())
    files = {path for path in (ROOT / "src/elo").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {"elo/py.typed", "elo/__main__.py", "elo/quickstart/data/prompts.json"} <= packed
    assert {Path(name).suffix for name in packed} >= {".j2", ".css", ".zst", ".safetensors", ".yaml"}
    assert metadata["Version"] == elo.__version__
    assert wheel.stat().st_size < 8_000_000


def test_the_sdist_builds_the_wheel_and_holds_the_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/test_packaging.py", "examples/tavuni/corpus.py"} <= names


def test_the_package_index_takes_the_metadata(built: Path) -> None:
    run("-m", "twine", "check", "--strict", *built.iterdir())


def test_the_citation_names_this_version_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == elo.__version__
    assert cited["references"][0]["identifiers"][0]["value"] == "arXiv:2601.03648"
