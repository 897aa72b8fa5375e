"""A local Ray cluster of one node, to which a test may add more."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

NODE = {"object_store_memory": 80 << 20, "include_dashboard": False, "include_log_monitor": False}


@contextmanager
def ray_cluster(cpus: int) -> Iterator[Any]:
    """Start a node with as many CPUs; stop all nodes at the end."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # A short path, because Ray makes sockets in it. Ray writes the cluster's address to RAY_TMPDIR/ray, and does
        # not make that folder.
        temporary = Path(folder, "ray")
        temporary.mkdir()
        ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_TMPDIR": folder}  # beside other tests
        with patch.dict(os.environ, ours):
            head = {**NODE, "num_cpus": cpus, "temp_dir": str(temporary)}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            yield cluster
            cluster.shutdown()
