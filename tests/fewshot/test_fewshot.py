"""Few labelled examples in the prompt and in training: predictions, what is trained and what is left, and mistakes."""

import inspect
import json
import random

import pytest
import torch
from evaluation_fixtures import text_tokenizer, tiny_model, tiny_tokenizer

from elo.cli import main
from elo.errors import EloError
from elo.fewshot import fewshot
from elo.fewshot.fewshot import Training, few_shot
from elo.fewshot.table import render
from elo.fewshot.task import Example, Task, draw_examples, read_task

WORDS = {"water": ["river", "ferryman", "mill"], "food": ["bread", "salt", "grain"], "light": ["lamp", "window"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("fewshot")
    tiny_model("llama", len(tiny_tokenizer())).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    draw = random.Random(0)
    for name, number in (("train", 40), ("test", 12)):
        lines = []
        for _ in range(number):
            label = draw.choice(list(WORDS))
            lines.append(json.dumps({"text": f"the {draw.choice(WORDS[label])}", "topic": label}) + "\n")
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def ask(world, **settings):
    files = {"train": world / "train.jsonl", "test": world / "test.jsonl", "label_field": "topic"} | settings
    task = read_task(**{name: files.pop(name) for name in inspect.signature(read_task).parameters if name in files})
    return few_shot(files.pop("model", world / "model"), task, **{"device": "cpu", "progress": False, **files})


def test_rows_costs_and_differences(world, tmp_path):
    results = ask(world, examples=(0, 6), seeds=(1, 2), training=Training(epochs=1), output=tmp_path / "out.json")
    assert [(row["way"], row["examples"]) for row in results["rows"]] == [
        ("in-context", 0), ("in-context", 6), ("sft", 6), ("instruction", 6)
    ]  # fmt: skip
    for row in results["rows"]:
        assert len(row["accuracy_by_seed"]) == 2
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert bool(row["train_tokens"]) == bool(row["train_flops"]) == (row["way"] != "in-context")
        assert row["test_flops_per_item"] > 0
    none, six, sft, instruction = results["rows"]
    assert none["accuracy_by_seed"][0] == none["accuracy_by_seed"][1], "without examples and training seeds are alike"
    assert six["test_tokens_per_item"] > none["test_tokens_per_item"] > sft["test_tokens_per_item"]
    assert instruction["train_tokens"] > sft["train_tokens"]
    assert [(each["way"], each["examples"]) for each in results["differences"]] == [("sft", 6), ("instruction", 6)]
    assert results["differences"][0]["value"] == pytest.approx(sft["accuracy"] - six["accuracy"])
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == results["rows"]
    assert render(results).row_count == 4
    assert render(results).caption is None


def test_training_learns_and_leaves_no_trace(world):
    model = tiny_model("llama", len(tiny_tokenizer()))
    task = read_task(world / "train.jsonl", world / "test.jsonl", label_field="topic")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cells = [fewshot.Cell(way, 30) for way in ("in-context", "sft")]
    for cell in cells:
        fewshot._measure(cell, 1, model, text_tokenizer(), task, Training(epochs=12, learning_rate=1e-2))
    prompted, trained = (sum(cell.right[0]) / len(cell.right[0]) for cell in cells)
    assert trained >= 0.9 > prompted
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_scores_are_log_likelihoods(model_type):
    """What items and labels share is computed once, and changes nothing."""
    model, tokenizer = tiny_model(model_type, len(tiny_tokenizer()), seed=3), text_tokenizer()
    words = ("bread", "river mill", "the lamp was lit", "grain")
    texts = ["Bread, salt", "the lamp", "No one knew why", "river"]
    task = Task("", "", words, words, (), tuple(Example(text, 0) for text in texts), "{text}\n", "")
    context = [tokenizer.prefix_token_id, *tokenizer.encode("a mill\n")]
    items = [fewshot._Item.of(task, example, tokenizer) for example in task.test]
    for text, item, scores in zip(texts, items, fewshot._scores(model, context, items), strict=True):
        for name, word, score in zip(words, item.words, scores, strict=True):
            assert [*item.prompt, *word] == tokenizer.encode(f"{text}\n {name}")
            ids = torch.tensor([[*context, *item.prompt, *word]])
            with torch.no_grad():
                nats = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(1)
            start = len(context) + len(item.prompt)
            assert score == pytest.approx(float(nats[start - 1 :].gather(1, ids[0, start:, None]).sum()), abs=1e-3)


def test_prompts_stay_where_cached_keys_are_valid():
    model = tiny_model("llama", 300)
    model.config.max_position_embeddings = 256
    assert fewshot._limit(model) == 256
    longrope = {"rope_type": "longrope", "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    model.config.rope_parameters = model.config.rope_parameters | longrope
    assert fewshot._limit(model) == 32


def test_draws_are_even_and_nested(world):
    task = read_task(world / "train.jsonl", world / "test.jsonl", label_field="topic", words={"food": "meal"})
    assert task.words == ("meal", "light", "water")
    assert task.instruction == "Label each text with one of: meal, light, water."
    six, three = draw_examples(task, 6, 1), draw_examples(task, 3, 1)
    assert sorted(example.label for example in six) == [0, 0, 1, 1, 2, 2]
    assert all(example in six for example in three)
    assert six != draw_examples(task, 6, 2)


def test_a_limit_draws_from_the_whole_file(world, tmp_path):
    lines = [json.dumps({"text": f"the {word}", "topic": label}) for label in WORDS for word in 8 * WORDS[label]]
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(lines))
    task = read_task(world / "train.jsonl", path, label_field="topic", limit=12)
    assert len(task.test) == 12
    assert {example.label for example in task.test} == {0, 1, 2}
    assert task == read_task(world / "train.jsonl", path, label_field="topic", limit=12)


def test_examples_that_do_not_fit_are_left_out(world, tmp_path):
    model = tiny_model("gpt2", len(tiny_tokenizer()))  # 48 positions
    model.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    settings = {"model": tmp_path / "short", "instruction": "x", "seeds": (1,)}
    results = ask(world, ways=("in-context",), examples=(20,), **settings)
    assert 0 < results["rows"][0]["used_examples"][0] < 20
    with pytest.raises(EloError, match=r"the instruction and the longest test item have .* tokens, .* at most 48"):
        ask(world, ways=("sft",), **settings | {"instruction": None, "template": "{text} " * 30})


def test_mistakes_get_one_message(world, tmp_path, capsys):
    def message(**settings):
        with pytest.raises(EloError) as caught:
            ask(world, **settings)
        return str(caught.value)

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "topic": "water"}\n{"text": "b"}\n')
    assert message(train=bad).startswith(f"{bad}:2: has no 'topic'; it has text; give the right key with --label-field")
    bad.write_text('{"text": "a", "topic": "fire"}\n')
    assert f"{bad}:1: label 'fire' is not in" in message(test=bad)
    assert "has only the label 'fire'" in message(train=bad, test=bad)
    bad.write_text("{\n")
    assert f"{bad}:1: not JSON" in message(test=bad)
    assert "no such file" in message(train=tmp_path / "none.jsonl")
    assert "--examples 99: give 0 to 40" in message(examples=(99,))
    assert "--ways icl: there is no such way" in message(ways=("icl",))
    assert "contains no {text}" in message(template="Label:")
    assert "--word fire: " in message(words={"fire": "hot"})
    assert "two labels have the same word" in message(words={"food": "water"})
    assert "--examples 0: there is nothing to train on" in message(ways=("sft",), examples=(0,))
    files = ["--train", str(world / "train.jsonl"), "--test", str(world / "test.jsonl"), "--label-field", "topic"]
    with pytest.raises(SystemExit):
        main(["fewshot", str(world / "model"), *files, "--word", "food"])
    assert "--word 'food': write LABEL=WORD" in capsys.readouterr().err


def test_the_command(world, tmp_path, capsys):
    output = tmp_path / "few.json"
    main(
        ["fewshot", str(world / "model"), "--train", str(world / "train.jsonl"), "--test", str(world / "test.jsonl"),
         "--label-field", "topic", "--examples", "3", "--ways", "sft", "--seeds", "1", "--epochs", "1", "--limit", "4",
         "--template", r"{text}\nTopic:", "-o", str(output)]
    )  # fmt: skip
    written = json.loads(output.read_text())
    assert written["task"]["template"] == "{text}\nTopic:"
    assert written["task"]["items"] == 4
    shown = " ".join(capsys.readouterr().out.split())
    assert "sft" in shown
    assert "With one seed, intervals cover test items alone and support no difference." in shown
