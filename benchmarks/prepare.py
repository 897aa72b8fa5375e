"""Measure the rate of `elo prepare` beside its floor: batches of the library tokenizers on text in memory.

Both run on the same documents in turn, each in a separate process. The ratio is the median of the rounds' ratios.
The floor uses all cores through the library's threads; prepare reads, parses, tokenises, checks, writes and fsyncs.
The table has CPU seconds too, because wall times vary on a shared machine.

    python benchmarks/prepare.py --tokenizer CHECKPOINT --corpus ko=ko.jsonl.gz --megabytes 100 --output prepare.json
"""

import argparse
import gzip
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
from measuring import largest_resident_bytes

from elo.data.prepare import prepare
from elo.data.sources import read_documents
from elo.data.tokenizer import load_tokenizer

BATCH_BYTES = 1 << 20


def cut_corpus(source: str, target: Path, size: int) -> int:
    """Copy documents of `source` to a .jsonl.gz until `size` bytes of text; return the bytes."""
    written = 0
    with gzip.open(target, "wt", encoding="utf-8", compresslevel=6) as file:
        for text in read_documents(source):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                break
    return written


def measure_raw(tokenizer: str, files: list[str], fast: bool) -> dict[str, Any]:
    """Tokenise the documents, held in memory, in batches; token ids are left in the library's own objects."""
    backend = load_tokenizer(tokenizer).backend
    batches: list[list[str]] = [[]]
    size = 0
    for file in files:
        for text in read_documents(file):
            batches[-1].append(text)
            size += len(text.encode())
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    started, cpu = time.perf_counter(), cpu_seconds()
    tokens = sum(len(encoding) for batch in batches for encoding in encode(batch, add_special_tokens=False))
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu, "tokens": tokens}


def measure_prepare(tokenizer: str, files: list[str], output: str, workers: int | None) -> dict[str, Any]:
    """Prepare the same documents from compressed files to finished shards."""
    loaded = load_tokenizer(tokenizer)
    corpora = {f"language{number}": file for number, file in enumerate(files)}
    before, started, cpu = largest_resident_bytes(), time.perf_counter(), cpu_seconds()
    prepared = prepare(loaded, corpora, output, heldout_share=0, workers=workers, progress=False)
    seconds, used = time.perf_counter() - started, cpu_seconds() - cpu
    summary = prepared.summary()["train"]
    return {
        "seconds": seconds,
        "cpu_seconds": used,
        "tokens": sum(totals["text_tokens"] for totals in summary.values()),
        "peak_rss": largest_resident_bytes(),
        "peak_rss_added": largest_resident_bytes() - before,
        "largest_worker_rss": largest_resident_bytes(resource.RUSAGE_CHILDREN),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def in_own_process(arguments: argparse.Namespace, what: str, files: list[str], output: Path) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--measure", what]
    command += [part for file in files for part in ("--corpus", file)] + ["--scratch", str(output)]
    command += ["--workers", str(arguments.workers)] if arguments.workers else []
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--corpus", action="append", required=True, help="corpus; may be repeated")
    parser.add_argument("--megabytes", type=float, default=50, help="megabytes of text per corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", choices=["encode_batch", "encode_batch_fast", "prepare"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure == "prepare":
        found = measure_prepare(arguments.tokenizer, arguments.corpus, arguments.scratch, arguments.workers)
        print(json.dumps(found))
        return
    if arguments.measure:
        fast = arguments.measure == "encode_batch_fast"
        print(json.dumps(measure_raw(arguments.tokenizer, arguments.corpus, fast)))
        return

    ways = ("encode_batch", "encode_batch_fast", "prepare")
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        files, size = [], 0
        for number, corpus in enumerate(arguments.corpus):
            file = Path(scratch) / f"{number}.jsonl.gz"
            size += cut_corpus(corpus, file, int(arguments.megabytes * 1e6))
            files.append(str(file))
        print(f"{size / 1e6:.1f} MB of text, tokenizers {tokenizers.__version__}", flush=True)
        for _ in range(arguments.rounds):
            rounds.append({way: in_own_process(arguments, way, files, Path(scratch) / "shards") for way in ways})
            print("  ".join(f"{way} {size / 1e6 / rounds[-1][way]['seconds']:.2f} MB/s" for way in ways), flush=True)

    def rate(way: str, key: str) -> float:
        return statistics.median(size / 1e6 / each[way][key] for each in rounds)

    def ratio(way: str, key: str) -> float:
        return statistics.median(each[way][key] / each["prepare"][key] for each in rounds)

    results = {
        "bytes": size,
        "tokenizers": tokenizers.__version__,
        "megabytes_per_second": {way: rate(way, "seconds") for way in ways},
        "megabytes_per_cpu_second": {way: rate(way, "cpu_seconds") for way in ways},
        "prepare_over": {way: ratio(way, "seconds") for way in ways[:2]},
        "prepare_over_per_cpu_second": {way: ratio(way, "cpu_seconds") for way in ways[:2]},
        "rounds": rounds,
    }
    print(f"\n{'':20}{'MB/s':>8}{'MB/CPU s':>10}{'prepare is':>12}{'(per CPU s)':>13}")
    for way in ways:
        line = f"{way:20}{rate(way, 'seconds'):8.2f}{rate(way, 'cpu_seconds'):10.2f}"
        print(line + (f"{ratio(way, 'seconds'):11.2f}x{ratio(way, 'cpu_seconds'):12.2f}x" if way != "prepare" else ""))
    last = rounds[-1]["prepare"]
    print(
        f"\npeak memory: prepare {last['peak_rss'] / 1e6:.0f} MB ({last['peak_rss_added'] / 1e6:.0f} MB above "
        f"what loading the tokenizer took), largest worker {last['largest_worker_rss'] / 1e6:.0f} MB"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
