"""A made-up comparison, for tests of its report: shaped like a real one, measured on nothing."""

import copy
import math
from typing import Any

from report_fixtures import TITLE, example_results

SEEDS = (1, 2, 3)
BASE = {"ko": 2.412, "en": 1.318}
BUDGETS = [
    {"name": "500,000 tokens", "kind": "tokens", "value": 500_000},
    {"name": "60 s", "kind": "seconds", "value": 60.0},
]
# name, label, changes, tokens/s, FLOPs/token, GiB, learning rate, (target, source) at each budget, its stages
_CONTESTANTS: tuple[tuple[Any, ...], ...] = (
    ("elo", "ELO", {"layers": "first:2,last:2"}, 21_000, 0.5e8, 0.62, 1e-3, ((2.061, 1.352), (1.931, 1.361))),
    ("elo_wide", "ELO, six layers", {"layers": "first:3,last:3"}, 14_500, 0.7e8, 0.78, 1e-3,
     ((2.012, 1.358), (1.934, 1.366))),
    ("full", "Full CPT", {}, 7_100, 1.4e8, 1.31, 5e-4, ((1.846, 1.421), (1.872, 1.409))),
    ("lora", "LoRA, rank 16", {"lora": {"rank": 16, "targets": "all-linear"}}, 8_000, 1.1e8, 0.71, 2e-3,
     ((1.958, 1.349), (1.969, 1.344))),
    ("frozen", "Middle frozen", {"layers": "first:2,last:2"}, 10_400, 1.0e8, 0.84, 1e-3,
     ((1.972, 1.371), (1.951, 1.374))),
    ("align_only", "Alignment alone", {"tokens.pretraining": 0}, 7_100, 1.4e8, 1.31, 5e-4,
     ((2.003, 1.384), (2.021, 1.380))),
)  # fmt: skip


def example_comparison(seeds: tuple[int, ...] = SEEDS, **changes: Any) -> dict[str, Any]:
    """Six contestants at two budgets: full CPT wins the target language at both, LoRA keeps the source best at one."""
    run = example_results()
    comparison: dict[str, Any] = {
        "schema": 1,
        "kind": "comparison",
        "title": TITLE,
        "created": "2000-01-01T00:00:00+00:00",
        "command": "elo compare test.yaml",
        **{key: copy.deepcopy(run[key]) for key in ("model", "languages", "hardware", "versions", "data", "config")},
        "seeds": list(seeds),
        "base": {"bpb": dict(BASE)},
        "budgets": copy.deepcopy(BUDGETS),
        "contestants": [
            {"name": name, "label": label, "method": name.partition("_wide")[0], "changes": copy.deepcopy(changed)}
            for name, label, changed, *_ in _CONTESTANTS
        ],
        "entries": [_entry(*contestant, budget, seeds) for contestant in _CONTESTANTS for budget in range(2)],
        "sweeps": [_sweep(contestant[0], contestant[6], budget) for contestant in _CONTESTANTS for budget in range(2)],
    }
    return {**comparison, **changes}


def entry_of(comparison: dict[str, Any], contestant: str, budget: int) -> dict[str, Any]:
    """The entry itself, to be changed."""
    return next(e for e in comparison["entries"] if (e["contestant"], e["budget"]) == (contestant, budget))


def duel(**target: list[float | None]) -> dict[str, Any]:
    """A comparison of the named contestants at one budget with these target bits per byte; None is a failed seed.

    The source language ends at 1.4 plus a tenth of the target's, unless changed.
    """
    most = max(len(values) for values in target.values())
    comparison = example_comparison(seeds=tuple(range(1, most + 1)), budgets=BUDGETS[1:], sweeps=[])
    comparison["contestants"] = [{"name": name, "label": None, "method": name} for name in target]
    comparison["entries"] = [
        {
            "contestant": name,
            "budget": 0,
            "learning_rates": {"full": 1e-3},
            "trials": [
                {"seed": seed, "tokens": 1, "wall_seconds": 60.0, "bpb": {}, "failed": "training diverged at step 7"}
                if value is None
                else {"seed": seed, "tokens": 1, "wall_seconds": 60.0, "bpb": {"ko": value, "en": 1.2 + 0.1 * value}}
                for seed, value in enumerate(values, 1)
            ],
        }
        for name, values in target.items()
    ]
    return comparison


def _entry(
    name: str, label: str, changed: dict[str, Any], speed: float, work: float, gib: float, rate: float,
    ends: tuple[tuple[float, float], ...], budget: int, seeds: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    return {
        "contestant": name,
        "budget": budget,
        "learning_rates": _rates(name, rate),
        "trials": [_trial(name, speed, work, gib, ends[budget], budget, seed) for seed in seeds],
    }


def _trial(
    name: str, speed: float, work: float, gib: float, end: tuple[float, float], budget: int, seed: int
) -> dict[str, Any]:
    luck = 0.009 * math.sin(7.1 * seed + len(name) + 3 * budget)
    seconds = 500_000 / speed * (1 + luck) if budget == 0 else 60.0 * (1 + luck / 2)
    tokens = 500_000 if budget == 0 else int(speed * seconds)
    own = name.startswith("elo")
    parts = (("elo_pretraining", 0.6), ("layer_alignment", 0.4)) if own else ((name, 1.0),)
    return {
        "seed": seed,
        "bpb": {"ko": round(end[0] + luck, 4), "en": round(end[1] + 0.4 * luck, 4)},
        "before_alignment": {"bpb": {"ko": end[0] + 0.31 + luck, "en": end[1] + 0.24}} if own else None,
        "scale": 0.7 if own else None,
        "tokens": tokens,
        "wall_seconds": seconds,
        "flops": work * tokens,
        "peak_memory_bytes": int(gib * 2**30),
        "stages": [
            {
                "name": stage,
                "seconds": share * seconds,
                "tokens": int(share * tokens),
                "tokens_per_second": speed,
                "peak_memory_bytes": int(gib * 2**30),
            }
            for stage, share in parts
        ],
        "failed": None,
    }


def _rates(name: str, rate: float) -> dict[str, float]:
    return {"elo_pretraining": rate, "layer_alignment": rate / 2} if name.startswith("elo") else {name: rate}


def _sweep(name: str, best: float, budget: int) -> dict[str, Any]:
    """Five rates around the best, of which full CPT's highest diverges; each of ELO's with three for alignment."""
    trials = []
    shift = len(name) / 100
    for step in (-2, -1, 0, 1, 2):
        for half in (0.5, 1, 2) if name.startswith("elo") else (1,):
            failed = name == "full" and step == 2
            score = 1.9 + shift + 0.02 * step**2 + 0.01 * abs(half - 1) + 0.004 * step
            rates = _rates(name, best * 2**step)
            if "layer_alignment" in rates:
                rates["layer_alignment"] = best / 2 * half
            trials.append(
                {
                    "learning_rates": rates,
                    "score": None if failed else score,
                    "bpb": {} if failed else {"ko": score, "en": 1.4},
                    "failed": "training diverged at step 40" if failed else None,
                    "chosen": step == 0 and half == 1,
                }
            )
    return {"contestant": name, "budget": budget, "trials": trials}
