"""Made-up results of a run, for tests of the report: shaped like real ones, measured on nothing."""

import math
from html.parser import HTMLParser
from typing import Any

TITLE = "TEST DATA: made-up numbers"
TOKENS, STEPS = 2_000_000, 120
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


def example_results(**changes: Any) -> dict[str, Any]:
    """Results of ELO and four controls, in which ELO is quick and full CPT ends lower; `changes` replace top keys."""
    results: dict[str, Any] = {
        "schema": 1,
        "title": TITLE,
        "created": "2000-01-01T00:00:00+00:00",
        "command": "elo run test.yaml --set seed=7",
        "model": {
            "name": "test/base-24m",
            "parameters": 24_117_248,
            "num_layers": 12,
            "layers": [0, 11],
            "trainable_parameters": 2_621_440,
        },
        "languages": {"target": "ko", "source": "en"},
        "seed": 7,
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8 * 2**30},
        "versions": {"python": "3.11.0", "elo-cpt": "0.0.test", "torch": "2.13.0"},
        "data": {
            "train": {
                "ko": {"tokens": 9_000_000, "bytes": 41_000_000, "documents": 20_000},
                "en": {"tokens": 4_000_000, "bytes": 17_000_000, "documents": 9_000},
            },
            "heldout": {
                "ko": {"tokens": 90_000, "bytes": 410_000, "documents": 200},
                "en": {"tokens": 80_000, "bytes": 350_000, "documents": 190},
            },
            "replay_ratio": 0.1,
            "sequence_length": 512,
        },
        "config": {"model": "test/base-24m", "tokens": TOKENS, "data": {"target": "ko", "title": "한국어 <i>"}},
        "base": {
            "bpb": {"ko": 2.412, "en": 1.318},
            "cloze": {
                "ko": {"accuracy": 0.27, "items": 300, "chance": 0.25},
                "en": {"accuracy": 0.71, "items": 300, "chance": 0.25},
            },
            "samples": _samples(0),
        },
        "methods": [
            _elo(),
            _whole("full", "Full CPT", 1.0, 412.0, {"ko": 1.683, "en": 1.402}, (0.52, 0.64), gib=1.31),
            _whole(
                "full_at_wall_time",
                "Full CPT, equal wall time",
                0.27,
                112.0,
                {"ko": 1.902, "en": 1.371},
                (0.38, 0.66),
                1.31,
            ),
            _whole("align_only", "Alignment alone", 0.1, 41.5, {"ko": 2.071, "en": 1.349}, (0.33, 0.68), gib=1.31),
            _whole(
                "frozen",
                "First and last, middle frozen",
                1.0,
                262.0,
                {"ko": 1.861, "en": 1.345},
                (0.41, 0.69),
                gib=0.84,
            ),
        ],
    }
    return {**results, **changes}


def grouped_results() -> dict[str, Any]:
    """The example with cloze items in three groups of 100, told in one language, in the other, or in both."""
    results = example_results()
    for measured in (results["base"], *results["methods"]):
        for language, cloze in measured["cloze"].items():
            told = {"told_in_ko": 0.08, "told_in_en": -0.08} if language == "ko" else {"told_in_ko": -0.3}
            spread = {"told_in_ko": 0.0, "told_in_en": 0.0, "told_in_both": 0.0, **told}
            cloze["groups"] = {
                name: {"accuracy": round(cloze["accuracy"] + difference, 3), "items": 100}
                for name, difference in spread.items()
            }
    return results


def _elo() -> dict[str, Any]:
    pretraining, alignment = int(0.9 * TOKENS), TOKENS // 10
    seconds, align_seconds = 68.0, 43.2
    return {
        "name": "elo",
        "label": "ELO",
        "note": None,
        "tokens": TOKENS,
        "wall_seconds": seconds + align_seconds + 1.2,
        "peak_memory_bytes": int(1.31 * 2**30),
        "stages": [
            {"name": "detach", "seconds": 0.6, "tokens": 0, "tokens_per_second": None, "peak_memory_bytes": 2**27},
            _stage("elo_pretraining", seconds, pretraining, 0.42),
            {"name": "attach", "seconds": 0.6, "tokens": 0, "tokens_per_second": None, "peak_memory_bytes": 2**27},
            _stage("layer_alignment", align_seconds, alignment, 1.31),
        ],
        "bpb": {"ko": 1.824, "en": 1.341},
        "cloze": _cloze(0.44, 0.69),
        "samples": _samples(1),
        "before_alignment": {"bpb": {"ko": 2.306, "en": 1.702}},
        "losses": _losses("elo_pretraining", 0, pretraining, 0.6, seconds, 6.1, 3.9)
        + _losses("layer_alignment", pretraining, alignment, seconds + 1.2, align_seconds, 4.1, 3.1),
        "evaluations": _evaluations(
            "elo_pretraining", 0, pretraining, 0.6, seconds, {"ko": (3.4, 2.53), "en": (2.9, 2.21)}
        )
        + _evaluations(
            "layer_alignment",
            pretraining,
            alignment,
            seconds + 1.2,
            align_seconds,
            {"ko": (2.306, 1.824), "en": (1.702, 1.341)},
        ),
    }


def _whole(
    name: str,
    label: str,
    share: float,
    seconds: float,
    bpb: dict[str, float],
    accuracy: tuple[float, float],
    gib: float,
) -> dict[str, Any]:
    tokens = int(share * TOKENS)
    start = {"ko": 2.412, "en": 1.318}
    return {
        "name": name,
        "label": label,
        "note": "Stopped when it had used ELO's wall time." if name == "full_at_wall_time" else None,
        "tokens": tokens,
        "wall_seconds": seconds,
        "peak_memory_bytes": int(gib * 2**30),
        "stages": [_stage("layer_alignment" if name == "align_only" else name, seconds, tokens, gib)],
        "bpb": bpb,
        "cloze": _cloze(*accuracy),
        "samples": _samples(1),
        "before_alignment": None,
        "losses": _losses(name, 0, tokens, 0.0, seconds, 5.4, 2.6 + 0.8 * (1 - share)),
        "evaluations": _evaluations(
            name, 0, tokens, 0.0, seconds, {language: (start[language], bpb[language]) for language in bpb}
        ),
    }


def _stage(name: str, seconds: float, tokens: int, gib: float) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": int(gib * 2**30),
    }


def _cloze(target: float, source: float) -> dict[str, Any]:
    return {
        language: {"accuracy": accuracy, "items": 300, "chance": 0.25}
        for language, accuracy in (("ko", target), ("en", source))
    }


def _samples(which: int) -> list[dict[str, str]]:
    return [
        {"language": language, "prompt": prompt, "text": texts[which]} for language, (prompt, texts) in SAMPLES.items()
    ]


def _decay(share: float) -> float:
    """1 at the start, 0 at the end, falling as training curves do."""
    return (math.exp(-4 * share) - math.exp(-4)) / (1 - math.exp(-4))


def _losses(
    stage: str, tokens: int, more_tokens: int, seconds: float, more_seconds: float, first: float, last: float
) -> list[dict[str, Any]]:
    steps = max(8, int(STEPS * more_tokens / TOKENS))
    return [
        {
            "stage": stage,
            "tokens": tokens + more_tokens * step // steps,
            "seconds": seconds + more_seconds * step / steps,
            "loss": last
            + (first - last) * _decay(step / steps)
            + 0.12 * math.sin(12.9898 * step) * math.sin(78.2 * step),
        }
        for step in range(1, steps + 1)
    ]


def _evaluations(
    stage: str,
    tokens: int,
    more_tokens: int,
    seconds: float,
    more_seconds: float,
    ends: dict[str, tuple[float, float]],
    parts: int = 6,
) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "tokens": tokens + more_tokens * part // parts,
            "seconds": seconds + more_seconds * part / parts,
            "bpb": {language: last + (first - last) * _decay(part / parts) for language, (first, last) in ends.items()},
        }
        for part in range(1, parts + 1)
    ]
