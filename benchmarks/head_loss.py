"""Measure time and memory of the LM head's cross-entropy, forward and backward to hidden states, with a frozen head.

    python benchmarks/head_loss.py --tokens 4096 --vocab-sizes 2048 8192 32768 --hidden-size 256 --output head_loss.json

The floor is the measured time of two matrix products of tokens x hidden x vocabulary (logits and input gradient).
The default of elo.train.loss is based on these figures.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import synchronise, write_report

from elo.train.loss import head_cross_entropies
from elo.train.peak_memory import peak_memory_bytes, reset_peak_memory

CONTESTANTS = [
    ("plain", None),
    ("linear_cross_entropy", None),
    *(("chunked", size) for size in (64, 128, 256, 512, 1024)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp32", action="store_true", help="use fp32 instead of bf16")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    report = []
    for tokens in args.tokens:
        for vocab in args.vocab_sizes:
            torch.manual_seed(0)
            hidden_ND = torch.randn(tokens, args.hidden_size, device=device, dtype=dtype)
            weight_VD = (0.05 * torch.randn(vocab, args.hidden_size, device=device)).to(dtype)
            labels_N = torch.randint(0, vocab, (tokens,), device=device)

            def once(implementation: Any, chunk: int | None, data: Any = (hidden_ND, weight_VD, labels_N)) -> float:
                hidden = data[0].detach().requires_grad_()
                synchronise()
                started = time.perf_counter()
                loss, _ = head_cross_entropies([hidden], data[1], data[2], implementation=implementation, chunk=chunk)
                loss.backward()
                synchronise()
                return time.perf_counter() - started

            def floor(data: Any = (hidden_ND, weight_VD)) -> float:
                synchronise()
                started = time.perf_counter()
                logits = data[0] @ data[1].t()
                logits @ data[1]
                synchronise()
                return time.perf_counter() - started

            times: dict[str, list[float]] = {}
            memory: dict[str, int] = {}
            for turn in range(args.rounds + 1):  # the first warms up
                seconds = floor()
                times.setdefault("floor: two matmuls", []).extend([seconds] if turn else [])
                for implementation, chunk in CONTESTANTS:
                    name = f"{implementation} {chunk}" if chunk else implementation
                    reset_peak_memory()
                    before = peak_memory_bytes()
                    seconds = once(implementation, chunk)
                    memory[name] = max(memory.get(name, 0), peak_memory_bytes() - before)
                    times.setdefault(name, []).extend([seconds] if turn else [])
            base = statistics.median(times["plain"])
            print(f"\n{tokens} tokens x {args.hidden_size} x {vocab}, {dtype}")
            print(f"{'':24}{'ms':>9}{'plain /':>9}{'extra MiB':>11}")
            for name, measured in times.items():
                median = statistics.median(measured)
                extra = f"{memory[name] / 2**20:11.0f}" if name in memory else ""
                print(f"{name:24}{1e3 * median:9.1f}{base / median:9.2f}{extra}", flush=True)
            report.append({"tokens": tokens, "vocab": vocab, "seconds": times, "extra_bytes": memory})
    write_report(args.output, vars(args), dtype=str(dtype), sizes=report)


if __name__ == "__main__":
    main()
