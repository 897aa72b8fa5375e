"""`examples/ray_train.py` on two workers of a local Ray cluster: the run of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray_fixtures import ray_cluster
from run_fixtures import write_world

pytestmark = pytest.mark.slow
RAY_TRAIN = Path(__file__).parents[2] / "examples" / "ray_train.py"
STAGES = ("elo_pretraining", "layer_alignment")


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(cpus=2) as cluster:
        yield cluster


def start(command: list[str | Path], home: Path) -> tuple[int, str]:
    """Run a command to its end; Ray Train writes to the home folder."""
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def test_two_workers_end_with_the_weights_of_torchrun(cluster, tmp_path):
    config = write_world(tmp_path)
    config["training"]["per_device_train_batch_size"] = 1
    ways = {
        "ray": [RAY_TRAIN, "--address", cluster.address],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "elo.cli", "run"],
    }
    losses, weights = {}, {}
    for name, command in ways.items():
        path, output = tmp_path / f"{name}.yaml", tmp_path / name
        path.write_text(yaml.safe_dump({**config, "output": str(output)}))
        status, said = start([*command, path], tmp_path)
        assert status == 0, said
        stages = {stage: json.loads((output / "stages" / f"{stage}.json").read_text()) for stage in STAGES}
        losses[name] = {stage: [point["loss"] for point in each["record"]["losses"]] for stage, each in stages.items()}
        weights[name] = (output / "model" / "model.safetensors").read_bytes()
    assert losses["ray"] == losses["torchrun"]
    assert weights["ray"] == weights["torchrun"]
