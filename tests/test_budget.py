"""A token budget is divided in the steps of what trains on it."""

import pytest
from run_fixtures import write_world

from elo.config import load_config
from elo.errors import EloError
from elo.job import open_job


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("budget"))


def _divided(world, **changes):
    config = load_config(world, [f"{key}={value}" for key, value in changes.items()])
    with open_job(config) as job:
        job.divide_budget(job.prepare())
        method = job.method(config.method)
        return [(phase.name, (rows := job.rows.of(phase, method, {})).start, rows.stop) for phase in method.phases]


def test_pretraining_and_alignment_follow_each_other(world):
    assert _divided(world) == [("elo_pretraining", 0, 32), ("layer_alignment", 32, 40)]


def test_the_steps_of_what_does_not_train_do_not_matter(world):
    """An update of ELO's larger than the whole budget is no hindrance to full CPT."""
    changes = {"method": "full", "elo_pretraining.tokens_per_step": 4096, "layer_alignment.tokens_per_step": 4096}
    assert _divided(world, **changes) == [("full", 0, 40)]
    with pytest.raises(EloError, match=r"1,280 tokens is less than one step of full \(4,096\); give"):
        _divided(world, method="full", **{"full.tokens_per_step": 4096})


def test_a_control_that_aligns_keeps_its_share_and_changes_nothing_else(world):
    alone = {"elo.alignment": "none", "elo_pretraining.tokens_per_step": 64, "layer_alignment.tokens_per_step": 192}
    assert _divided(world, **alone) == [("elo_pretraining", 0, 40)]
    assert _divided(world, **alone, controls="[align_only]") == [("elo_pretraining", 0, 40)]
    assert _divided(world, **alone, method="align_only") == [("layer_alignment", 30, 36)]
    changes = {"elo.alignment": "none", "controls": "[align_only]", "layer_alignment.tokens_per_step": 4096}
    with pytest.raises(EloError, match=r"elo_pretraining \(64\) and one of layer_alignment \(4,096\)"):
        _divided(world, **changes)


def test_a_section_is_named_once(world):
    with pytest.raises(EloError, match=r"is less than one step of layer_alignment \(4,096\); give"):
        _divided(world, method="align_only", **{"layer_alignment.tokens_per_step": 4096})
