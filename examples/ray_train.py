"""Start `elo run` on workers of Ray Train, which takes the place of torchrun.

    python examples/ray_train.py ko.yaml --workers 8 --gpu

Run it on a node of the Ray cluster. Configuration, corpora and run folder are on a file system that all nodes share.
After the loss of a worker, the run starts again once the cluster has room for as many, up to three times, and resumes
from its last checkpoint (`save_steps`). To stop it for longer, press Ctrl-C; the same command resumes.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from elo.api import run


def train(given: dict[str, Any]) -> None:
    """Run ELO in one worker. Ray has set what torchrun sets, and connected the processes."""
    os.chdir(given["folder"])
    run(given["config"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of the run")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--gpu", action="store_true", help="give each process a GPU")
    parser.add_argument("--address", help="address of the Ray cluster (default: RAY_ADDRESS or this machine)")
    arguments = parser.parse_args()
    ray.init(arguments.address)
    TorchTrainer(
        train,
        train_loop_config={"config": arguments.config, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
