"""`elo compare` over several base models: the same bytes, each base in its own tokens, changes against its own base."""

import json
from pathlib import Path

import pytest
from run_fixtures import SOURCE, write_base, write_world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elo.compare import compare
from elo.errors import EloError
from elo.report.files import read_results
from elo.report.page import markdown_page
from elo.report.schema import TextSize

BUDGET = "640 tokens"


def _other_base(folder):
    """A base of two layers whose tokenizer spells the target language in bytes."""
    write_base(folder, layers=2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(SOURCE)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    run = write_world(root)
    for key in ("output", "tokens", "method"):
        run.pop(key)
    run["evaluation"] = {"max_bytes": 1000}
    config = {
        "run": run,
        "output": str(root / "comparison"),
        "contestants": {
            "one": {"method": "full"},
            "two": {"method": "full", "model": _other_base(root / "other")},
            "two_frozen": {"method": "frozen", "model": str(root / "other"), "changes": {"layers": "last:1"}},
        },
        "budgets": [{"tokens": 640}],
        "seeds": [1],
        "learning_rates": [1e-3],
    }
    return root, config, compare(config)


def test_every_base_is_measured_on_the_same_bytes_in_its_own_tokens(finished):
    _, config, results = finished
    known = read_results(results)
    one, two, frozen = (known.base_of(each.name) for each in known.contestants)
    assert one == known.base and two == frozen != one
    assert two.document_bytes == one.document_bytes
    sizes = [each.heldout["xx"] for each in (one, two)]
    assert sizes[0].bytes == sizes[1].bytes
    assert sizes[0].bytes_per_token > 1.5 * sizes[1].bytes_per_token
    assert [each.model.name for each in known.contestants] == [
        config["run"]["model"],
        *[config["contestants"]["two"]["model"]] * 2,
    ]
    assert [each.model.num_layers for each in known.contestants] == [4, 2, 2]
    assert [each.layers for each in known.contestants] == [(), (), (1,)]


def test_changes_are_against_a_contestants_own_base(finished):
    known = read_results(finished[2])
    for name in ("one", "two"):
        (trial,) = known.finished(name, BUDGET)
        assert trial.tokens == 640
        change = trial.measured.bpb["xx"] - known.base_of(name).bpb["xx"]
        assert known.change(name, BUDGET, "xx") == pytest.approx(change)
    assert any(each.contestant == "two" and each.reference == "one" for each in known.verdict.budgets[0].differences)


def test_the_report_has_a_table_of_the_bases(finished):
    known = read_results(finished[2])
    page = markdown_page(known, [])
    table = page.split("## Base models")[1].split("##")[0]
    for contestant in known.contestants:
        base = known.base_of(contestant.name)
        size: TextSize = base.heldout["xx"]
        row = next(
            line for line in table.splitlines() if line.startswith(f"| {contestant.title.replace('_', chr(92) + '_')} ")
        )
        after = known.mean_bpb(contestant.name, BUDGET, ("xx",))
        rows = json.loads((Path(contestant.model.name) / "config.json").read_text())["vocab_size"]
        for value in (f"{rows:,}", f"{size.bytes_per_token:.2f}", f"{base.bpb['xx']:.3f}", f"{after:.3f}"):
            assert value in row
    assert "Base model of one" in page and "base models compared" in page


def test_an_interrupted_comparison_of_bases_trains_nothing_again(finished, capsys):
    root, config, results = finished
    records = {path: path.stat().st_mtime_ns for path in (root / "comparison").rglob("stages/*.json")}
    assert any("bases/two/stages" in str(path) for path in records)
    assert not (root / "comparison" / "bases" / "two_frozen").exists(), "the same base is prepared once"
    again = compare(config)
    assert again["trials"] == results["trials"]
    assert {path: path.stat().st_mtime_ns for path in records} == records


@pytest.mark.parametrize(
    ("contestant", "message"),
    [
        (
            {"method": "full", "changes": {"model": "x"}},
            r"contestants\.two\.changes: model: write model beside changes",
        ),
        ({"method": "full", "tokenizer": "x"}, r"contestants\.two\.tokenizer: needs a model"),
        ({"method": "full", "model": "no/such/base"}, "no/such/base"),
    ],
)
def test_mistakes_are_named(finished, tmp_path, contestant, message):
    _, config, _ = finished
    contestants = {"one": config["contestants"]["one"], "two": contestant}
    with pytest.raises(EloError, match=message):
        compare({**config, "contestants": contestants, "output": str(tmp_path / "comparison")})
