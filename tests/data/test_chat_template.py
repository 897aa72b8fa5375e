"""Conversations from JSON lines, and exactly which tokens of them are learnt."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from elo.chat.sequences import ChatSequences
from elo.data.chat_template import TEMPLATES, ChatExample, ChatFormat
from elo.data.conversations import Conversation, read_conversations
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError

MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}...{% else %}{{ message['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = Conversation(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": " 나 \n\nme"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "you"},
    ),
    "talk.jsonl:1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with ChatML's tokens, whose post-processor trims offsets as GPT-2's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["system user assistant you me And"], trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(path)
    return path


def with_template(folder, tmp_path, template):
    (tmp_path / "template.jinja").write_text(template)
    return ChatFormat.load(folder, str(tmp_path / "template.jinja"))


def learnt(chat, example):
    """Text of each run of labels, and the text that stands before it."""
    backend, runs, before = chat.tokenizer.backend, [], True
    for label in example.labels.tolist():
        if label == IGNORE_INDEX:
            before = True
        else:
            runs = [*runs, [label]] if before else [*runs[:-1], [*runs[-1], label]]
            before = False
    return [backend.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], MARKED], ids=["chatml", "generation marks"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(template, folder, tmp_path):
    chat = with_template(folder, tmp_path, template)
    (example,) = chat.examples(TALK)
    assert learnt(chat, example) == [" 나 \n\nme<|im_end|>", "you<|im_end|>"]
    kept = example.labels != IGNORE_INDEX
    assert (example.labels[:-1][kept[:-1]] == example.ids[1:][kept[:-1]]).all(), "a label is the token that follows"
    assert example.answer_tokens == kept.sum()
    backend = chat.tokenizer.backend
    text = chat.settings.apply_chat_template(list(TALK.messages), chat_template=template, tokenize=False)
    whole = backend.encode(text, add_special_tokens=False).ids
    assert example.ids.tolist() == whole[:-1]
    assert backend.id_to_token(chat.end_of_turn) == "<|im_end|>"


def test_the_marks_of_a_template_give_the_same_labels(folder, tmp_path):
    """transformers loses the mask of an answer that begins with a space, whose offset the tokenizer trims."""
    chat = with_template(folder, tmp_path, MARKED)
    messages = [each | {"content": each["content"].strip()} for each in TALK.messages]
    (example,) = chat.examples(Conversation(tuple(messages), TALK.where))
    encoded = chat.settings.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded["input_ids"][:-1] == example.ids.tolist()
    assert (np.array(encoded["assistant_masks"][1:]) == (example.labels != IGNORE_INDEX)).all()


def test_a_template_that_changes_earlier_answers_gives_one_example_per_answer(folder, tmp_path):
    chat = with_template(folder, tmp_path, FORGETFUL)
    first, second = chat.examples(TALK)
    assert learnt(chat, first) == [" 나 \n\nme<|im_end|>"]
    assert learnt(chat, second) == ["you<|im_end|>"]


def test_the_plain_template_needs_only_an_end_of_text(folder):
    chat = ChatFormat.load(folder, "plain")
    (example,) = chat.examples(TALK)
    assert learnt(chat, example) == ["  나 \n\nme<eos>", " you<eos>"]
    assert chat.stops == (chat.settings.eos_token_id,)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; give a template: a Jinja file, or one of chatml, plain"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "so generation would not stop"),
        (
            TEMPLATES["chatml"].replace(">assistant\n", ">model\n"),
            "does not begin an answer with its generation prompt",
        ),
        ("{{ raise_exception('no system here') }}", r"talk.jsonl:1: .*rejects the conversation \(no system here\)"),
        ("{% for", "rejects the conversation"),
    ],
    ids=["none", "no end", "other prompt", "raises", "not Jinja"],
)
def test_templates_that_cannot_be_used(template, said, folder, tmp_path):
    with pytest.raises(EloError, match=said):
        (with_template(folder, tmp_path, template) if template else ChatFormat.load(folder, None)).examples(TALK)


def test_a_template_file_that_is_missing(folder):
    with pytest.raises(EloError, match=r"template: no\.jinja: cannot be read"):
        ChatFormat.load(folder, "no.jinja")


def test_an_answer_that_spells_the_end_of_turn(folder):
    spelled = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|>b"})
    with pytest.raises(EloError, match=r"x.jsonl:3: an answer has 2 end-of-turn tokens '<\|im_end\|>'"):
        ChatFormat.load(folder, "chatml").examples(Conversation(spelled, "x.jsonl:3"))


def test_three_forms_of_a_line(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1},
        {"instruction": "a", "input": "c", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": " \n", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines)
    (tmp_path / "x.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = read_conversations(tmp_path / "x.jsonl")
    assert [each.messages[0]["content"] for each in found] == ["a", "a\n\nc", "a", "a", "a"]
    assert [each.messages[1] for each in found] == [{"role": "assistant", "content": "b"}] * 5
    assert [each.where.rpartition(":")[2] for each in found] == ["1", "3", "5", "7", "9"]
    assert [each.messages for each in read_conversations(tmp_path / "x.jsonl.gz")] == [each.messages for each in found]


def turns(*pairs):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", r":2: not JSON"),
        ("[1]", ":2: is a list; write an object"),
        ('{"text": "x"}', ":2: has the fields 'text'; write 'messages'"),
        ('{"prompt": "x"}', ":2: field 'completion' is missing"),
        ('{"instruction": "x", "output": "  "}', ":2: 'output' is empty"),
        ('{"instruction": "x", "output": 3}', ":2: 'output' is a number; write text"),
        ('{"messages": []}', ":2: 'messages' is an empty list"),
        (turns(("user", "a"), ("assistant", "")), ":2: message 2: 'content' is empty"),
        (turns(("user", "a"), ("user", "b")), ":2: message 2: has role 'user', where 'assistant' must follow"),
        (turns(("assistant", "a")), ":2: message 1: has role 'assistant', where 'user' must follow"),
        (turns(("user", "a"), ("system", "b")), ":2: message 2: has role 'system', where 'assistant' must follow"),
        (turns(("user", "a"), ("tool", "b")), ":2: message 2: has role 'tool', where 'assistant' must follow"),
        (turns(("user", "a")), ":2: ends with the role 'user'; end it with the assistant's answer"),
        ('{"messages": [{"role": "user"}]}', ":2: message 1: field 'content' is missing"),
        ('{"messages": ["hi"]}', ":2: message 1: is text; write an object"),
    ],
)
def test_a_broken_line_is_named(line, said, tmp_path):
    (tmp_path / "x.jsonl").write_text(turns(("user", "a"), ("assistant", "b")) + "\n" + line + "\n")
    with pytest.raises(EloError, match=r"x\.jsonl" + said):
        read_conversations(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"", "holds no conversations"), (b"\x1f\x8bxx", "compressed with gzip; add .gz")],
)
def test_a_file_without_conversations(content, said, tmp_path):
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(EloError, match=said):
        read_conversations(tmp_path / "x.jsonl")


def example(length, first):
    ids = np.arange(first, first + length)
    return ChatExample(ids, np.where(ids % 2 == 0, ids + 1, IGNORE_INDEX))


@pytest.mark.parametrize("packing", [True, False])
def test_sequences_hold_whole_conversations(packing):
    examples = [example(length, 1000 * number) for number, length in enumerate([3, 8, 5, 2, 7, 4, 6])]
    made = {"sequence_length": 10, "epochs": 2, "multiple": 3, "seed": 1}
    rows = ChatSequences(examples, packing=packing, **made)
    assert len(rows) % 3 == 0
    seen = []
    for row in (rows[index] for index in range(len(rows))):
        used = row["position_ids"] < 0
        starts = [*np.flatnonzero(row["position_ids"] == 0), 10] if packing else [0, int(row["attention_mask"].sum())]
        for start, stop in pairwise(starts):
            number = row["input_ids"][start] // 1000
            whole = examples[number]
            if stop - start == len(whole.ids) and (row["input_ids"][start:stop] == whole.ids).all():
                assert (row["shift_labels"][start:stop] == whole.labels).all()
                assert (row["position_ids"][start:stop] == np.arange(stop - start)).all()
                used[start:stop] = True
                seen.append(int(number))
        assert (row["shift_labels"][~used] == IGNORE_INDEX).all(), "padding is not learnt"
    assert sorted(seen[: 2 * len(examples)]) == sorted([*range(7), *range(7)]), "each pass has every conversation once"
    again = ChatSequences(examples, packing=packing, **made)
    assert again.sequences == rows.sequences
    assert ChatSequences(examples, packing=packing, **made | {"seed": 2}).sequences != rows.sequences
    if packing:
        assert len(rows) < len(ChatSequences(examples, packing=False, **made))
