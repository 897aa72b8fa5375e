"""Compare `elo prepare` on one node with a local Ray cluster of two nodes that have as many CPUs together.

The text is written to files of equal size, each a task on Ray. Each round prepares it both ways, in separate
processes. The time is that of `prepare()`: on Ray it includes the start of the nodes' processes, but not of the nodes.

    python benchmarks/ray_prepare.py --tokenizer CHECKPOINT --corpus ko.jsonl --megabytes 1000 --output ray_prepare.json
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from measuring import in_process
from prepare import cut_corpus
from ray.cluster_utils import Cluster

from elo.store.files import sha256_file, write_json

CODE = """
import json, time
from elo.data.prepare import prepare
from elo.data.tokenizer import load_tokenizer
tokenizer, corpora, output, settings = json.loads({given!r})
tokenizer = load_tokenizer(tokenizer)
started = time.perf_counter()
prepared = prepare(tokenizer, corpora, output, heldout_share=0, progress=False, **settings)
seconds = time.perf_counter() - started
print(json.dumps([seconds, prepared.summary()["train"]["text"]["text_tokens"]]))
"""


def write_files(source: str, folder: Path, size: int, number: int) -> tuple[list[str], int]:
    """Write `size` bytes of text to `number` files, each with the beginning of `source`."""
    folder.mkdir()
    files = [folder / f"{index}.jsonl.gz" for index in range(number)]
    written = cut_corpus(source, files[0], size // number)
    for file in files[1:]:
        shutil.copyfile(files[0], file)
    return [str(file) for file in files], written * number


@contextmanager
def local_cluster(cpus: int) -> Iterator[str]:
    """Start a local cluster of two nodes with `cpus` CPUs each, and yield its address."""
    node: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": 80 << 20, "include_dashboard": False}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # as the processes of one node
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # short, because Ray makes sockets in it
        cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder})
        try:
            cluster.add_node(**node)
            yield cluster.address
        finally:
            cluster.shutdown()


def measure(tokenizer: str, files: list[str], output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Prepare the files in a separate process; return time, tokens and the checksums of what was written."""
    started = time.monotonic()
    found = in_process(CODE.format(given=json.dumps([tokenizer, {"text": files}, str(output), settings])))
    if "failed" in found:
        raise SystemExit(found["failed"])
    seconds, tokens = json.loads(found["printed"].splitlines()[-1])
    checksums = {str(path.relative_to(output)): sha256_file(path) for path in output.rglob("*") if path.is_file()}
    shutil.rmtree(output)
    print(f"{settings}: {seconds:.1f} s, {tokens} tokens ({time.monotonic() - started:.0f} s in all)", flush=True)
    return {"seconds": seconds, "tokens": tokens, "checksums": checksums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--corpus", required=True, help="corpus of which the beginning is used")
    parser.add_argument("--megabytes", type=float, default=100, help="megabytes of text in all files together")
    parser.add_argument("--files", type=int, default=8, help="number of files, a multiple of the CPUs")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each way, an even number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    if given.cpus < 2 or given.cpus % 2 or given.files % given.cpus:
        parser.error("--cpus must be even and --files a multiple of it")

    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        files, size = write_files(given.corpus, Path(scratch) / "text", int(given.megabytes * 1e6), given.files)
        shards = Path(scratch) / "shards"
        for _ in range(given.rounds):
            alone = measure(given.tokenizer, files, shards, {"workers": given.cpus})
            with local_cluster(given.cpus // 2) as address:
                rounds.append({"one_node": alone, "ray": measure(given.tokenizer, files, shards, {"ray": address})})
    checksums = [way.pop("checksums") for each in rounds for way in each.values()]
    ratio = statistics.median(each["ray"]["seconds"] / each["one_node"]["seconds"] for each in rounds)
    results = {
        "bytes": size,
        "files": given.files,
        "cpus": given.cpus,
        "ray": ray.__version__,
        "identical": all(each == checksums[0] for each in checksums),
        "ray_over_one_node": ratio,
        "rounds": rounds,
    }
    write_json(given.output, results)
    print(f"{size / 1e6:.0f} MB: Ray takes {ratio:.2f} of one node's time; identical: {results['identical']}")


if __name__ == "__main__":
    main()
