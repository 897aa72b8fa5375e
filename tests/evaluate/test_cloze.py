import json
from dataclasses import replace

import pytest
import torch
from evaluation_fixtures import text_tokenizer, tiny_model, tiny_tokenizer

from elo.errors import EloError
from elo.evaluate.cloze import ClozeItem, GroupAccuracy, cloze_accuracy, read_cloze
from elo.evaluate.samples import generate_samples

TOKENIZER = tiny_tokenizer()
TEXT_TOKENIZER = text_tokenizer()
ITEMS = [
    ClozeItem("The river runs past", (" the mill", " the bell", " a"), 0),
    ClozeItem("No one knew why the la", ("mp", "dder that stood there"), 1),
    ClozeItem("산 너머 마을에는", (" 우물이", " 고양이가", " 비가", " 물은"), 2),
    ClozeItem("", ("Bread", "Salt"), 1),
]


def string_log_probability(model, ids, start):
    """log P(ids[start:] | end-of-text, ids[:start]), one forward pass, by hand."""
    with torch.no_grad():
        logits = model(torch.tensor([[TOKENIZER.eos_token_id, *ids]]), use_cache=False).logits[0].double()
    log_probabilities = torch.log_softmax(logits, -1)
    return sum(log_probabilities[index, ids[index]].item() for index in range(start, len(ids)))


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_predictions_are_the_most_likely_continuations(model_type, batch_size):
    expected = []
    model = tiny_model(model_type, len(TOKENIZER), seed=3)
    for item in ITEMS:
        prompt = encode(item.prompt)
        wholes = [encode(item.prompt + choice) for choice in item.choices]
        start = 0
        while start < len(prompt) and all(len(w) > start + 1 and w[start] == prompt[start] for w in wholes):
            start += 1
        scores = [string_log_probability(model, whole, start) for whole in wholes]
        expected.append(scores.index(max(scores)))
    result = cloze_accuracy(model, TEXT_TOKENIZER, ITEMS, batch_size=batch_size)
    assert result.predictions == tuple(expected)
    right = sum(guess == item.answer for guess, item in zip(expected, ITEMS, strict=True))
    assert result.accuracy == right / len(ITEMS)
    assert result.items == 4
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)


def test_choices_that_merge_with_the_prompt_are_scored_from_the_same_token():
    """`la` + `mp` becomes tokens that the prompt alone does not have: both choices count from where that begins."""
    item = ITEMS[1]
    prompt, merged = encode(item.prompt), encode(item.prompt + "mp")
    assert merged[: len(prompt)] != prompt, (
        "the tokenizer must merge across the boundary for this test to mean anything"
    )
    model = tiny_model("llama", len(TOKENIZER), seed=3)
    shared = next(index for index, (a, b) in enumerate(zip(prompt, merged, strict=False)) if a != b)
    scores = [string_log_probability(model, encode(item.prompt + choice), shared) for choice in item.choices]
    guess = cloze_accuracy(model, TEXT_TOKENIZER, [item]).predictions[0]
    assert guess == scores.index(max(scores))


def test_groups_are_counted_by_themselves():
    model = tiny_model("llama", len(TOKENIZER), seed=3)
    ungrouped = cloze_accuracy(model, TEXT_TOKENIZER, ITEMS)
    assert ungrouped.groups == {}
    # Answers are set so that it is known what is right: b: 1 of 2, a: 1 of 1; the last item, wrong, is in no group.
    guesses = ungrouped.predictions
    wrong = [(guess + 1) % len(item.choices) for guess, item in zip(guesses, ITEMS, strict=True)]
    items = [
        replace(ITEMS[0], answer=guesses[0], group="b"),
        replace(ITEMS[1], answer=guesses[1], group="a"),
        replace(ITEMS[2], answer=wrong[2], group="b"),
        replace(ITEMS[3], answer=wrong[3]),
    ]
    result = cloze_accuracy(model, TEXT_TOKENIZER, items, batch_size=1)
    assert result.groups == {"b": GroupAccuracy(0.5, 2), "a": GroupAccuracy(1.0, 1)}
    assert list(result.groups) == ["b", "a"]
    assert (result.accuracy, result.items, result.predictions) == (0.5, 4, guesses)


def test_groups_are_read(tmp_path):
    item = {"prompt": "p", "choices": ["a", "b"], "answer": 0, "other": [1]}
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps({**item, **more}) for more in ({"group": "told_once"}, {}, {"group": None})))
    assert [each.group for each in read_cloze(path)] == ["told_once", None, None]


def test_a_trained_model_beats_chance():
    model = tiny_model("llama", len(TOKENIZER))
    torch.manual_seed(0)
    facts = [("The sky is", " blue", " dry"), ("The stone is", " grey", " wet"), ("고양이는", " 작다", " 크다")]
    items = [ClozeItem(prompt, (wrong, right), 1) for prompt, right, wrong in facts]
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        for prompt, right, _wrong in facts:
            ids = torch.tensor([[TOKENIZER.eos_token_id, *encode(prompt + right)]])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert cloze_accuracy(model, TEXT_TOKENIZER, items).accuracy == 1.0
    texts = generate_samples(model, TEXT_TOKENIZER, ["The sky is", "고양이는"], max_new_tokens=len(encode(" blue")))
    assert texts[0].startswith(" blue")


def test_prompts_longer_than_the_model_lose_their_beginning():
    model = tiny_model("gpt2", len(TOKENIZER))
    item = ClozeItem("The river runs past the mill. " * 40, (" a", " the bell"), 0)
    assert cloze_accuracy(model, TEXT_TOKENIZER, [item]).items == 1
    with pytest.raises(EloError, match=r"choice 1 .* tokens, but the model has 48 positions"):
        cloze_accuracy(model, TEXT_TOKENIZER, [ClozeItem("x", ("a", "고양이" * 60), 0)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "items.jsonl:2: not JSON"),
        ("[1]", "items.jsonl:2: expected an object"),
        ('{"prompt": 1, "choices": ["a", "b"], "answer": 0}', '"prompt" must be a string, got 1'),
        ('{"prompt": "p", "choices": "ab", "answer": 0}', '"choices" must be a list'),
        ('{"prompt": "p", "choices": ["a", "a"], "answer": 0}', "at least two, all different"),
        (
            '{"prompt": "p", "choices": ["a", "b"], "answer": 2}',
            '"answer" must be the index of a choice, 0 to 1, got 2',
        ),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "got True"),
        (
            '{"prompt": "p", "choices": ["a", "b"], "answer": 0, "group": 3}',
            '"group" must be a non-empty string where there is one, got 3',
        ),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 0, "group": " "}', "got ' '"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 0}) + "\n" + line + "\n")
    with pytest.raises(EloError) as caught:
        read_cloze(path)
    assert message in str(caught.value)
    assert "items.jsonl:2" in str(caught.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(EloError, match="no such file; give JSON lines of cloze items"):
        read_cloze(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EloError, match="holds no cloze items"):
        read_cloze(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(EloError, match="not UTF-8"):
        read_cloze(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba", "gemma3_text"])
def test_samples_are_greedy_and_deterministic(model_type):
    model = tiny_model(model_type, len(TOKENIZER), seed=1).train()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 2.0
    prompts = ["The river", "산 너머"]
    texts = generate_samples(model, TEXT_TOKENIZER, prompts, max_new_tokens=12)
    assert texts == generate_samples(model, TEXT_TOKENIZER, prompts, max_new_tokens=12)
    assert model.training
    model.eval()
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [TOKENIZER.eos_token_id, *encode(prompt)]
        written = []
        for _ in range(12):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            written.append(token)
        assert text == TOKENIZER.decode(written).rstrip("�")


def test_samples_stay_within_the_models_positions():
    model = tiny_model("gpt2", len(TOKENIZER))
    assert len(generate_samples(model, TEXT_TOKENIZER, ["mill " * 100], max_new_tokens=20)) == 1
    with pytest.raises(EloError, match="max_new_tokens: got 48"):
        generate_samples(model, TEXT_TOKENIZER, ["a"], max_new_tokens=48)
