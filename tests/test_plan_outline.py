"""What was counted for a plan is kept for the next one of the same model, and for no other."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import LLAMA_8B

import elo.plan.plan
from elo.errors import EloError
from elo.plan.plan import plan

SMALL = LLAMA_8B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 512}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ELO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What outlines were drawn for."""
    calls: list[Any] = []
    original = elo.plan.plan.draw_outline

    def draw(*arguments: Any, **asked: Any) -> Any:
        calls.append(asked)
        return original(*arguments, **asked)

    monkeypatch.setattr(elo.plan.plan, "draw_outline", draw)
    return calls


def _kept(model: Path) -> list[Path]:
    return sorted((model.parents[1] / "cache" / "plans").iterdir())


def test_a_second_plan_is_the_same_and_builds_no_model(model: Path, drawn: list[Any]) -> None:
    first = plan(model, sequence_length=512)
    assert plan(model, sequence_length=512) == first
    assert plan(model.parent, sequence_length=512)["stages"] == first["stages"], "the folder of the same config"
    other = plan(model, sequence_length=1024, per_device_train_batch_size=2, device="L4")
    assert len(drawn) == 1
    assert other == plan(_without_cache(model), sequence_length=1024, per_device_train_batch_size=2, device="L4")


def _without_cache(model: Path) -> Path:
    os.environ["ELO_CACHE"] = "/dev/null/none"  # undone with the fixture's monkeypatch
    return model


def test_a_second_plan_needs_neither_torch_nor_transformers(model: Path) -> None:
    plan(model)
    code = (
        "import sys; from elo.cli import main\n"
        "try: main(['plan', sys.argv[1]])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Assumptions" in done.stdout


def test_another_model_and_other_layers_are_counted_anew(model: Path, drawn: list[Any]) -> None:
    first = plan(model)
    model.write_text(json.dumps(SMALL | {"num_hidden_layers": 8}))
    assert plan(model)["parameters"]["total"] > first["parameters"]["total"]
    plan(model, layers="first:2,last:1")
    plan(model, also_train=())
    assert len(drawn) == 4
    with pytest.raises(EloError, match="layer"):
        plan(model, layers="first:1,last:9")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"counted": {}}', b'{"counted": {"layers": [1]}}', b"\xff\x00"]
)
def test_what_is_damaged_is_made_again(model: Path, drawn: list[Any], content: bytes) -> None:
    first = plan(model)
    (kept,) = _kept(model)
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert plan(model) == first and len(drawn) == 2
    assert kept.read_bytes() == whole


def test_a_config_that_sends_on_to_another_is_counted_anew(model: Path, drawn: list[Any]) -> None:
    model.write_text(json.dumps(SMALL | {"configuration_files": ["config.json", "config.5.0.0.json"]}))
    for layers in (8, 10):
        (model.parent / "config.5.0.0.json").write_text(json.dumps(SMALL | {"num_hidden_layers": layers}))
        assert plan(model.parent)["model"]["num_layers"] == layers
    assert len(drawn) == 2


def test_a_name_that_no_file_has_is_told() -> None:
    with pytest.raises(EloError, match="model"):
        plan("a\0b")


def test_a_folder_that_cannot_be_written_is_no_hindrance(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELO_CACHE", str(model))  # a file
    assert plan(model)["model"]["num_layers"] == 6
