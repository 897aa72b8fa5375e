"""Several target and several source languages: shares of training tokens, measurements, report."""

import pytest
from run_fixtures import SOURCE, TARGET, write_documents, write_world

from elo.budget import divide_budget
from elo.compare import compare
from elo.config import load_config
from elo.data.mixture import build_mixture
from elo.data.shards import PreparedData
from elo.errors import EloError
from elo.report.files import read_results
from elo.report.page import markdown_page
from elo.run import run

LANGUAGES = ("xx", "yy", "en", "de")
LIMIT = 0.0


def _world(root):
    """A run in four languages: xx has about twice the text of yy, and en about half of de's."""
    config = write_world(root)
    data = config["data"]
    data["target"], data["source"] = ["xx", "yy"], {"en": 3, "de": 1}
    data["corpora"]["yy"] = str(write_documents(root / "yy.jsonl", TARGET[::-1], 30, 3))
    data["corpora"]["de"] = str(write_documents(root / "de.jsonl", SOURCE[::-1], 60, 4))
    data["replay_ratio"] = 0.2
    return config


def _counts(mixture, rows):
    found = [mixture.sequences(0, rows).language(index) for index in range(rows)]
    return {language: found.count(language) for language in dict.fromkeys(found)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its configuration."""
    config = _world(tmp_path_factory.mktemp("languages"))
    config["training"]["learning_rate"] = 1e-6
    return config, run(config)


@pytest.fixture(scope="module")
def prepared(finished):
    return PreparedData.open(f"{finished[0]['output']}/prepared")


def test_each_language_is_measured_and_reported_with_its_share(finished, prepared):
    _, results = finished
    assert results["languages"] == {"targets": ["xx", "yy"], "sources": ["en", "de"]}
    for measured in (results["base"], results["trials"][0]["measured"]):
        assert tuple(measured["bpb"]) == LANGUAGES
    assert all(tuple(point["bpb"]) == LANGUAGES for point in results["trials"][0]["evaluations"])
    tokens = {language: prepared.train(language)[0].num_tokens for language in ("xx", "yy")}
    shares = {language: 0.8 * count / sum(tokens.values()) for language, count in tokens.items()}
    assert results["data"]["shares"] == pytest.approx({**shares, "en": 0.15, "de": 0.05})
    page = markdown_page(read_results(results), [])
    assert "0.15 of training tokens" in page
    assert results["title"].endswith("learns xx and yy")
    sentences = results["verdict"]["budgets"][0]["sentences"]
    assert "xx: " in sentences[0] and "yy: " in sentences[0]
    assert "en: " in sentences[1] and "de: " in sentences[1]


def test_shares_hold_in_every_prefix_and_those_of_the_roles_most_exactly(prepared):
    mixture = build_mixture(prepared, {"xx": 1, "yy": 4}, {"en": 3, "de": 1}, 0.2, 32, seed=5)
    shares = {"xx": 0.16, "yy": 0.64, "en": 0.15, "de": 0.05}
    counts, rows = dict.fromkeys(shares, 0), mixture.sequences(0, 4000)
    for index in range(len(rows)):
        counts[rows.language(index)] += 1
        assert abs(counts["en"] + counts["de"] - 0.2 * (index + 1)) < 1 + 1e-6
        assert all(abs(counts[language] - share * (index + 1)) < 2 for language, share in shares.items())
    assert counts == {language: pytest.approx(share * 4000, abs=1) for language, share in shares.items()}


def test_a_list_is_read_in_proportion_to_its_tokens(finished, prepared):
    config = load_config(finished[0], ["tokens=null"])
    lines = []
    sequences = divide_budget(config, prepared, lines.append)
    total = sequences.pretraining + sequences.alignment
    counts = _counts(sequences.mixture, total)
    passes = {language: counts[language] / prepared.train(language)[0].num_tokens for language in ("xx", "yy")}
    assert passes["xx"] == pytest.approx(passes["yy"], rel=0.02)
    assert passes["xx"] * 32 == pytest.approx(1, rel=0.05), "null is one pass over both target languages"
    assert any("'en' text" in line for line in lines), "the source language with little text is read more than once"


def test_shares_decide_the_order_and_the_identity(prepared):
    def rows(*languages):
        return build_mixture(prepared, *languages, 0.2, 32, seed=5).sequences(0, 200)

    one, same, swapped = rows(["xx"], "en"), rows("xx", {"en": 2}), rows("en", "xx")
    assert [one.language(i) for i in range(200)] == [same.language(i) for i in range(200)]
    assert one.identity() == same.identity() != swapped.identity()
    assert rows(["xx", "yy"], "en").identity() != rows(["yy", "xx"], "en").identity()
    with pytest.raises(EloError, match="'xx' is both a target and a source language"):
        rows(["yy", "xx"], "xx")


def test_any_target_language_that_is_worse_than_the_base_causes_a_warning(finished, capsys):
    run({**finished[0], "method": "full", "training": {**finished[0]["training"], "learning_rate": 0.9}})
    said = capsys.readouterr().out
    for language in LANGUAGES:
        assert (f"{language} is worse than the base model" in said) == (language in ("xx", "yy"))


def test_a_comparison_tunes_and_ranks_by_the_mean_over_the_target_languages(tmp_path):
    config = _world(tmp_path)
    for key in ("output", "tokens", "method"):
        config.pop(key)
    results = compare({
        "run": config,
        "output": str(tmp_path / "comparison"),
        "contestants": {"full": {"learning_rates": [1e-4, 1e-3]}, "lora": {}},
        "budgets": [{"tokens": 640}],
        "seeds": [1],
        "learning_rates": [1e-3],
        "source_limit": LIMIT,
    })  # fmt: skip
    assert results["languages"] == {"targets": ["xx", "yy"], "sources": ["en", "de"]}

    def score(trial):
        bpb, before = trial["validation"]["bpb"], results["base_validation"]["bpb"]
        excess = max(bpb[each] - before[each] - LIMIT for each in ("en", "de"))
        assert trial["source_excess_bpb"] == pytest.approx(max(0, excess))
        return max(0, excess), (bpb["xx"] + bpb["yy"]) / 2

    full = [trial for trial in results["trials"] if trial["contestant"] == "full"]
    assert min(full, key=score)["tuning"] is False
    (judged,) = results["verdict"]["budgets"]
    means = {
        trial["contestant"]: (trial["measured"]["bpb"]["xx"] + trial["measured"]["bpb"]["yy"]) / 2
        for trial in results["trials"]
        if not trial["tuning"]
    }
    assert judged["ranked"] == sorted(judged["ranked"], key=means.__getitem__)
    assert [(each["contestant"], each["languages"]) for each in judged["differences"]] == [
        ("lora", [language]) for language in LANGUAGES
    ]
    page = markdown_page(read_results(results), [])
    assert "mean of xx and yy, target" in page and "yy, target" in page and "de, source" in page
