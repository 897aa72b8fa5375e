"""What training a whole model costs in time and memory, and what each way of paying less saves: beside `elo plan`.

    python benchmarks/alignment_memory.py --layers 12 --hidden-size 768 --output alignment_memory.json

Layer alignment and full CPT train every layer, which is the peak of a run that has such a phase. Each contestant trains
a Llama of random weights for a few updates in a process of its own. Printed beside: what `elo plan --measure` says of
memory and rate, and what the model's weights, gradients and AdamW state alone take, the floor of plain training.
What the same choices do to the loss is a question for `elo compare`.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from elo.methods.methods import Options, find_method
from measuring import MIB, in_process, print_table, write_report
from throughput import make_config, make_ready, train_some
from transformers import PretrainedConfig

from elo.checkpoint.counting import footprint
from elo.plan.plan import plan
from elo.train.settings import PUBLISHED, EloOptions, TrainingSettings


@dataclass(frozen=True)
class Contestant:
    """A way to train, and where `elo plan` tells about it."""

    method: str
    options: Options = field(default_factory=Options)
    settings: dict[str, Any] = field(default_factory=dict)
    planned: str | None = "layer_alignment"
    """Its place among the stages or baselines of a plan; None: not planned."""

    def plan_arguments(self) -> dict[str, Any]:
        elo = self.options.elo
        found: dict[str, Any] = {"stand_in": elo.stand_in, "also_train": elo.also_train, "alignment": "full"}
        if optim := self.settings.get("optim"):
            found |= {"optim": optim, "alignment_optim": optim}
        return found | {"activation_checkpointing": self.settings.get("activation_checkpointing", False)}


CHECKPOINTING = {"activation_checkpointing": True}
EIGHT_BIT = {"optim": "adamw_8bit"}
FORWARD_ONLY = Options(elo=EloOptions(stand_in="forward_only", alignment="full"))
BRIDGE = Options(elo=EloOptions(stand_in="bridge", alignment="full"))
CONTESTANTS = {
    "full, AdamW": Contestant("full"),
    "full, activation checkpointing": Contestant("full", settings=CHECKPOINTING),
    "full, 8-bit AdamW": Contestant("full", settings=EIGHT_BIT),
    "full, 8-bit AdamW, checkpointing": Contestant("full", settings=EIGHT_BIT | CHECKPOINTING),
    "full, Adafactor, checkpointing": Contestant("full", settings={"optim": "adafactor"} | CHECKPOINTING),
    "LISA": Contestant("lisa", planned=None),
    "frozen middle": Contestant("frozen", planned="frozen"),
    "LoRA, rank 16": Contestant("lora", planned="lora"),
    "forward-only middle": Contestant("elo", FORWARD_ONLY, planned="elo_pretraining"),
    "forward-only middle, 8-bit AdamW": Contestant("elo", FORWARD_ONLY, EIGHT_BIT, "elo_pretraining"),
    "detached, bridge": Contestant("elo", BRIDGE, planned="elo_pretraining"),
    "detached, bridge, 8-bit AdamW": Contestant("elo", BRIDGE, EIGHT_BIT, "elo_pretraining"),
    "detached, as published": Contestant("elo_paper", Options(elo=PUBLISHED), planned="elo_pretraining"),
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
    method = find_method(contestant.method, contestant.options)
    model, prepared = make_ready(args, args.layers, method, (0, args.layers - 1))
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


def planned_stage(
    args: argparse.Namespace, contestant: Contestant, config: PretrainedConfig, **where: Any
) -> dict[str, Any] | None:
    """What `elo plan` says of it; `where` is the device or how to measure this one."""
    if contestant.planned is None:
        return None
    planned = plan(
        config,
        tokens=1_000_000,
        alignment_share=0.5,
        sequence_length=args.sequence_length,
        per_device_train_batch_size=args.batch,
        tokens_per_step=args.batch * args.accumulate * args.sequence_length,
        **where,
        **contestant.plan_arguments(),
    )
    found: dict[str, Any] = (planned["stages"] | planned["baselines"])[contestant.planned]
    return found


def foretell(args: argparse.Namespace, contestant: Contestant) -> dict[str, Any] | None:
    """Tokens per second and peak of memory in bytes by `elo plan --measure`."""
    stage = planned_stage(args, contestant, make_config(args, args.layers), measure=True)
    if stage is None:
        return None
    return {"tokens_per_second": stage["tokens_per_second"], "peak_memory_bytes": stage["memory"]["peak"]}


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
        foretold = foretell(args, CONTESTANTS[name])
        results[name] = {"measured": measured, "planned": foretold}
        plain = results.get("full, AdamW", {}).get("measured", measured)
        cells = [f"{measured[key] // MIB:,}" for key in ("peak_memory_bytes", "in_use_bytes")]
        cells.append(f"{measured['tokens_per_second']:,.0f}")
        for key in ("in_use_bytes", "tokens_per_second"):
            cells.append(f"{measured[key] / plain[key]:.2f}")
        for key, planned in (("in_use_bytes", "peak_memory_bytes"), ("tokens_per_second", "tokens_per_second")):
            cells.append("" if foretold is None else f"{foretold[planned] / measured[key]:.2f}")
        rows.append([name, *cells])
        print(f"{name}: {cells[0]} MiB, {cells[2]} tokens/s", file=sys.stderr, flush=True)
    columns = ["", "peak MiB", "in use", "tokens/s", "in use / plain", "rate / plain", "planned / in use", "rate"]
    print_table(columns, rows)
    write_report(args.output, vars(args), contestants=results)


if __name__ == "__main__":
    main()
