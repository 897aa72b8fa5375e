"""Intervals cover what they claim to, Holm's values are those by hand, and nothing is bold that chance explains."""

import math
import time

import numpy as np
import pytest
from report_fixtures import duel, measured

from elo.report.files import read_results
from elo.report.statistics import bits_per_byte, estimate, holm, resampled_documents
from elo.report.tables import results_table
from elo.report.verdict import judge, warnings


def simulated(generator, seeds, documents, seed_spread, document_spread):
    """Differences of nats [seeds, documents] whose true difference in bits per byte is 0, and the bytes."""
    sizes = generator.lognormal(7, 0.8, documents).round()
    each = generator.normal(0, document_spread, documents) + generator.normal(0, seed_spread, seeds)[:, None]
    each = each + generator.normal(0, document_spread / 2, (seeds, documents))
    return math.log(2) * sizes * each, sizes


@pytest.mark.parametrize(
    ("seeds", "seed_spread", "document_spread"),
    [(3, 0.01, 0.02), (3, 0.0005, 0.05), (5, 0.01, 0.02), (2, 0.01, 0.02), (1, 0.0, 0.05)],
)
def test_intervals_cover_the_truth_19_times_in_20(seeds, seed_spread, document_spread):
    """Whether seeds or documents make most of the error; with three seeds that are merely resampled, 85 % would."""
    generator = np.random.default_rng(seeds)
    covered = rejected = 0
    for _ in range(300):
        nats, sizes = simulated(generator, seeds, 80, seed_spread, document_spread)
        drawn = resampled_documents(nats.mean(axis=0), sizes, 1000)
        found = estimate(bits_per_byte(nats, sizes).tolist(), drawn)
        covered += found.low <= 0 <= found.high
        rejected += found.p_value < 0.05
    assert 0.92 <= covered / 300 <= 0.99
    assert rejected / 300 <= 0.08


def test_a_document_counts_by_its_bytes():
    nats, sizes = np.array([[math.log(2) * 900, 0.0]]), np.array([900.0, 100.0])
    assert bits_per_byte(nats, sizes) == pytest.approx([0.9])
    drawn = resampled_documents(nats[0], sizes)
    assert {round(float(value), 3) for value in drawn} == {0.0, 0.9, 1.0}, "none, both or only the long document"
    assert drawn.mean() == pytest.approx((0.0 + 2 * 0.9 + 1.0) / 4, abs=0.02)


def test_resamples_are_fast_and_the_same_every_time():
    generator = np.random.default_rng(0)
    nats, sizes = generator.normal(size=1000), generator.integers(100, 2000, 1000).astype(float)
    started = time.process_time()
    drawn = resampled_documents(nats, sizes)
    assert time.process_time() - started < 2
    assert drawn.shape == (10_000,)
    assert np.allclose(2 * drawn, resampled_documents(2 * nats, sizes)), "every pair gets the same documents"
    assert drawn.std() == pytest.approx(resampled_documents(nats, sizes, seed=1).std(), rel=0.1)
    assert np.array_equal(drawn, resampled_documents(nats, sizes))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.9, 0.02]) == pytest.approx([1.0, 0.004, 1.0, 0.06])
    assert holm([]) == []


def verdict_of(results):
    return judge(read_results(results)).budgets[0]


def test_a_clear_winner_is_supported_and_named():
    verdict = verdict_of(duel(full=[1.90, 1.91, 1.905], elo=[1.80, 1.81, 1.805], lora=[1.85, 1.86, 1.855]))
    assert (verdict.reference, verdict.ranked, verdict.best_is_supported) == ("full", ("elo", "lora", "full"), True)
    assert [(each.contestant, each.languages) for each in verdict.differences] == [
        ("elo", ("ko",)), ("lora", ("ko",)), ("elo", ("en",)), ("lora", ("en",)),
    ]  # fmt: skip
    elo = verdict.differences[0]
    assert elo.value == pytest.approx(-0.1, abs=1e-5)
    assert elo.low < -0.1 < elo.high < 0
    assert (elo.seeds, elo.documents, elo.is_supported) == (3, 60, True)
    assert not any(each.is_supported for each in verdict.differences if each.languages == ("en",))
    assert verdict.sentences[0] == (
        "ko, with en at most 0.02 above the base model: elo is lowest with 1.805 bits per byte, significantly below "
        "lora and full."
    )


def test_one_seed_supports_no_difference():
    """Documents agree, which says nothing about another seed: a comparison names the lowest and claims no more."""
    values = {"full": [1.90, 1.91], "elo": [1.80, 1.81]}
    results = duel(**{name: seeds[:1] for name, seeds in values.items()})
    one, two = verdict_of(results), verdict_of(duel(**values))
    for verdict, supported in ((one, False), (two, True)):
        for each in (verdict.differences[0], *verdict.best_against):
            assert each.value == pytest.approx(-0.1, abs=1e-5)
            assert each.adjusted_p_value < 0.01
            assert each.is_supported is supported
        assert verdict.best_is_supported is supported
    condition = "ko, with en at most 0.02 above the base model"
    assert one.sentences == (
        f"{condition}: elo is lowest with 1.800 bits per byte.",
        "With one seed, intervals cover the choice of documents alone, so no difference is supported or bold; run at "
        "least two.",
    )
    assert two.sentences == (f"{condition}: elo is lowest with 1.805 bits per byte, significantly below full.",)
    known = read_results(results)
    table = results_table(known, known.budgets[0], one)
    assert not any(cell.bold for row in table.rows for cell in row)
    assert "Bold" not in table.note


def test_seeds_that_two_contestants_share_are_counted_and_not_those_planned():
    """In the midst of a comparison, or where a seed failed."""
    results = duel(full=[1.90, 1.91, 1.92], elo=[1.80, 1.81, 1.82], lora=[1.70, 1.71, 1.72])
    results["trials"] = [each for each in results["trials"] if each["contestant"] != "lora" or each["seed"] == 1]
    verdict = verdict_of(results)
    supported = {each.contestant: each.is_supported for each in verdict.differences if each.languages == ("ko",)}
    assert supported == {"elo": True, "lora": False}
    assert verdict.sentences[0].endswith("lora is lowest with 1.700 bits per byte.")
    assert verdict.sentences[1].startswith("With one seed,")


def test_a_true_null_is_not_bold():
    """Three seeds on the same side of the other's are no evidence, though each by itself looks clear."""
    verdict = verdict_of(duel(full=[1.90, 1.90, 1.90], elo=[1.899, 1.88, 1.85]))
    assert verdict.ranked[0] == "elo"
    assert not verdict.best_is_supported
    assert not any(each.is_supported for each in (*verdict.differences, *verdict.best_against))
    assert "The data do not separate it from full." in verdict.sentences[0]
    same = verdict_of(duel(full=[1.90, 1.91, 1.92], elo=[1.91, 1.92, 1.90], noise=0.05))
    assert not any(each.is_supported for each in same.differences)


def test_more_comparisons_ask_for_more():
    alone = verdict_of(duel(full=[1.90, 1.90, 1.90], a=[1.88, 1.881, 1.883], noise=0.0))
    many = {name: [1.90, 1.905, 1.91] for name in "bcdefgh"}
    crowded = verdict_of(duel(full=[1.90, 1.90, 1.90], a=[1.88, 1.881, 1.883], noise=0.0, **many))
    assert alone.differences[0].value == crowded.differences[0].value
    assert alone.differences[0].adjusted_p_value < crowded.differences[0].adjusted_p_value


def test_a_contestant_that_loses_the_source_is_not_ranked():
    results = duel(full=[1.90, 1.91], elo=[1.70, 1.71], lora=[1.80, 1.81])
    for trial in results["trials"]:
        if trial["contestant"] == "elo":
            trial["measured"] = measured({"ko": 1.70, "en": 1.345}, documents=60)
    verdict = verdict_of(results)
    assert verdict.ranked == ("lora", "full")
    assert verdict.sentences[1] == "Not ranked: elo (en above the limit)."
    found = warnings(read_results(results))
    assert "elo: the source language en is 0.0270 bpb above the base model, limit 0.02." in found
    results["endpoint"] = {"source_limit_bpb": 0.05}
    assert verdict_of(results).ranked[0] == "elo"


def test_an_extended_base_asks_for_a_comparison_with_the_model_before():
    results = duel(full=[1.90, 1.91], lora=[1.80, 1.81])
    before = results["model"]
    results["model"] = {**before, "vocabulary": {"rows": {"start": 100, "stop": 108}}}
    assert any("extended vocabulary" in warning for warning in warnings(read_results(results)))
    results["contestants"][0]["model"] = before
    assert not any("extended vocabulary" in warning for warning in warnings(read_results(results)))


def test_a_failed_seed_is_not_paired_and_cannot_win():
    results = duel(full=[1.90, 1.91, 1.92], elo=[1.70, None, 1.72])
    verdict = verdict_of(results)
    assert verdict.ranked == ("full",)
    assert verdict.sentences[0].endswith("1.910 bits per byte, and no other contestant is ranked.")
    assert verdict.sentences[1] == "Not ranked: elo (a failed seed)."
    assert verdict.differences[0].seeds == 2
    assert verdict.differences[0].value == pytest.approx(-0.2, abs=1e-5)
    assert "elo: seed 2 failed: training diverged at step 7." in warnings(read_results(results))
    assert verdict_of(duel(full=[None], elo=[None])).sentences == ("Every trial failed.",)


def test_one_contestant_is_compared_with_the_base():
    results = duel(elo=[1.80])
    verdict = verdict_of(results)
    assert verdict.reference == "base"
    assert [each.value for each in verdict.differences] == pytest.approx([1.80 - 2.412, 0.0], abs=1e-5)
    assert verdict.sentences[0].startswith("elo, ko: 2.412 to 1.800 bits per byte (−0.612, 95 % interval −0.6")
    assert not any(each.is_supported for each in verdict.differences)
    assert verdict.sentences[-1].startswith("With one seed, intervals cover the choice of documents alone")
    assert not any("With one seed" in each for each in verdict_of(duel(elo=[1.80, 1.81])).sentences)


def test_without_values_per_document_nothing_is_tested():
    results = duel(full=[1.90, 1.91], elo=[1.80, 1.81])
    for trial in results["trials"]:
        trial["measured"] = {"bpb": trial["measured"]["bpb"]}
    verdict = verdict_of(results)
    assert (verdict.differences, verdict.ranked, verdict.best_is_supported) == ((), ("elo", "full"), False)
    assert any("No values per document" in warning for warning in warnings(read_results(results)))


def test_a_few_documents_support_nothing():
    few, enough = ({"full": [1.90, 1.91], "elo": [1.80, 1.81], "documents": number} for number in (29, 30))
    assert not verdict_of(duel(**few)).best_is_supported
    assert verdict_of(duel(**enough)).best_is_supported


def test_several_target_languages_are_averaged():
    results = duel(full=[1.90, 1.91], elo=[1.80, 1.81])
    results["languages"] = {"targets": ["ko", "ja"], "sources": ["en"]}
    for measurement in (results["base"], *(trial["measured"] for trial in results["trials"])):
        for key in ("bpb", "document_nats", "document_bytes"):
            measurement[key]["ja"] = measurement[key]["ko"]
    verdict = verdict_of(results)
    assert [each.languages for each in verdict.best_against] == [("ko", "ja")]
    assert verdict.best_against[0].value == pytest.approx(-0.1, abs=1e-5)
    assert verdict.sentences[0].startswith("mean of ko and ja, with en at most")


def test_harm_few_documents_and_missing_trials_are_warned_of():
    results = duel(elo=[2.45, 2.46], documents=12)
    results["seeds"] = [1, 2, 3]
    found = warnings(read_results(results))
    assert found[0] == "Not finished: 2 of 3 trials are done."
    assert "ko: 12 held-out documents; conclusions need at least 30." in found
    assert "elo: the target language ko is worse than in the base model (+0.043 bpb)." in found


def test_a_best_contestant_that_is_worse_than_the_base_is_called_that():
    lead, harm, *_ = verdict_of(duel(full=[2.45, 2.46], elo=[2.42, 2.43])).sentences
    assert "elo is lowest with 2.425 bits per byte" in lead
    assert harm == "elo is worse than the base model in ko (+0.013 bpb)."
    assert not any("worse" in each for each in verdict_of(duel(full=[2.45, 2.46], elo=[2.40, 2.41])).sentences)


@pytest.mark.parametrize(("seconds", "off"), [(65.9, False), (66.1, True), (54.1, False), (48.0, True)])
def test_trials_off_their_budget_are_warned_of(seconds, off):
    results = duel(elo=[1.8])
    results["trials"][0]["stages"][0]["seconds"] = seconds
    assert any("off the budget of 60 s" in warning for warning in warnings(read_results(results))) is off


@pytest.mark.parametrize(("chosen", "warned"), [(1e-3, False), (2e-3, True), (5e-4, True)])
def test_a_learning_rate_at_the_edge_is_warned_of(chosen, warned):
    results = duel(elo=[1.8])
    (trial,) = results["trials"]
    trial |= {"learning_rates": {"elo": chosen}, "validation": measured({"ko": 1.8, "en": 1.3})}
    others = [rate for rate in (5e-4, 1e-3, 2e-3) if rate != chosen]
    results["trials"] += [{**trial, "tuning": True, "learning_rates": {"elo": rate}} for rate in others]
    assert any("of 3 tried" in warning for warning in warnings(read_results(results))) is warned
