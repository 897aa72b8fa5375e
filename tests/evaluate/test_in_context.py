"""In-context ability: chance for a random model, high for one that learnt to copy, the same values every time."""

import json

import pytest
import torch
from evaluation_fixtures import text_tokenizer, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from elo.cli import main
from elo.errors import EloError
from elo.evaluate.base import Subject
from elo.evaluate.evaluate import evaluate
from elo.evaluate.in_context import InContext, ordinary_pieces
from elo.evaluate.measures import MEASURES
from elo.report.collect import measured

TOKENIZER = text_tokenizer()
SETTINGS = InContext(lengths=(32,), tokens=2048)


def values_of(model, settings=SETTINGS):
    outcome = settings.measure(Subject(model, TOKENIZER))
    return {(value.measure, value.name): value for value in outcome.values}


@pytest.fixture(scope="module")
def copying_model():
    """A model that learnt to repeat: position t looks at the position after the earlier copy of its piece."""
    torch.manual_seed(0)
    pieces = torch.tensor(ordinary_pieces(TOKENIZER, TOKENIZER.vocab_size))
    config = GPT2Config(vocab_size=TOKENIZER.vocab_size, n_positions=32, n_embd=64, n_layer=1, n_head=2, n_inner=64,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(250):
        half = torch.stack([pieces[torch.randperm(len(pieces))[:15]] for _ in range(32)])
        ids = torch.cat([torch.full((32, 1), TOKENIZER.prefix_token_id), half, half], 1)
        labels = ids.clone()
        labels[:, :17] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_that_learnt_to_copy_scores_high(copying_model):
    values = values_of(copying_model)
    assert values["in_context", "copying 32"].value > 0.9
    assert values["in_context_nats", "copying 32"].value < 0.5
    assert values["in_context", "recall 32"].value < 0.5, "copying at one distance is not recall by key"


def test_a_random_model_is_at_chance():
    values = values_of(tiny_model("llama", TOKENIZER.vocab_size))
    for name in ("all", "copying 32", "recall 32", "pattern 32"):
        value = values["in_context", name]
        assert value.value <= value.chance + 4 * max(value.standard_error, 1 / value.items)
    assert values["in_context", "copying 32"].items == 64 * 14
    assert values["in_context_nats", "all"].higher_is_better is False
    assert values["in_context_nats", "all"].value > 4


def test_values_depend_on_the_seed_alone():
    model = tiny_model("gpt2", TOKENIZER.vocab_size)
    model.train()
    first = InContext(tokens=256).measure(Subject(model, TOKENIZER))
    assert model.training
    again = InContext(tokens=256).measure(Subject(model, TOKENIZER, batch_size=1))
    other = InContext(tokens=256, seed=1).measure(Subject(model, TOKENIZER))
    assert [value.value for value in again.values] == pytest.approx([value.value for value in first.values], rel=1e-5)
    assert other.values != first.values
    assert {value.name for value in first.values} == {"all", "copying 48", "recall 48", "pattern 48"}, "its positions"


def test_sequences_show_what_they_ask_for():
    pieces = ordinary_pieces(TOKENIZER, TOKENIZER.vocab_size)
    assert len(pieces) > 40
    assert TOKENIZER.prefix_token_id not in pieces
    for kind in ("copying", "recall", "pattern"):
        for sequence in InContext(tokens=512)._sequences(kind, 64, TOKENIZER, pieces):
            assert len(sequence.ids) <= 64
            for position in sequence.scored:
                answer, before = sequence.ids[position], sequence.ids[:position]
                assert answer in before
                if kind == "copying":
                    assert before[before.index(sequence.ids[position - 1]) + 1] == answer
                elif kind == "recall":
                    assert before[before.index(before[-2]) + 2] == answer, "the value after the key's first mention"


def test_evaluate_carries_the_values_to_the_report(tmp_path, capsys):
    model, output = tiny_model("gpt2", TOKENIZER.vocab_size), tmp_path / "evaluation.json"
    results = evaluate(model, tiny_tokenizer(), measures=[InContext(tokens=64)], output=output)
    carried = {(each.measure, each.name): each for each in measured(results).measures}
    assert carried["in_context", "all"].language == ""
    assert len(carried) == 8
    assert "pattern 48" in capsys.readouterr().out


def test_the_command_configures_any_measure(tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "out.json"
    tiny_model("gpt2", TOKENIZER.vocab_size).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    settings = ["--set", "in_context.lengths=[24]", "--set", "in_context.tokens=64"]
    main(["evaluate", str(model), *settings, "-o", str(output)])
    names = {each["name"] for each in json.loads(output.read_text())["measures"]}
    assert names == {"all", "copying 24", "recall 24", "pattern 24"}
    for options, said in (
        (["--set", "translatoin.path=a"], "unknown key 'translatoin'; did you mean 'translation'"),
        (["--set", "translation.path=a"], "missing key 'translation.columns'"),
        (["--set", "max_bytes=2000"], "--set max_bytes: is not a measure; choose among chat, in_context, tasks"),
        (["--in-context", "--set", "in_context.tokens=64"], "--set in_context: the measure also has an option"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(model), *options])
        assert said in capsys.readouterr().err


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(EloError, match="in_context: tiny: 1 ordinary pieces"):
        evaluate_with_rows(TOKENIZER, rows=min(ordinary_pieces(TOKENIZER, TOKENIZER.vocab_size)) + 1)


def evaluate_with_rows(tokenizer, rows):
    InContext(lengths=(64,)).measure(Subject(tiny_model("llama", rows), tokenizer))


def test_the_order_of_measures_does_not_depend_on_what_is_imported_first():
    """This file imports `in_context` before the measures that come before it."""
    assert list(MEASURES) == sorted(MEASURES)
