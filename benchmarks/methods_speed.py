"""Measure the training speed of every contestant of a comparison, side by side in one process, beside its FLOPs.

    python benchmarks/methods_speed.py COMPARISON.yaml --steps 6 --rounds 3 --output results/methods_speed.json
    python benchmarks/methods_speed.py COMPARISON.yaml --plan --steps 3 --rounds 1 --output results/plan_accuracy.json

Each round trains every phase of every contestant for a few updates, in turn, so that a slow period of the machine
affects all of them. The first update warms up. The fastest round counts. Time is CPU time, so pin the process to one
core (taskset -c 0, OMP_NUM_THREADS=1). On a GPU, it is wall time. With --plan, `elo plan --measure` follows each
contestant, timed in the same way.
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import synchronise

from elo.budget import divide_budget
from elo.checkpoint.counting import footprint, read_config
from elo.config import CompareConfig, RunConfig, contestant_run, load_comparison
from elo.evaluate.loading import load_model
from elo.inputs import Inputs
from elo.methods import Phase, Setup
from elo.plan.plan import plan
from elo.preflight import check_model
from elo.run import open_run, prepare_data
from elo.store.environment import hardware, versions
from elo.surgery.in_memory import detach_layers
from elo.train.arguments import micro_steps_per_step
from elo.train.bridge import Bridge, fit_bridge
from elo.train.loop import train
from elo.train.phase import freeze_in, keeps_frozen_as_stored, load_trainable
from elo.train.vocabulary_cut import CutSequences, VocabularyCut, choose_rows


def now() -> float:
    """Return the time that counts, in seconds: this process's CPU time, or wall time on a GPU once it is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    synchronise()
    return time.perf_counter()


def contestant_config(comparison: CompareConfig, name: str, tokens: int, folder: Path) -> RunConfig:
    """The run of a contestant at its default rates."""
    return contestant_run(comparison, name, folder, learning_rates={}, tokens=tokens, seed=comparison.seeds[0])


class Speeds:
    """Times phases of contestants on the shared data of a comparison."""

    def __init__(self, comparison: CompareConfig, inputs: Inputs, steps: int) -> None:
        self.comparison, self.inputs, self.steps = comparison, inputs, steps
        self.data = prepare_data(inputs)
        self.footprint = footprint(read_config(str(inputs.base.path)))
        self.bridges: dict[tuple[int, ...], Bridge] = {}

    def measure(self, config: RunConfig, layers: tuple[int, ...], phase: Phase, scratch: Path) -> dict[str, Any]:
        """Train one phase for a few updates: tokens per second, FLOPs per token, rows and peak memory."""
        settings = config.settings(phase).model_copy(update={"save_steps": 10**6, "evaluations": 0})
        sequences = divide_budget(config, self.data, lambda _: None)
        every = sequences.of(phase)
        count = self.steps * settings.tokens_per_step // config.data.sequence_length
        rows: Any = every.mixture.sequences(every.start, every.start + count)
        model, dtype, _ = load_trainable(self.inputs.base.path, settings)
        if phase.detached:
            model = detach_layers(model, list(layers))
        bridge = self._bridge(config, layers) if phase.middle == "bridged" else None
        prepared = config.method.prepare(model, phase, Setup(layers, bridge, config.seed))
        if keeps_frozen_as_stored(settings):
            freeze_in(model, {id(each): dtype for each in model.parameters()})
        counted = self.footprint
        if settings.vocabulary == "corpus":
            file = scratch / "rows.json"
            sample = settings.vocabulary_sample
            chosen = choose_rows(self.data, self.inputs.base.path, sample=sample, seed=config.seed)
            file.write_text(json.dumps(chosen.tolist()))
            cut = VocabularyCut(model, file)
            rows = CutSequences(rows, cut)
            counted = counted.with_vocabulary(len(cut.ids))
        starts: list[float] = []
        model.register_forward_pre_hook(lambda *_: starts.append(now()))
        result = train(model, rows, settings=settings, output_dir=None, seed=config.seed, prepared=prepared)
        counted_updates = self.steps - 1
        begin = starts[-counted_updates * micro_steps_per_step(config.data.sequence_length, settings)]
        rate = counted_updates * settings.tokens_per_step / (now() - begin)
        flops = config.method.flops_per_token(phase, counted, layers, config.data.sequence_length)
        return {
            "tokens_per_second": rate,
            "flops_per_token": flops.total,
            "vocabulary_rows": counted.vocab_size,
            "peak_memory_bytes": result.peak_memory_bytes,
        }

    def plan(self, config: RunConfig, vocabulary_rows: int) -> dict[str, dict[str, float]]:
        """Tokens per CPU second and peak memory of each phase by `elo plan --measure`."""
        cut = any(config.settings(phase).vocabulary == "corpus" for phase in config.method.phases)
        with nullcontext() if torch.cuda.is_available() else patch("time.perf_counter", time.process_time):
            planned = plan(
                config, measure=True, compare_with=(), vocabulary_rows=vocabulary_rows if cut else None
            ).run.phases
        return {
            phase.name: {
                "planned_tokens_per_second": phase.tokens_per_second,
                "planned_peak_bytes": phase.memory.peak_bytes,
            }
            for phase in planned
        }

    def _bridge(self, config: RunConfig, layers: tuple[int, ...]) -> Bridge:
        if layers not in self.bridges:
            model = load_model(str(self.inputs.base.path))
            rows = divide_budget(config, self.data, lambda _: None).first(8192)
            self.bridges[layers] = fit_bridge(model, layers, (rows[index] for index in range(len(rows))))
        return self.bridges[layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--tokens", type=int, default=10**6, help="length of a run, for its vocabulary rows")
    parser.add_argument("--steps", type=int, default=6, help="number of updates per phase and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="plan every contestant too, with elo plan --measure")
    parser.add_argument("--only", nargs="+", help="contestants to train")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    comparison = load_comparison(arguments.comparison)
    scratch = Path(tempfile.mkdtemp())
    configs = {
        name: contestant_config(comparison, name, arguments.tokens, scratch)
        for name in arguments.only or comparison.contestants
    }
    first = contestant_run(
        comparison, next(iter(configs)), Path(comparison.output), learning_rates={}, tokens=10**6, seed=1
    )
    best: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in configs}
    with open_run(first) as inputs:
        speeds = Speeds(comparison, inputs, arguments.steps)
        layers = {name: check_model(config, inputs.base.path) for name, config in configs.items()}
        for number in range(arguments.rounds):
            for name, config in configs.items():
                for phase in config.method.phases:
                    found = speeds.measure(config, layers[name], phase, scratch)
                    known = best[name].get(phase.name)
                    if known is None or found["tokens_per_second"] > known["tokens_per_second"]:
                        best[name][phase.name] = found
                    rate = found["tokens_per_second"]
                    print(f"round {number + 1}: {name} {phase.name}: {rate:.1f} tokens per second", flush=True)
                planned = speeds.plan(config, found["vocabulary_rows"]) if arguments.plan else {}
                for phase_name, values in planned.items():
                    known = best[name][phase_name]
                    known |= {key: max(value, known.get(key, 0.0)) for key, value in values.items()}
    contestants = {}
    for name, phases in best.items():
        method = configs[name].method
        parts = [(method.share_of(phase), phases[phase.name]) for phase in method.phases]
        contestants[name] = {
            "phases": phases,
            "tokens_per_second": 1 / sum(share / each["tokens_per_second"] for share, each in parts),
            "flops_per_token": sum(share * each["flops_per_token"] for share, each in parts),
        }
    reference = contestants.get("full")
    for each in contestants.values():
        if reference is not None:
            each["speed_up_of_full"] = each["tokens_per_second"] / reference["tokens_per_second"]
            each["flops_bound"] = reference["flops_per_token"] / each["flops_per_token"]
    record = {
        "hardware": hardware(),
        "versions": versions(),
        "clock": "wall" if torch.cuda.is_available() else "CPU",
        "steps": arguments.steps,
        "contestants": contestants,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    for name, each in contestants.items():
        bound = f", {each['speed_up_of_full']:.2f}x full (FLOPs: {each['flops_bound']:.2f}x)" if reference else ""
        print(f"{name}: {each['tokens_per_second']:.1f} tokens per second{bound}")
        for phase_name, measured in each["phases"].items() if arguments.plan else ():
            speed = measured["planned_tokens_per_second"] / measured["tokens_per_second"]
            memory = measured["planned_peak_bytes"] / measured["peak_memory_bytes"]
            print(f"  {phase_name}: planned / measured: tokens per second {speed:.2f}, peak memory {memory:.2f}")


if __name__ == "__main__":
    main()
