"""`elo doctor` reports this machine and installation as they are."""

import importlib.metadata
import json
import os
import sys

import pytest
import torch

from elo import doctor
from elo.cli import main
from elo.doctor import examine, render
from elo.plan.devices import this_machine


@pytest.fixture(scope="module")
def found() -> dict:
    return examine()


def test_json_is_what_was_examined(capsys: pytest.CaptureFixture[str], found: dict) -> None:
    main(["doctor", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == found.keys()
    assert printed["packages"] == found["packages"] and printed["features"] == found["features"]
    assert printed["python"]["executable"] == sys.executable
    assert printed["cuda"]["usable"] is torch.cuda.is_available()
    assert 0 < printed["hardware"]["available_memory_bytes"] <= printed["hardware"]["memory_bytes"]
    assert all(at["free_bytes"] > 0 for at in printed["disk"].values())


def test_memory_needs_no_names_that_only_linux_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no SC_AVPHYS_PAGES, and Python of conda there no SC_PHYS_PAGES either."""

    def refuse(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", refuse)
    assert examine()["hardware"]["memory_bytes"] > 0
    assert this_machine().memory_bytes > 0


def test_versions_are_compared_with_the_requirements(found: dict) -> None:
    packages = {each["name"]: each for each in found["packages"]}
    assert packages["torch"]["version"] == importlib.metadata.version("torch")
    assert packages["torch"]["requires"] and not packages["torch"]["is_wrong"]
    assert "bitsandbytes" not in packages  # only an extra needs it


def test_features_name_what_is_missing_and_the_remedy(found: dict) -> None:
    features = {each["feature"]: each for each in found["features"]}
    for feature, package in (("report_to: mlflow", "mlflow"), ("training_arguments: deepspeed", "deepspeed")):
        installed = bool(importlib.metadata.packages_distributions().get(package))
        assert features[feature]["missing"] == ([] if installed else [package])
    assert features["benchmarks (--tasks), translation"]["remedy"] == "pip install 'elo-cpt[eval]'"


def test_the_table_names_every_package_and_feature(capsys: pytest.CaptureFixture[str], found: dict) -> None:
    main(["doctor"])
    printed = capsys.readouterr().out
    assert all(each["name"] in printed for each in found["packages"])
    assert "torch_compile" in printed and "Memory" in printed


def test_it_works_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source tree there is no metadata, and then no requirement to compare with."""
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-package-of-elo")
    found = examine()
    assert found["elo"] is None and found["packages"] == []
    render(found)
