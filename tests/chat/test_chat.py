"""The chat stages: what comes out, what is measured, mistakes before training, and the same weights after a kill."""

import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from chat_fixtures import write_chat_world, write_conversations
from fork_fixtures import finish, forked
from huggingface_hub import ModelCard
from run_fixtures import SOURCE
from surgery_fixtures import edit_config, stored
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from zoo import tiny_config

from elo.chat.chat import chat
from elo.chat.sequences import ChatSequences
from elo.chat.stages import _hold_out
from elo.cli import main
from elo.compare import compare
from elo.config import load_chat, load_config
from elo.data.chat_template import TEMPLATES, ChatFormat
from elo.data.conversations import Conversation, read_conversations
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError
from elo.evaluate.base import Subject
from elo.evaluate.chat import Chat
from elo.evaluate.evaluate import evaluate
from elo.evaluate.loading import load_model
from elo.evaluate.scoring import keeps_apart
from elo.push import push
from elo.report.files import read_results
from elo.run import run, stage_names
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.vocab.vocabulary import extend_vocabulary

CARD = "---\nlicense: apache-2.0\n---\n\n# {}\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    config = write_chat_world(root)
    for name in ("base", "chat"):
        (root / name / "README.md").write_text(CARD.format(name))
    return root, config


@pytest.fixture(scope="module")
def done(world):
    root, config = world
    return root / "run", run(config)


def sha(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_stages_of_a_run(done, world, capsys):
    folder, results = done
    names = [each["name"] for each in results["chat"]]
    assert names == ["chat_model", "chat_vector", "sft"]
    records = {path.stem for path in (folder / "stages").glob("*.json")}
    assert {"conversations", "chat_vector", "sft", "evaluate-chat_vector", "evaluate-sft"} <= records
    assert (folder / "chat" / "model.safetensors").samefile(folder / "sft" / "model.safetensors")
    assert sha(folder / "model") == sha(folder / "full")
    assert "## Chat models" in (folder / "report.md").read_text()
    assert "chat ended ko" in (folder / "report.html").read_text()
    known = read_results(folder)
    for measured in (known.base, known.trials[0].measured, *(each.measured for each in known.chat)):
        found = {(value.measure, value.language) for value in measured.measures}
        assert {("chat_ended", "ko"), ("chat_language", "ko"), ("chat_nats", "en")} <= found
        assert set(measured.bpb) == {"xx", "en"}
    assert known.chat[-1].stage.tokens > 0
    capsys.readouterr()
    run(world[1])
    assert capsys.readouterr().out.count("already done") == len(records)


def test_what_comes_out_is_a_chat_checkpoint(done):
    folder, _ = done
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") in GenerationConfig.from_pretrained(folder / "chat").eos_token_id
    )
    model, info = AutoModelForCausalLM.from_pretrained(folder / "chat", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    before, after = stored(folder / "chat_vector"), stored(folder / "sft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed, "adapters are merged"
    assert all("layers" in name for name in changed), "LoRA leaves embedding, norm and head as they are"


def test_the_chat_models_card_says_what_it_is(done, world):
    folder, _ = done
    card = ModelCard.load(folder / "chat" / "README.md")
    data = card.data.to_dict()
    assert {"chat", "chat_vector", "sft", "elo"} <= set(data["tags"])
    assert data["license"] == "apache-2.0", "both name it"
    for heading in ("Use", "Base", "Data", "Method", "Cost", "Chat", "Results", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card.text, heading
    text = card.text.replace("\\", "")
    assert "Conversations, ko: chat-ko.jsonl" in text and "apply_chat_template" in text
    assert "| SFT |" in text and "not trained to follow instructions" not in text
    assert "The chat model's card (README_base.md) names apache-2.0." in text
    assert str(world[0]) not in card.text, "a card is published; paths are private"
    assert (folder / "chat" / "README_base.md").read_text() == CARD.format("chat")
    assert load_config(folder / "chat" / "elo_run.yaml") == load_config(world[1])
    assert "README.md" in push(folder / "chat", "owner/chat", dry_run=True)["files"]
    assert (folder / "sft" / "README.md").read_text() == CARD.format("chat"), "the stage stays as it is"


def test_held_out_conversations_are_not_trained_on(done):
    folder, _ = done
    counts = json.loads((folder / "stages" / "conversations.json").read_text())["record"]["conversations"]
    divided = {"training": 36, "heldout": 4, "also_in_training": 0}
    assert counts == {"ko": divided, "en": divided}
    record = json.loads((folder / "stages" / "sft.json").read_text())["record"]
    assert record["conversations"] == 72 and record["packing"] and 0 < record["padding"] < 0.5


def test_a_copy_of_a_held_out_conversation_is_not_trained_on():
    talks = [Conversation(({"role": "user", "content": str(number % 5)},), f"x:{number}") for number in range(20)]
    train, held = _hold_out(talks, 0.1, 0, "en")
    assert len(held) == 2
    assert not {each.messages[0]["content"] for each in train} & {each.messages[0]["content"] for each in held}
    assert len(train) in (12, 16)
    with pytest.raises(EloError, match=r"chat\.data\.en: x:\d+: all conversations are the same"):
        _hold_out(talks[::5], 0.1, 0, "en")


def test_until(world, done, capsys):
    assert stage_names(load_config(world[1])) == ["prepare", "full", "chat_vector", "sft"]
    assert run(world[1], until="chat_vector") == {}
    shown = capsys.readouterr().out
    assert "chat_vector: already done" in shown and "sft" not in shown
    with pytest.raises(EloError, match=r"--until sft: method full has no such stage; write one of prepare, full$"):
        run({key: value for key, value in world[1].items() if key != "chat"}, until="sft")


SECTION = {"sequence_length": 64, "prompts": 4, "max_new_tokens": 8, "template": "chatml"}
TRAINING = {"tokens_per_step": 128, "save_steps": 1, "logging_steps": 1, "bf16": False, "learning_rate": 3e-3}


def section(root, **changes):
    files = {"data": {"en": str(root / "chat-en.jsonl")}}
    return SECTION | files | {"training": TRAINING, "epochs": 2} | changes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_and_resumed_gives_the_same_weights(method, world, tmp_path, capsys):
    root, _ = world
    chosen = section(root, method=method, heldout={"en": str(root / "chat-en.jsonl")}, prompts=1)
    chat(root / "base", chosen, output=tmp_path / "whole")
    assert "chat.heldout.en: 40 of 40 held-out conversations are also in chat.data" in capsys.readouterr().out
    killed = tmp_path / "killed"
    process = forked(lambda: chat(root / "base", chosen, output=killed), tmp_path / "log.txt")
    deadline = time.monotonic() + 60
    while not any(killed.glob("sft-checkpoints/checkpoint-*/elo_checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert not (killed / "sft").exists()
    chat(root / "base", chosen, output=killed)
    assert sha(killed / "chat") == sha(tmp_path / "whole" / "chat")
    assert sha(killed / "chat") != sha(root / "base")


def test_a_packed_sequence_has_the_loss_of_its_conversations(world):
    root, _ = world
    form = ChatFormat.load(root / "chat", None)
    examples = [each for talk in read_conversations(root / "chat-ko.jsonl") for each in form.examples(talk)][:6]
    made = {"sequence_length": 64, "epochs": 1, "multiple": 1, "seed": 0}
    packed = ChatSequences(examples, packing=True, **made)
    assert any(len(each) > 1 for each in packed.sequences)
    model = AutoModelForCausalLM.from_pretrained(root / "chat", dtype=torch.float32)

    def nats(rows):
        total = 0.0
        for row in (rows[index] for index in range(len(rows))):
            inputs = {k: torch.tensor(v)[None] for k, v in row.items() if k != "shift_labels"}
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[0]
            labels = torch.tensor(row["shift_labels"])
            total += float(cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        return total

    assert nats(packed) == pytest.approx(nats(ChatSequences(examples, packing=False, **made)), rel=1e-5)


@pytest.mark.parametrize(("family", "packs"), [("llama", True), ("gemma3", True), ("mamba", False), ("bloom", False)])
def test_only_architectures_that_keep_conversations_apart_pack(family, packs):
    assert keeps_apart(build_hollow_causal_lm(tiny_config(family)), 64) is packs


@pytest.fixture(scope="module")
def answering(world, tmp_path_factory):
    """Conversations with one answer, and a model that learnt it."""
    root, _ = world
    folder = tmp_path_factory.mktemp("answering")
    talk = write_conversations(folder / "en.jsonl", SOURCE[:1], 16, 1)
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    model.save_pretrained(folder / "base")
    shutil.copy(root / "base" / "tokenizer.json", folder / "base")
    shutil.copy(root / "base" / "tokenizer_config.json", folder / "base")
    changes = {"data": {"en": str(talk)}, "heldout": {"en": str(talk)}, "epochs": 60, "method": "full"}
    chosen = section(root, **changes, training=TRAINING | {"save_steps": 100, "learning_rate": 1e-2})
    return folder, chat(folder / "base", chosen, output=folder / "run")


def values(results, name):
    (found,) = [each["measured"]["measures"] for each in results["models"] if each["name"] == name]
    return {(value["measure"], value["name"]): value["value"] for value in found}


def test_fine_tuning_teaches_the_answer_and_its_end(answering):
    folder, results = answering
    before, after = values(results, "adapted"), values(results, "sft")
    assert before["chat_nats", "all"] == pytest.approx(math.log(332), abs=0.3)
    assert after["chat_nats", "all"] < 0.1
    assert before["chat_ended", "all"] == 0 and after["chat_ended", "all"] == 1
    record = json.loads((folder / "run" / "stages" / "evaluate-sft.json").read_text())["record"]
    assert record["answers"][0] == {"language": "en", "prompt": "0 say the", "text": "the", "ended": True}


def test_the_loss_is_that_of_the_answers_alone(answering):
    folder, results = answering
    form = ChatFormat.load(folder / "run" / "chat", None)
    talk = read_conversations(folder / "run" / "conversations" / "heldout-en.jsonl")
    model = load_model(str(folder / "run" / "chat"), device="cpu")
    total, count = 0.0, 0
    for conversation in talk:
        prompt = form.prompt(conversation.messages[:-1], "x")
        answer = form.tokenizer.backend.encode("the<|im_end|>", add_special_tokens=False).ids
        with torch.no_grad():
            nats = -model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        total += sum(float(nats[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
        count += len(answer)
    assert values(results, "sft")["chat_nats", "all"] == pytest.approx(total / count, rel=1e-4)


def test_answers_do_not_depend_on_the_batch(answering):
    folder, _ = answering
    lines = "".join(
        json.dumps({"prompt": prompt, "completion": "the"}) + "\n" for prompt in ("say the", "a", "say the cat and saw")
    )
    (folder / "three.jsonl").write_text(lines)
    model = load_model(str(folder / "base"), device="cpu")
    measure = Chat(data={"en": str(folder / "three.jsonl")}, template="chatml", max_new_tokens=12)
    subjects = [Subject(model, None, folder / "base", batch_size=size) for size in (1, 3)]
    alone, together = (measure.measure(subject).record["answers"] for subject in subjects)
    assert alone == together


def test_language_of_answers_is_identified(tmp_path, world):
    """The reference share is of the true answers; a language without an ISO code has no such value."""
    root, _ = world
    for name, text in (("ko", "오늘은 날씨가 아주 맑고 바람이 시원합니다."), ("xx", "The weather is fine today.")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "?", "completion": text}, ensure_ascii=False))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("ko", "xx")}
    found = evaluate(root / "chat", measures=[Chat(data=data, max_new_tokens=2)], progress=False)["measures"]
    shares = {(each["language"], each["name"]): each["value"] for each in found if each["measure"] == "chat_language"}
    assert shares == {("ko", "all"): 0.0, ("ko", "reference"): 1.0}


def test_command_line(world, tmp_path, capsys):
    root, _ = world
    data = [f"en={root / 'chat-en.jsonl'}"]
    options = ["-o", str(tmp_path / "out"), "--set", "sequence_length=64", "--set", "training.tokens_per_step=128"]
    options += ["--set", "prompts=2", "--set", "max_new_tokens=2", "--set", "epochs=1"]
    models = ["--chat", str(root / "chat"), "--base", str(root / "base")]
    main(["chat", str(root / "base"), "--data", *data, *models, *options])
    results = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert [each["name"] for each in results["models"]] == ["adapted", "chat_model", "chat_vector", "sft"]
    assert "chat model:" in capsys.readouterr().out
    text = (tmp_path / "out" / "chat" / "README.md").read_text().replace("\\", "")
    assert "base with the chat vector of chat and supervised fine-tuning." in text and "| Adapted model |" in text
    section = yaml.safe_load((tmp_path / "out" / "chat" / "elo_chat.yaml").read_text())["chat"]
    assert load_chat(section) == load_chat(results["config"])
    main(["evaluate", str(tmp_path / "out" / "chat"), "--chat", *data])
    assert "chat_ended" in capsys.readouterr().out


BROKEN = {"messages": [{"role": "assistant", "content": "x"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"en": "broken.jsonl"}}, "broken.jsonl:1: message 1: has role 'assistant'"),
        ({"data": {"en": "missing.jsonl"}}, "missing.jsonl: no such file"),
        ({"heldout": {"ko": "missing.jsonl"}}, "missing.jsonl: no such file"),
        ({"template": "none.jinja"}, "template: none.jinja: cannot be read"),
        ({"template": None}, "base: its tokenizer has no chat template; give a template"),
        ({"data": {"en": "one.jsonl"}}, "is the only conversation; give at least two"),
        ({"sequence_length": 1 << 20}, "chat.sequence_length: got 1048576, but .* positions; write at most"),
        ({"training": {"tokens_per_step": 100}}, "chat.training.tokens_per_step: 100 is not a multiple"),
        (
            {"training": {"deep_supervision": {"layers": [99], "weights": [1]}}},
            "chat.training.deep_supervision.layers: 99 is not a layer",
        ),
        ({"model": "chat"}, "the chat model's base is missing"),
        ({"model": "wider", "base": "base"}, "has model.embed_tokens|is \\[|but"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_found_before_anything_is_trained(changes, said, world, tmp_path, monkeypatch):
    root, _ = world
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text(json.dumps(BROKEN))
    Path("one.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    for name in ("base", "chat"):
        Path(name).symlink_to(root / name)
    shutil.copytree(root / "chat", "wider")
    edit_config(Path("wider"), model_type="mistral")
    with pytest.raises(EloError, match=said):
        chat("base", section(root) | changes, output="out")
    assert not Path("out").exists(), "nothing half-written"


def test_a_chat_vector_alone_needs_a_template(world, tmp_path):
    root, _ = world
    bare = shutil.copytree(root / "chat", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    chosen = {"model": str(bare), "base": str(root / "base")}
    with pytest.raises(EloError, match="bare: its tokenizer has no chat template; give a template"):
        chat(root / "base", chosen, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chat(root / "base", chosen | {"template": "chatml"}, output=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "chat").chat_template == TEMPLATES["chatml"]


def test_no_conversation_that_fits(world, tmp_path):
    root, _ = world
    changes = {"sequence_length": 8, "training": TRAINING | {"tokens_per_step": 8}}
    with pytest.raises(EloError, match=r"chat\.sequence_length: no conversation fits into 8 tokens"):
        chat(root / "base", section(root) | changes, output=tmp_path / "out")


def test_the_output_is_local(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EloError, match="is in object storage; outputs are written to a local folder"):
        chat(world[0] / "base", section(world[0]), output="s3://bucket/chat")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {}}, "has neither a model nor data"),
        ({"method": "elo"}, "there is no method 'elo'; choose one of lora, full"),
        ({"training": {"vocabulary": "corpus"}}, "vocabulary: has no effect on supervised fine-tuning"),
        ({"method": {"name": "lora", "scale": 0.5}}, "scale: has no effect"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({"leave_out": ["heads"]}, "leave_out"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(changes, said):
    with pytest.raises(EloError, match=said):
        load_chat({"data": {"en": "x.jsonl"}} | changes)


def test_the_section_survives_a_round_trip():
    config = load_chat({"data": {"en": "x.jsonl"}, "method": "full", "training": {"tokens_per_step": 64}})
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    assert config.settings.learning_rate == 1e-5


def test_a_comparison_makes_no_chat_models(world, tmp_path):
    given = {"run": world[1], "output": str(tmp_path / "out"), "contestants": ["full"], "budgets": [{"tokens": 128}]}
    with pytest.raises(EloError, match="run: chat: a comparison makes no chat models; remove the section"):
        compare(given)


def test_a_chat_model_without_the_new_pieces_is_measured_on_conversations_alone(world, tmp_path):
    root, config = world
    corpora = config["data"]["corpora"]
    extend_vocabulary(root / "base", corpora["xx"], corpora["en"], output=tmp_path / "extended", pieces=20)
    changes = {"model": str(tmp_path / "extended"), "output": str(tmp_path / "run"), "tokens": 128}
    chat_section = {"model": str(root / "chat"), "base": str(root / "base"), "template": "chatml"}
    chat_section |= {"heldout": {"en": config["chat"]["data"]["en"]}, "prompts": 2, "max_new_tokens": 4}
    results = run(config | changes | {"chat": chat_section})
    chat_model, summed = (each["measured"] for each in results["chat"])
    assert chat_model["bpb"] == {} and set(summed["bpb"]) == {"xx", "en"}
    assert {each["measure"] for each in chat_model["measures"]} >= {"chat_nats", "chat_ended"}
