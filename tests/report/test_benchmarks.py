"""Benchmarks are compared item by item, and retention calls kept only what the data show to be kept."""

import math

import numpy as np
import pytest
from report_fixtures import duel

from elo.report.files import read_results
from elo.report.page import markdown_page
from elo.report.retention import _outcome
from elo.report.statistics import estimate_items, mcnemar
from elo.report.verdict import judge


def benchmark(items, language="en", name="mill acc"):
    return {"measure": name, "language": language, "value": float(np.mean(items)), "per_item": list(map(float, items))}


def answered(share, seed, items=400):
    return (np.random.default_rng(seed).random(items) < share).astype(float)


def compared(base, **contestants):
    """Results with one trial for every list of values of items."""
    results = duel(**{name: [2.0] * len(seeds) for name, seeds in contestants.items()})
    results["base"]["measures"] = base
    for trial in results["trials"]:
        trial["measured"]["measures"] = contestants[trial["contestant"]][trial["seed"] - 1]
    return read_results(results)


def test_mcnemar_counts_items_that_one_model_alone_has_right():
    ours, theirs = np.array([1.0] * 9 + [0.0] * 1 + [1.0] * 50), np.array([0.0] * 9 + [1.0] * 1 + [1.0] * 50)
    by_hand = 2 * (math.comb(10, 0) + math.comb(10, 1)) / 2**10
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours) == pytest.approx(by_hand)
    assert mcnemar(ours, ours) == 1.0
    assert mcnemar(np.ones(3000), np.r_[np.ones(1200), np.zeros(1800)]) < 1e-300, "no overflow"
    assert mcnemar(np.r_[np.ones(700), np.zeros(700)], np.r_[np.zeros(700), np.ones(700)]) == 1.0


def test_intervals_of_items_cover_the_truth_19_times_in_20():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        differences = generator.normal(0, 1, (3, 60)) + generator.normal(0, 1, 60) + generator.normal(0, 0.05, (3, 1))
        found = estimate_items(differences)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 300 <= 0.995


def test_contestants_are_compared_item_by_item():
    base = answered(0.5, 0)
    better = np.where(answered(0.2, 1) == 1, 1.0, base)
    margin = {"measure": "mill margin", "language": "en", "unit": "number", "is_detail": True}
    values = [[benchmark(base), {**margin, "value": 0.0, "per_item": [0.0, 0.1] * 200}]]
    improved = [[benchmark(better), {**margin, "value": 0.2, "per_item": [0.2, 0.3] * 200}]]
    results = compared(values[0], full=values, lora=improved)
    accuracy, nats = judge(results).budgets[0].measure_differences
    assert (accuracy.contestant, accuracy.reference, accuracy.test, accuracy.items) == ("lora", "full", "McNemar", 400)
    assert accuracy.value == pytest.approx(better.mean() - base.mean())
    assert accuracy.low < accuracy.value < accuracy.high
    assert accuracy.p_value == mcnemar(better, base) < accuracy.adjusted_p_value < 0.001
    assert not accuracy.is_supported, "one seed, however small the p-value"
    assert (nats.test, nats.unit) == ("t", "number")
    assert nats.value == pytest.approx(0.2)
    page = markdown_page(results, [])
    assert "**" not in page.split("## Benchmarks compared")[1].split("\n## ")[0]
    assert "mill acc en" in page
    results_section = page.split("## Results")[1].split("##")[0]
    assert "mill acc" in results_section
    assert "mill margin" not in results_section, "margins are details"
    assert "mill margin en" in page.split("## Benchmarks in detail")[1]


def test_two_seeds_support_a_difference_in_a_benchmark():
    base = answered(0.5, 0)
    better = [np.where(answered(0.2, seed) == 1, 1.0, base) for seed in (1, 2)]
    values = [benchmark(base)]
    results = compared(values, full=[values, values], lora=[[benchmark(each)] for each in better])
    (found,) = judge(results).budgets[0].measure_differences
    assert (found.seeds, found.test, found.is_supported) == (2, "t", True)
    section = markdown_page(results, []).split("## Benchmarks compared")[1].split("\n## ")[0]
    assert section.count("**") == 2
    assert "Bold: significant at 5 %" in section


def test_seeds_widen_the_interval():
    base = [benchmark(answered(0.5, 0))]
    seeds = [[benchmark(answered(share, 1))] for share in (0.45, 0.55, 0.65)]
    results = compared(base, lora=seeds)
    (found,) = judge(results).budgets[0].measure_differences
    assert (found.seeds, found.test) == (3, "t")
    one = compared(base, lora=[seeds[1]])
    (alone,) = judge(one).budgets[0].measure_differences
    assert found.high - found.low > 2 * (alone.high - alone.low)


def test_items_that_differ_are_not_paired():
    results = compared([benchmark(answered(0.5, 0))], lora=[[benchmark(answered(0.5, 0, items=300))]])
    assert judge(results).budgets[0].measure_differences == ()


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.03, "improved"), (-0.02, 0.01, "kept"), (-0.01, -0.001, "kept"), (-0.05, -0.01, "lost"),
     (-0.05, 0.01, "undecided")],
)  # fmt: skip
def test_outcomes(low, high, outcome):
    assert _outcome(low, high, 0.02) == outcome


def test_retention_says_what_was_kept():
    base = answered(0.5, 0, items=2000)
    worse = np.where(answered(0.2, 1, items=2000) == 1, 0.0, base)
    measures = [benchmark(base), benchmark(base, "", "in_context"), benchmark(base, "ko", "river acc")]
    after = [benchmark(worse), benchmark(base, "", "in_context"), benchmark(worse, "ko", "river acc")]
    results = compared(measures, full=[measures], lora=[after])
    verdict = judge(results).budgets[0]
    lora = next(each for each in verdict.retention if each.contestant == "lora")
    outcomes = {(part.measure, part.language): part.outcome for part in lora.parts}
    assert outcomes == {("bits per byte", "en"): "kept", ("mill acc", "en"): "lost", ("in_context", ""): "kept"}
    assert verdict.retention_sentences == (
        "full, retention over one seed: nothing was lost. Kept: bits per byte en, mill acc en and in context.",
        "lora, retention over one seed: something was lost. Lost: mill acc en; kept: bits per byte en and in context.",
    )
    page = markdown_page(results, [])
    section = page.split("## Retention")[1].split("\n## ")[0]
    assert "lora, retention over one seed: something was lost." in section
    assert "mill acc en" in section
    assert "2 points" in section


def test_bits_per_byte_above_the_limit_are_lost():
    results = duel(full=[2.0, 2.0, 2.0], lora=[2.0, 2.0, 2.0])
    for trial in results["trials"]:
        if trial["contestant"] == "lora":
            nats = trial["measured"]["document_nats"]["en"]
            sizes = trial["measured"]["document_bytes"]["en"]
            trial["measured"]["document_nats"]["en"] = [
                nat + 0.05 * math.log(2) * size for nat, size in zip(nats, sizes, strict=True)
            ]
            trial["measured"]["bpb"]["en"] += 0.05
    verdict = judge(read_results(results)).budgets[0]
    assert verdict.retention_sentences[1] == "lora, retention: something was lost. Lost: bits per byte en."
    full, lora = verdict.retention
    assert (full.parts[0].outcome, lora.parts[0].outcome) == ("kept", "lost")
    assert lora.parts[0].change == pytest.approx(0.05, abs=0.01)


def test_benchmarks_of_chat_models_are_beside_their_chat_ability():
    nats = {"measure": "chat_nats", "language": "ko", "value": 1.0, "unit": "number", "higher_is_better": False}
    values = [benchmark(answered(0.5, 0)) | {"chance": 0.25}, nats]
    values.append({"measure": "mill margin", "language": "en", "unit": "number", "is_detail": True, "value": 0.1})
    results = duel(full=[2.0])
    results["base"]["measures"] = values
    results["chat"] = [{"name": "sft", "measured": {**results["base"], "measures": values}}]
    table = markdown_page(read_results(results), []).split("## Chat models")[1].split("\n## ")[0]
    heads = table.split("| ---")[0]
    assert heads.index("chat nats ko (↓)") < heads.index("mill acc en (↑, chance 25%)")
    assert "margin" not in heads
    assert "| SFT |" in table
