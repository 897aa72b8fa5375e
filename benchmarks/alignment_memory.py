"""Measure time and memory of training a whole model and of cheaper options, beside the estimates of `elo plan`.

    python benchmarks/alignment_memory.py --layers 12 --hidden-size 768 --output alignment_memory.json

Layer alignment and full CPT (continual pretraining) train every layer, which determines the peak memory of a run with
such a phase. Each contestant trains a Llama with random weights for a few updates in a separate process. The table also
has the memory and rate that `elo plan --measure` estimates, and a lower bound for plain training: the memory of the
model's weights, gradients and AdamW state. To compare the loss, use `elo compare`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, in_process, print_table, write_report
from throughput import make_config, make_ready, train_some
from transformers import PretrainedConfig

from elo.checkpoint.counting import footprint
from elo.methods import METHODS, Method
from elo.plan.plan import plan, planned_run
from elo.plan.schema import PhasePlan
from elo.train.settings import TrainingSettings


@dataclass(frozen=True)
class Contestant:
    """A method, whose first phase is trained, and the settings that it trains with."""

    method: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Method:
        return METHODS[self.method["name"]].model_validate(self.method)


FULL = {"name": "full"}
CHECKPOINTING = {"activation_checkpointing": True}
EIGHT_BIT = {"optim": "adamw_8bit"}
CONTESTANTS = {
    "full, AdamW": Contestant(FULL),
    "full, activation checkpointing": Contestant(FULL, CHECKPOINTING),
    "full, 8-bit AdamW": Contestant(FULL, EIGHT_BIT),
    "full, 8-bit AdamW, checkpointing": Contestant(FULL, EIGHT_BIT | CHECKPOINTING),
    "full, Adafactor, checkpointing": Contestant(FULL, {"optim": "adafactor"} | CHECKPOINTING),
    "LISA": Contestant({"name": "lisa"}),
    "frozen middle": Contestant({"name": "frozen"}),
    "LoRA, rank 16": Contestant({"name": "lora", "rank": 16}),
    "LoRA, rank 16, checkpointing": Contestant({"name": "lora", "rank": 16}, CHECKPOINTING),
    "detached, bridge": Contestant({"name": "elo"}),
    "detached, bridge, checkpointing": Contestant({"name": "elo"}, CHECKPOINTING),
    "detached, bridge, 8-bit AdamW": Contestant({"name": "elo"}, EIGHT_BIT),
    "detached, bridge, layers alone": Contestant({"name": "elo", "also_train": []}),
    "detached, bridge, layers alone, checkpointing": Contestant({"name": "elo", "also_train": []}, CHECKPOINTING),
    "detached, as published": Contestant({"name": "elo_paper"}),
}


def settings_of(args: argparse.Namespace, contestant: Contestant) -> TrainingSettings:
    return TrainingSettings(
        tokens_per_step=args.batch * args.accumulate * args.sequence_length,
        per_device_train_batch_size=args.batch,
        logging_steps=1,
        save_steps=10**9,
        save_total_limit=1,
        evaluations=0,
        **contestant.settings,
    )


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""glibc then gives freed memory of 1 MiB and more back at once: it takes time, and what is left is what is in use."""


def measure(args: argparse.Namespace, contestant: Contestant) -> dict[str, float]:
    """Train here, for a few updates: tokens/s after the first, and the peak of memory in bytes."""
    model, prepared = make_ready(args, args.layers, contestant.make(), (0, args.layers - 1))
    rate, peak = train_some(model, args, settings_of(args, contestant), prepared)
    return {"tokens_per_second": rate, "peak_memory_bytes": peak}


def measure_apart(
    args: argparse.Namespace, name: str, *, module: str = "alignment_memory", env: dict[str, str] | None = None
) -> dict[str, Any]:
    """A module's `measure` in a process of its own; {"failed": why} where it fails, most likely for want of memory."""
    size = {key: value for key, value in vars(args).items() if key not in ("only", "output")}
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import argparse, json; from {module} import CONTESTANTS, measure\n"
        f"print(json.dumps(measure(argparse.Namespace(**{size!r}), CONTESTANTS[{name!r}])))"
    )
    found = in_process(code, env=env)
    return found if "failed" in found else json.loads(found["printed"].splitlines()[-1])


def planned_phase(
    args: argparse.Namespace, contestant: Contestant, config: PretrainedConfig, **where: Any
) -> PhasePlan:
    """What `elo plan` estimates of its first phase; `where` is the device or how to measure this one."""
    step = args.batch * args.accumulate * args.sequence_length
    changes = {
        "method": contestant.method,
        "tokens": 100 * step,
        "data.sequence_length": args.sequence_length,
        "training.tokens_per_step": step,
        "training.per_device_train_batch_size": args.batch,
        **{f"training.{key}": value for key, value in contestant.settings.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        run = planned_run(folder, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
        return plan(run, compare_with=(), **where).run.phases[0]


def estimate(args: argparse.Namespace, contestant: Contestant) -> dict[str, Any]:
    """Tokens per second and peak of memory in use, in bytes, by `elo plan --measure`."""
    phase = planned_phase(args, contestant, make_config(args, args.layers), measure=True)
    in_use = phase.memory.peak_bytes - phase.memory.parts.get("held by malloc", 0)
    return {"tokens_per_second": phase.tokens_per_second, "peak_memory_bytes": in_use}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="contestants to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    counted = footprint(make_config(args, args.layers))
    floor = 16 * counted.total
    print(f"{counted.total / 1e6:.0f} M parameters; fp32 weights, gradients and AdamW state {floor // MIB:,} MiB")
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for name in args.only or CONTESTANTS:
        measured = measure_apart(args, name)
        if "failed" in measured:
            results[name] = measured
            rows.append([name, "failed", *[""] * 6])
            print(f"{name}: {measured['failed'][-300:]}", file=sys.stderr, flush=True)
            continue
        in_use = {} if torch.cuda.is_available() else measure_apart(args, name, env=GIVES_BACK)
        measured["in_use_bytes"] = in_use.get("peak_memory_bytes", measured["peak_memory_bytes"])
        planned = estimate(args, CONTESTANTS[name])
        results[name] = {"measured": measured, "planned": planned}
        plain = results.get("full, AdamW", {}).get("measured", measured)
        cells = [f"{measured[key] // MIB:,}" for key in ("peak_memory_bytes", "in_use_bytes")]
        cells.append(f"{measured['tokens_per_second']:,.0f}")
        for key in ("in_use_bytes", "tokens_per_second"):
            cells.append(f"{measured[key] / plain[key]:.2f}")
        for key, estimated in (("in_use_bytes", "peak_memory_bytes"), ("tokens_per_second", "tokens_per_second")):
            cells.append(f"{planned[estimated] / measured[key]:.2f}")
        rows.append([name, *cells])
        print(f"{name}: {cells[0]} MiB, {cells[2]} tokens/s", file=sys.stderr, flush=True)
    columns = ["", "peak MiB", "in use", "tokens/s", "in use / plain", "rate / plain", "planned / in use", "rate"]
    print_table(columns, rows)
    write_report(args.output, vars(args), contestants=results)


if __name__ == "__main__":
    main()
