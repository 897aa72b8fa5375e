"""A local Ray cluster of one node, to which a test may add more."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NODE = {"object_store_memory": 80 << 20, "include_dashboard": False, "include_log_monitor": False}


@contextmanager
def ray_cluster(cpus: int) -> Iterator[Any]:
    """Start a node with as many CPUs; stop all nodes at the end."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # beside other tests
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short, because Ray makes sockets in it
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": cpus, "temp_dir": folder})
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
