"""Measure time and peak memory of detach and attach on a checkpoint of several files, beside a plain copy.

The copy is the floor: it reads and writes as many bytes, with the same fsync, without looking at them. All contestants
alternate, each in a separate process, with the files in the page cache. Seconds exclude the interpreter's start and the
imports, which have their own column. Ratios are medians of the rounds' ratios.

    python benchmarks/surgery.py --megabytes 4000 --rounds 3 --output surgery.json
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import MIB, finished, print_table, weights_size, write_report

LAYERS = "first:1,last:1"
ENDS = ("embedding", "norm", "head")
# Copies in pieces of 16 MiB, as any copy does, and waits until the bytes are on the disk.
COPY = """
import os, pathlib, shutil
target = pathlib.Path({target!r}); target.mkdir()
for file in sorted(pathlib.Path({source!r}).iterdir()):
    with file.open("rb", buffering=0) as reading, (target / file.name).open("wb", buffering=0) as writing:
        while piece := reading.read(16 << 20):
            writing.write(piece)
        os.fsync(writing.fileno())
"""
# What ELO trains by default: everything that is detached changes.
TRAIN = """
import pathlib, torch
from safetensors.torch import load_file, save_file
for file in pathlib.Path({folder!r}).glob("*.safetensors"):
    save_file({{name: tensor + 1 for name, tensor in load_file(file).items()}}, file, metadata={{"format": "pt"}})
"""
MAKE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size={vocabulary}, hidden_size=2048, intermediate_size=8192, num_hidden_layers={layers},
    num_attention_heads=16, dtype="bfloat16")
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained({folder!r}, max_shard_size={shard!r})
"""


def timed(code: str) -> dict[str, Any]:
    """Seconds of some code in a process of its own, without imports, and the process's peak memory."""
    clock = "import time, elo.surgery.on_disk; started = time.perf_counter()"
    found = finished(f"{clock}\n{code}\nprint(time.perf_counter() - started)")
    return {"seconds": float(found["printed"].split()[-1]), "peak_rss_mib": found["peak_rss_mib"]}


def make_checkpoint(folder: Path, megabytes: int, *, vocabulary: int = 32_000, shard: str = "500MB") -> None:
    """Random bf16 weights of about this size, in several files."""
    layers = max(3, (megabytes - vocabulary * 8192 // MIB) // 128)
    finished(MAKE.format(folder=str(folder), layers=layers, vocabulary=vocabulary, shard=shard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: a temporary folder")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="elo-surgery-", dir=args.scratch))
    base, detached, trained, attached, copied = (
        scratch / name for name in ("base", "detached", "trained", "attached", "copied")
    )
    try:
        make_checkpoint(base, args.megabytes)
        detach = f"import elo; elo.detach({str(base)!r}, {LAYERS!r}, output={str(detached)!r})"
        attach = f"import elo; elo.attach({str(trained)!r}, {str(base)!r}, output={str(attached)!r}, include={ENDS!r}"
        finished(detach)
        shutil.copytree(detached, trained)
        finished(TRAIN.format(folder=str(trained)))
        sizes = {"base_mib": weights_size(base) // MIB, "detached_mib": weights_size(trained) // MIB}
        copy_detached = COPY.format(source=str(trained), target=str(copied))
        copy_base = COPY.format(source=str(base), target=str(copied))
        contestants = {
            "copy of the detached model's bytes": (copy_detached, copied),
            "detach": (detach, detached),
            "copy of the base's bytes": (copy_base, copied),
            "attach": (f"{attach})", attached),
            "attach --link": (f"{attach}, link=True)", attached),
        }
        floors = {name: list(contestants)[0 if number < 2 else 2] for number, name in enumerate(contestants)}
        shutil.rmtree(detached)
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        start = finished("import elo.surgery.on_disk")
        for _ in range(args.rounds):
            for name, (code, made) in contestants.items():
                measured[name].append(timed(code))
                shutil.rmtree(made)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    print(f"base {sizes['base_mib']:,} MiB, detached {sizes['detached_mib']:,} MiB", end="; ")
    print(f"imports alone {start['seconds']:.1f} s, {start['peak_rss_mib']} MiB")
    rows = []
    for name, rounds in measured.items():
        floor = measured[floors[name]]
        seconds = statistics.median(each["seconds"] for each in rounds)
        ratio = statistics.median(each["seconds"] / under["seconds"] for each, under in zip(rounds, floor, strict=True))
        peak = max(each["peak_rss_mib"] for each in rounds)
        rows.append([name, f"{seconds:.1f}", f"{ratio:.2f}", f"{peak:,}"])
    print_table(["", "seconds", "/ copy", "peak MiB"], rows)
    write_report(args.output, vars(args), sizes=sizes, imports_alone=start, measured=measured)


if __name__ == "__main__":
    main()
