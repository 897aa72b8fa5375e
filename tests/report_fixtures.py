"""Made-up results, for tests of the report: shaped like real ones, measured on nothing."""

import math
from html.parser import HTMLParser
from typing import Any

import numpy as np

TITLE = "TEST DATA: made-up numbers"
TOKENS, STEPS = 2_000_000, 120
BASE = {"ko": 2.412, "en": 1.318}
DOCUMENTS = {"ko": 60, "en": 50}
SAMPLES = {
    "ko": (
        "강 건너 마을에는",
        [" the the the of and", " 오래된 우물이 하나 있고, 아이들은 <b>저녁</b>마다 물을 길으러 간다."],
    ),
    "en": (
        "The ferryman asked for",
        [" bread, salt & water, and nothing else.", " bread and a little salt; no | more."],
    ),
}
# name, label, changes, tokens/s, FLOPs per token, GiB, learning rate, ko and en at the first budget, at the second
CONTESTANTS: tuple[tuple[Any, ...], ...] = (
    ("elo", "ELO", {"layers": "first:2,last:2"}, 21_000, 0.5e8, 0.62, 1e-3, (2.061, 1.326), (1.872, 1.333)),
    ("full", "Full CPT", {}, 7_100, 1.4e8, 1.31, 5e-4, (1.996, 1.342), (1.846, 1.331)),
    ("lora", "LoRA, rank 16", {"lora": {"rank": 16}}, 8_000, 1.1e8, 0.71, 2e-3, (1.958, 1.329), (1.798, 1.324)),
    ("lisa", "LISA", {}, 10_400, 1.0e8, 0.84, 1e-3, (1.972, 1.371), (1.790, 1.374)),
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page strictly enough to notice markup that was not escaped."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.headings = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


def example_run(**changes: Any) -> dict[str, Any]:
    """A run of ELO with detached pretraining; `changes` replace top keys."""
    trial = _trial("elo", "2 M tokens", 7, {"ko": 1.824, "en": 1.331}, TOKENS, 21_000, 0.5e8, 1.31, 1e-3)
    trial["measured"] |= {"measures": _cloze(0.44, 0.69), "samples": _samples(1), "generation": _generation(80.0)}
    return {
        **_setting("run", [7]),
        "command": "elo run test.yaml --set seed=7",
        "contestants": [{"name": "elo", "label": "ELO", "method": "elo", "layers": [0, 1, 10, 11]}],
        "budgets": [{"name": "2 M tokens", "kind": "tokens", "value": TOKENS}],
        "trials": [trial],
        **changes,
    }


def example_comparison(seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> dict[str, Any]:
    """Four contestants at two budgets; LISA is lowest in ko but off in en, LoRA is the winner among the others."""
    budgets = [
        {"name": "500,000 tokens", "kind": "tokens", "value": 500_000},
        {"name": "300 s of CPU time", "kind": "cpu_seconds", "value": 300.0},
    ]
    trials = []
    for name, _, _, speed, work, gib, rate, *ends in CONTESTANTS:
        for index, budget in enumerate(budgets):
            end = {"ko": ends[index][0], "en": ends[index][1]}
            tokens = 500_000 if index == 0 else int(300 / 1.9 * speed)
            for step in (-2, -1, 1, 2):
                off = {language: value + 0.012 * step**2 for language, value in end.items()}
                trial = _trial(name, budget["name"], seeds[0], off, tokens, speed, work, gib, rate * 2**step)
                trial |= {"tuning": True, "losses": [], "evaluations": []}
                if name == "full" and step == 1:
                    trial["source_excess_bpb"] = 0.013
                if name == "full" and step == 2:
                    trial |= {
                        "failed": "training diverged at step 40",
                        "validation": None,
                        "measured": {},
                        "stages": [],
                    }
                trials.append(trial)
            for seed in seeds:
                luck = 0.004 * math.sin(7.1 * seed + len(name) + 3 * index)
                drawn = {language: value + luck for language, value in end.items()}
                trial = _trial(name, budget["name"], seed, drawn, tokens, speed, work, gib, rate)
                trials.append(trial if seed == seeds[0] else {**trial, "validation": None})
    return {
        **_setting("comparison", list(seeds)),
        "command": "elo compare test.yaml",
        "base_validation": measured(BASE),
        "contestants": [
            {"name": name, "label": label, "method": name, "changes": changed}
            for name, label, changed, *_ in CONTESTANTS
        ],
        "budgets": budgets,
        "trials": trials,
        **changes,
    }


def duel(documents: int = 60, noise: float = 0.02, **targets: list[float | None]) -> dict[str, Any]:
    """A comparison of the named contestants with these target bits per byte by seed; None is a failed seed."""
    seeds = tuple(range(1, max(map(len, targets.values())) + 1))
    results = example_comparison(seeds)
    budget = {"name": "60 s", "kind": "seconds", "value": 60.0}
    trials: list[dict[str, Any]] = []
    for name, values in targets.items():
        for seed, value in enumerate(values, 1):
            trial: dict[str, Any] = {"contestant": name, "budget": "60 s", "seed": seed}
            trial["stages"] = [{"name": name, "seconds": 60.0, "tokens": 1000}]
            if value is None:
                trial["failed"] = "training diverged at step 7"
            else:
                bpb = {"ko": value, "en": BASE["en"]}
                trial["measured"] = measured(bpb, noise, 100 * len(trials), documents)
            trials.append(trial)
    contestants = [{"name": name, "method": name} for name in targets]
    base = measured(BASE, documents=documents)
    return {**results, "base": base, "contestants": contestants, "budgets": [budget], "trials": trials}


def measured(bpb: dict[str, float], noise: float = 0.01, seed: int = 0, documents: int | None = None) -> dict[str, Any]:
    """Documents of odd sizes whose bits per byte scatter by `noise` around exactly `bpb`."""
    nats, sizes = {}, {}
    for language, value in bpb.items():
        number = documents or DOCUMENTS[language]
        size = np.random.default_rng(number).integers(200, 4000, number)
        each = np.random.default_rng([seed, number]).normal(0, noise, number)
        each -= (each * size).sum() / size.sum()
        nats[language] = [round(float(nat), 4) for nat in (value + each) * math.log(2) * size]
        sizes[language] = [int(one) for one in size]
    heldout = {
        language: {"documents": len(size), "tokens": sum(size) // 4, "bytes": sum(size)}
        for language, size in sizes.items()
    }
    return {"bpb": dict(bpb), "heldout": heldout, "document_nats": nats, "document_bytes": sizes}


def _setting(kind: str, seeds: list[int]) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "kind": kind,
        "title": TITLE,
        "created": "2000-01-01T00:00:00+00:00",
        "model": {"name": "test/base-24m", "parameters": 24_117_248, "num_layers": 12},
        "languages": {"targets": ["ko"], "sources": ["en"]},
        "seeds": seeds,
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8 * 2**30},
        "versions": {"python": "3.11.0", "elo-cpt": "0.0.test", "torch": "2.13.0"},
        "data": {
            "train": {
                "ko": {"tokens": 9_000_000, "bytes": 41_000_000, "documents": 20_000},
                "en": {"tokens": 4_000_000, "bytes": 17_000_000, "documents": 9_000},
            },
            "replay_ratio": 0.1,
            "sequence_length": 512,
        },
        "config": {"model": "test/base-24m", "tokens": TOKENS, "data": {"target": "ko", "title": "한국어 <i>"}},
        "base": {
            **measured(BASE),
            "measures": _cloze(0.27, 0.71),
            "samples": _samples(0),
            "generation": _generation(40.0),
        },
    }


def _trial(
    name: str, budget: str, seed: int, bpb: dict[str, float], tokens: int, speed: float, work: float, gib: float,
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    own = name == "elo"
    parts = (("elo_pretraining", 0.6), ("layer_alignment", 0.4)) if own else ((name, 1.0),)
    seconds = tokens / speed
    stages, losses, evaluations = [], [], []
    at_tokens, at = 0, 0.0
    if own:
        stages.append({"name": "detach", "seconds": 0.02 * seconds, "cpu_seconds": 0.03 * seconds})
        at += 0.02 * seconds
    for stage, share in parts:
        detached = stage == "elo_pretraining"
        stages.append({
            "name": stage,
            "seconds": share * seconds,
            "cpu_seconds": 1.9 * share * seconds,
            "tokens": int(share * tokens),
            "tokens_per_second": speed,
            "peak_memory_bytes": int(gib * 2**30),
            "flops": work * share * tokens,
            "detached": detached,
        })  # fmt: skip
        steps = max(8, int(STEPS * share))
        first, last = (6.1, 3.9) if detached else (4.6, 3.1)
        for step in range(1, steps + 1):
            place = step / steps
            wave = 0.12 * math.sin(12.9898 * step) * math.sin(78.2 * step)
            point = {
                "stage": stage,
                "tokens": at_tokens + int(place * share * tokens),
                "seconds": at + place * share * seconds,
            }
            losses.append({**point, "loss": last + (first - last) * _decay(place) + wave})
            if step % (steps // 6) == 0:
                start = {"ko": 3.4, "en": 2.9} if detached else {"ko": 2.2, "en": 1.45} if own else BASE
                end = {"ko": 2.53, "en": 2.21} if detached else bpb
                curve = {each: end[each] + (start[each] - end[each]) * _decay(place) for each in bpb}
                evaluations.append({**point, "bpb": curve})
        at_tokens, at = at_tokens + int(share * tokens), at + share * seconds
        if detached:
            stages.append({"name": "attach", "seconds": 0.01 * seconds, "cpu_seconds": 0.02 * seconds})
            at += 0.01 * seconds
    rates = {"elo_pretraining": rate, "layer_alignment": rate / 2} if own else {name: rate}
    return {
        "contestant": name,
        "budget": budget,
        "seed": seed,
        "learning_rates": rates,
        "measured": measured(bpb, 0.03, seed * 1000 + sum(map(ord, name))),
        "before_alignment": measured({"ko": 2.25, "en": 1.48}) if own else None,
        "validation": measured({each: value + 0.01 for each, value in bpb.items()}),
        "attach_scale": 0.75 if own else None,
        "stages": stages,
        "losses": losses,
        "evaluations": evaluations,
    }


def _cloze(target: float, source: float) -> list[dict[str, Any]]:
    found = []
    for language, accuracy in (("ko", target), ("en", source)):
        for name, shift, items in (("all", 0.0, 300), ("told_in_ko", 0.05, 150), ("told_in_en", -0.05, 150)):
            value = accuracy + shift
            error = math.sqrt(value * (1 - value) / items)
            found.append({"measure": "cloze", "name": name, "language": language, "value": value, "items": items,
                          "standard_error": error, "chance": 0.25})  # fmt: skip
    return found


def _samples(which: int) -> list[dict[str, str]]:
    return [
        {"language": language, "prompt": prompt, "text": texts[which]} for language, (prompt, texts) in SAMPLES.items()
    ]


def _generation(rate: float) -> dict[str, dict[str, float]]:
    return {language: {"characters": 200, "seconds": 200 / rate} for language in BASE}


def _decay(share: float) -> float:
    """1 at the start, 0 at the end, falling as training curves do."""
    return (math.exp(-4 * share) - math.exp(-4)) / (1 - math.exp(-4))
