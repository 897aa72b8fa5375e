"""Which layers deep supervision takes, what it refuses, and that a run plans, trains and reports it."""

import pytest
import torch
import yaml
from run_fixtures import write_world
from training_fixtures import LENGTH, SETTINGS, rows, supervision, tiny_llama

from elo.errors import EloError
from elo.methods import METHODS
from elo.methods.base import check_supervision
from elo.plan.plan import plan, planned_run
from elo.run import run
from elo.train.arguments import sequences_per_step
from elo.train.loop import train
from elo.train.settings import DeepSupervision


@pytest.mark.parametrize(
    ("layers", "num_layers", "found"),
    [
        ([0, 2], 4, [0, 2]),
        ([-2], 4, [2]),
        ([0.5], 30, [14]),
        ([0.25, 0.5, 0.99], 12, [2, 5, 10]),
        ([0.1], 4, [0]),
        ([0.5], 2, [0]),
    ],
)
def test_layers_are_indices_or_shares_of_the_depth(layers, num_layers, found):
    assert list(supervision(layers).weight_by_layer(num_layers)) == found


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ([3], 4, "is not a layer below the last one"),
        ([-1], 4, "is not a layer below the last one"),
        ([-5], 4, "is not a layer below the last one"),
        ([1.0], 4, "is not a layer below the last one"),
        ([0.5], 1, "is not a layer below the last one"),
        ([0.25, 0.5], 2, "selects a layer twice"),
        ([1, -3], 4, "selects a layer twice"),
    ],
)
def test_other_layers_are_refused(layers, num_layers, message):
    with pytest.raises(EloError, match=message):
        supervision(layers).weight_by_layer(num_layers)


@pytest.mark.parametrize("weights", [[], [1.0, 1.0], [0.0], [-1.0]])
def test_each_layer_has_one_positive_weight(weights):
    with pytest.raises(ValueError):
        DeepSupervision(layers=[0], weights=weights)


def test_a_loss_that_trains_nothing_is_refused():
    settings = SETTINGS.model_copy(update={"deep_supervision": supervision([0])})
    (phase,) = METHODS["frozen"].model_validate({"name": "frozen", "also_train": []}).phases
    with pytest.raises(EloError, match="nothing trains at or below layer 0 in phase frozen; write layers from 2 on"):
        check_supervision(phase, settings, (2, 3), 4)
    check_supervision(phase, settings, (0, 3), 4)
    pretraining, _ = METHODS["elo"].model_validate({"name": "elo"}).phases
    with pytest.raises(EloError, match=r"trained model of 1 layers.*phase elo_pretraining"):
        check_supervision(pretraining, settings, (3,), 4)


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"head_loss": "plain"}], ids=str)
def test_execution_settings_change_nothing(tmp_path, settings):
    def losses(name, **changes):
        torch.manual_seed(0)
        chosen = SETTINGS.model_copy(update={"deep_supervision": supervision([0, 2]), "evaluations": 0, **changes})
        mixture = rows(3 * sequences_per_step(LENGTH, chosen))
        result = train(tiny_llama(), mixture, settings=chosen, output_dir=tmp_path / name, seed=5)
        return [[point["loss"], *point["internal"].values()] for point in result.losses]

    plain, changed = losses("plain"), losses("changed", **settings)
    assert len(plain[0]) == 3
    for left, right in zip(plain, changed, strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_a_run_records_the_losses_and_their_flops_as_the_plan_counts_them(tmp_path):
    config = write_world(tmp_path)
    config["training"]["deep_supervision"] = {"layers": [0.5], "weights": [0.3]}
    config["output"] = str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    planned = plan(planned_run(file))
    results = run(file)
    (trial,) = results["trials"]
    assert trial["losses"] and all(len(point["internal"]) == 1 for point in trial["losses"])
    flops = {stage["name"]: stage["flops"] / stage["tokens"] for stage in trial["stages"] if stage["flops"]}
    assert flops == {phase.name: pytest.approx(phase.flops_per_token.total) for phase in planned.run.phases}
