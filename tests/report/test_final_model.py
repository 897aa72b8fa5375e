"""The final model's folder: model card, configuration, and every file of the base."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from run_fixtures import write_world
from transformers import AutoModelForCausalLM

from elo.config import load_config
from elo.report.card import base_licence
from elo.run import run

BASE_CARD = "---\nlicense: other\nlicense_name: tiny\n---\n\n# Tiny, a base | by us\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("final")
    config = write_world(root) | {"method": {"name": "full"}}
    base = root / "base"
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE.txt").write_text("terms")
    (base / "assets").mkdir()
    (base / "assets" / "note.txt").write_text("note")
    return root, config, run(config)


def test_the_card_is_one_that_the_hub_reads(finished):
    root, _, results = finished
    card = ModelCard.load(root / "run" / "model" / "README.md")
    data = card.data.to_dict()
    assert data["language"] == ["xx", "en"]
    assert data["library_name"] == "transformers"
    assert {"elo", "full"} <= set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "tiny")
    assert "base_model" not in data, "a folder is not a name on the hub"
    for heading in ("Use", "Base", "Data", "Method", "Cost", "Results", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card.text, heading
    for language in ("xx", "en"):
        assert f"{results['base']['bpb'][language]:.3f}" in card.text
        assert f"{results['trials'][0]['measured']['bpb'][language]:.3f}" in card.text
        sizes = results["data"]["train"][language]
        assert f"| {language}, training" in card.text
        assert f" | {sizes['documents']:,} | {sizes['tokens']:,} | {sizes['bytes']:,} |" in card.text
    assert "Tokens: 1,280" in card.text
    assert "held-out documents; conclusions need at least 30" in card.text
    assert "names other, tiny" in card.text.replace("\\", "")
    assert "LICENSE.txt" in card.text
    assert str(root) not in card.text, "a card is published; paths are private"


def test_a_hub_id_is_named_as_base(finished, monkeypatch):
    root, _, results = finished
    from elo.report.card import model_card
    from elo.report.files import read_results

    results = json.loads(json.dumps(results))
    results["model"]["name"] = "someone/tiny"
    card = ModelCard(model_card(read_results(results), root / "base", "elo_run.yaml"))
    assert card.data.base_model == "someone/tiny"


def test_every_file_of_the_base_and_of_the_stage_is_there(finished):
    root, _, _ = finished
    model = root / "run" / "model"
    assert (model / "README_base.md").read_text() == BASE_CARD
    names = {str(path.relative_to(root / "base")) for path in (root / "base").rglob("*") if path.is_file()}
    found = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert found - names == {"README_base.md", "elo_run.yaml"}
    assert not names - found
    assert (model / "model.safetensors").samefile(root / "run" / "full" / "model.safetensors"), "no second copy on disk"
    assert (root / "run" / "full" / "README.md").read_text() == BASE_CARD, "the stage's own files stay as they are"
    AutoModelForCausalLM.from_pretrained(model)


def test_the_configuration_runs_again(finished, capsys):
    root, config, _ = finished
    written = root / "run" / "model" / "elo_run.yaml"
    assert load_config(written) == load_config(config)
    capsys.readouterr()
    run(written)
    assert "full: already done" in capsys.readouterr().out


def test_cards_of_earlier_runs_are_kept_in_their_order(finished, tmp_path):
    root, config, _ = finished
    again = config | {"model": str(root / "run" / "model"), "output": str(tmp_path / "run")}
    run(again)
    model = tmp_path / "run" / "model"
    assert (model / "README_base_base.md").read_text() == BASE_CARD
    assert (model / "README_base.md").read_text() == (root / "run" / "model" / "README.md").read_text()
    assert yaml.safe_load((model / "elo_run_base.yaml").read_text())["model"] == config["model"]
    assert yaml.safe_load((model / "elo_run.yaml").read_text())["model"] == again["model"]


@pytest.mark.parametrize("text", [None, "no metadata", "---\nlicense: [\n---\n", "---\nlanguage: ko\n---\n"])
def test_a_base_without_a_readable_licence_has_none(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_licence(tmp_path) == {}
