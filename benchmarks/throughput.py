"""Measure tokens per second of the training methods and of plain PyTorch loops, side by side in one run.

    python benchmarks/throughput.py --depths 12 24 --compile --output throughput.json

All contestants get the same packed sequences, micro-batch, precision and optimizer. They take turns in each round, and
the ratios are those of medians over rounds. The table also has the matmul FLOPs per token, and the achieved share of
this machine's measured matmul rate. Weights are random, because speed does not depend on them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import matmul_rate, synchronise, write_report
from transformers import LlamaConfig, LlamaForCausalLM

from elo.checkpoint.counting import footprint
from elo.data.mixture import Mixture
from elo.data.packing import PackedStream
from elo.data.shards import TokenCorpus
from elo.methods import METHODS, Method, Setup
from elo.surgery.in_memory import detach_layers
from elo.train.arguments import wants_bf16
from elo.train.bridge import fit_bridge
from elo.train.loop import train
from elo.train.prepared import Prepared
from elo.train.settings import TrainingSettings

# Each trains embedding and head as it does in a run, so that the rates are those of the methods.
METHODS_SHOWN: dict[str, dict[str, Any]] = {
    "full CPT": {"name": "full"},
    "LoRA": {"name": "lora"},
    "LISA": {"name": "lisa"},
    "frozen middle": {"name": "frozen"},
    "detached, bridge": {"name": "elo"},
    "detached, as published": {"name": "elo_paper"},
}
BARE = ("full CPT", "detached, as published")


def make_config(args: argparse.Namespace, depth: int) -> LlamaConfig:
    heads = max(1, args.hidden_size // 64)
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def make_model(args: argparse.Namespace, depth: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(make_config(args, depth))


def make_rows(args: argparse.Namespace, count: int) -> Any:
    """Packed rows of random tokens in documents of some hundred tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 4 * args.sequence_length, size=count)
    documents = [
        np.r_[0, generator.integers(1, args.vocab_size, size=length), 0].astype(np.uint32) for length in lengths
    ]
    corpus = TokenCorpus.from_documents(documents, [3 * len(document) for document in documents])
    return Mixture([("xx", 1.0, PackedStream(corpus, args.sequence_length, 0))]).sequences(0, count)


def make_ready(args: argparse.Namespace, depth: int, method: Method, layers: tuple[int, int]) -> tuple[Any, Prepared]:
    """The model that a method's first phase trains, prepared for it."""
    phase = method.phases[0]
    model: Any = make_model(args, depth)
    bridge = None
    if phase.middle == "bridged":
        rows = make_rows(args, 8)
        bridge = fit_bridge(model, layers, (rows[index] for index in range(len(rows))))
    if phase.detached:
        model = detach_layers(model, list(layers))
    return model, method.prepare(model, phase, Setup(layers, bridge))


def train_some(
    model: Any,
    args: argparse.Namespace,
    settings: TrainingSettings,
    prepared: Prepared,
) -> tuple[float, int]:
    """Tokens per second of ELO's own trainer, after `args.warmup` updates, and its peak of memory in bytes."""
    rows = make_rows(args, (args.warmup + args.steps) * args.batch * args.accumulate)
    result = train(model, rows, settings=settings, output_dir=None, seed=0, prepared=prepared)
    end = result.losses[-1]
    begin = next(point for point in result.losses if point["tokens"] >= args.warmup * settings.tokens_per_step)
    return (end["tokens"] - begin["tokens"]) / (end["seconds"] - begin["seconds"]), result.peak_memory_bytes


def ours(
    model: Any,
    args: argparse.Namespace,
    settings: TrainingSettings,
    prepared: Prepared,
) -> Callable[[], float]:
    """Measures the tokens per second of ELO's own trainer."""
    return lambda: train_some(model, args, settings, prepared)[0]


def bare(model: Any, args: argparse.Namespace, settings: TrainingSettings) -> Callable[[], float]:
    """Tokens per second of a hand-written loop on the same model: whole-model logits, PyTorch's cross-entropy."""
    forward = torch.compile(model, dynamic=False) if settings.torch_compile else model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = make_rows(args, (args.warmup + args.steps) * args.batch * args.accumulate)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def measure() -> float:
        model.to(device).train()
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        index = 0
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                synchronise()
                started = time.perf_counter()
            for _ in range(args.accumulate):
                batch = [rows[index + offset] for offset in range(args.batch)]
                index += args.batch
                ids, positions, labels = (
                    torch.from_numpy(np.stack([row[key] for row in batch])).to(device)
                    for key in ("input_ids", "position_ids", "shift_labels")
                )
                with torch.autocast(device, torch.bfloat16, enabled=wants_bf16(settings)):
                    logits = forward(input_ids=ids, position_ids=positions, use_cache=False).logits
                    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / args.accumulate
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronise()
        return args.steps * args.accumulate * args.batch * args.sequence_length / (time.perf_counter() - started)

    return measure


def write_profile(measure: Callable[[], float], path: Path) -> None:
    """Where the time of a contestant goes, by operation, its own time without that of what it calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    spent_in = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = list(profile.key_averages())
    if torch.cuda.is_available():  # a kernel's time also stands with the operation that started it
        averages = [each for each in averages if each.device_type == torch.autograd.DeviceType.CUDA]
    whole = sum(getattr(each, spent_in) for each in averages)
    rows = sorted(averages, key=lambda each: -getattr(each, spent_in))[:15]
    lines = [f"{'operation':64}{'calls':>8}{'seconds':>10}{'share':>8}"]
    for each in rows:
        spent = getattr(each, spent_in)
        lines.append(f"{each.key[:62]:64}{each.count:8}{spent / 1e6:10.3f}{spent / whole:8.1%}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--profile", type=Path, help="folder for a table of the most expensive operations of each contestant"
    )
    parser.add_argument("--only", nargs="+", help="contestants to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    settings = TrainingSettings(
        tokens_per_step=args.batch * args.accumulate * args.sequence_length,
        per_device_train_batch_size=args.batch,
        torch_compile=args.compile,
        logging_steps=1,
        save_steps=10**9,
        evaluations=0,
    )
    rate = matmul_rate(wants_bf16(settings))
    print(f"matmul {rate / 1e9:,.0f} GFLOP/s ({'bf16' if wants_bf16(settings) else 'fp32'})", flush=True)
    depths: dict[int, dict[str, Any]] = {}
    for depth in args.depths:
        layers = (0, depth - 1)
        counted = footprint(make_config(args, depth))
        contestants: dict[str, tuple[Callable[[], float], float]] = {}
        for label, fields in METHODS_SHOWN.items():
            if args.only and not any(only.startswith(label) for only in args.only):
                continue
            method = METHODS[fields["name"]].model_validate(fields)
            phase = method.phases[0]
            cost = method.flops_per_token(phase, counted, layers, args.sequence_length).total
            model, prepared = make_ready(args, depth, method, layers)
            contestants[label] = ours(model, args, settings, prepared), cost
            if label in BARE:
                model, _ = make_ready(args, depth, method, layers)
                contestants[f"{label}, bare loop"] = bare(model, args, settings), cost
        if args.only:
            contestants = {name: each for name, each in contestants.items() if name in args.only}
        measured: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, (measure, _) in contestants.items():
                measured[name].append(measure())
        if args.profile:
            for name, (measure, _) in contestants.items():
                write_profile(measure, args.profile / f"{depth}-layers-{name.replace(', ', '-').replace(' ', '-')}.txt")
        base = statistics.median(measured.get("full CPT", [1.0]))
        print(f"\n{depth} layers x {args.hidden_size}, vocabulary {args.vocab_size}")
        print(f"{'':36}{'tokens/s':>10}{'min':>9}{'max':>9}{'/ full':>8}{'MFLOP/token':>13}{'of matmul rate':>16}")
        rows = depths[depth] = {}
        for name, rates in measured.items():
            median, cost = statistics.median(rates), contestants[name][1]
            rows[name] = {"tokens_per_second": rates, "flops_per_token": cost}
            print(
                f"{name:36}{median:10,.0f}{min(rates):9,.0f}{max(rates):9,.0f}{median / base:8.2f}"
                f"{cost / 1e6:13.1f}{median * cost / rate:16.0%}",
                flush=True,
            )
    write_report(args.output, vars(args), matmul_flops=rate, depths=depths)


if __name__ == "__main__":
    main()
