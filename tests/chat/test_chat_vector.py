"""Chat vector: adapted + scale * (chat - base), exactly, whatever vocabulary, dtype, files and tokenizer there are."""

import json
import shutil

import pytest
import torch
from surgery_fixtures import assert_same, changed, edit_config, llama, resized, store, stored, three, tokenized
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_fixtures import KOREAN
from zoo import FAMILIES, tiny_config, tiny_model

from elo.chat.chat_vector import add_chat_vector, chat_vector
from elo.checkpoint.new_rows import VOCABULARY_KEY, NewRows
from elo.cli import main
from elo.errors import EloError
from elo.surgery.on_disk import detach_checkpoint
from elo.vocab.rows import NewTokens, extend_checkpoint
from elo.vocab.vocabulary import extend_vocabulary

SOME = ["llama-untied", "gpt2", "gemma3", "qwen3_moe", "gpt_oss", "mamba"]  # other names on disk, tied, experts, states


def add(adapted, base, chat, output, **arguments):
    return add_chat_vector(adapted, base, chat, output, **{"save_tokenizer": lambda folder: None} | arguments)


@pytest.mark.parametrize("family", SOME)
def test_every_family_becomes_the_sum(family, tmp_path):
    model_type, particular = FAMILIES[family]
    for name, seed in (("base", None), ("adapted", 1), ("chat", 2)):
        model = tiny_model(tiny_config(model_type, **particular))
        changed(model, tmp_path / name, seed) if seed else model.save_pretrained(tmp_path / name)
    record = add(tmp_path / "adapted", tmp_path / "base", tmp_path / "chat", tmp_path / "sum")
    models = {}
    for name in ("base", "adapted", "chat", "sum"):
        models[name], info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert record["tensors"] > 0
    assert record["rows_kept"] == 0
    assert record["differs"] == []
    states = {name: model.state_dict() for name, model in models.items()}
    for name, summed in states["sum"].items():
        if summed.is_floating_point():
            expected = states["adapted"][name].double() + states["chat"][name].double() - states["base"][name].double()
            torch.testing.assert_close(summed, expected.to(summed.dtype), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_where_nothing_was_adapted_the_sum_is_the_chat_model_and_the_other_way_round(dtype, tied, tmp_path):
    _, base, chat = three(tmp_path, dtype, tied=tied)
    assert stored(base)["model.norm.weight"].dtype == dtype
    add(base, base, chat, tmp_path / "sum")
    assert_same(stored(tmp_path / "sum"), stored(chat))
    add(chat, base, base, tmp_path / "same")
    assert_same(stored(tmp_path / "same"), stored(chat))
    add(chat, base, base, tmp_path / "none", scale=0.0)
    assert_same(stored(tmp_path / "none"), stored(chat))


def test_scale_and_what_is_left_out(tmp_path):
    adapted, base, chat = three(tmp_path)
    record = add(adapted, base, chat, tmp_path / "sum", scale=0.5, leave_out=["embedding", "head"])
    ours, theirs, chats, summed = (stored(folder) for folder in (adapted, base, chat, tmp_path / "sum"))
    for name, tensor in summed.items():
        left = name in ("model.embed_tokens.weight", "lm_head.weight")
        change = 0 if left else 0.5 * (chats[name].double() - theirs[name].double())
        assert torch.equal(tensor, (ours[name].double() + change).float()), name
    assert record["tensors"] == len(summed) - 2


def test_several_files_and_another_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("elo.checkpoint.tensor_files.MAX_SHARD_BYTES", 20_000)
    adapted, base, chat = three(tmp_path)
    expected = {
        name: (tensor.double() + stored(chat)[name].bfloat16().double() - stored(base)[name].double()).float()
        for name, tensor in stored(adapted).items()
    }
    chats = AutoModelForCausalLM.from_pretrained(chat, dtype=torch.bfloat16)
    chats.save_pretrained(tmp_path / "chat16", max_shard_size="20KB")
    assert len(list((tmp_path / "chat16").glob("*.safetensors"))) > 2
    add(adapted, base, tmp_path / "chat16", tmp_path / "sum")
    assert len(list((tmp_path / "sum").glob("*.safetensors"))) > 2
    assert_same(stored(tmp_path / "sum"), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", [64, 60])
def test_rows_of_new_tokens_stay_as_they_are(tied, first, tmp_path):
    """From 60 on: unused rows of the base were taken, and the chat model changed them as well."""
    _, base, chat = three(tmp_path, tied=tied)
    new = NewTokens(first, [[5, 6], [7], [8]])
    extend_checkpoint(base, tmp_path / "new", new, save_tokenizer=lambda folder: None, pad_to_multiple_of=8)
    adapted = changed(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tmp_path / "adapted2", 3)
    record = add(adapted, base, chat, tmp_path / "sum")
    ours, theirs, chats, summed = (stored(folder) for folder in (adapted, base, chat, tmp_path / "sum"))
    for name in [each for each in summed if summed[each].shape[0] == len(ours["model.embed_tokens.weight"])]:
        change = chats[name][:first].double() - theirs[name][:first].double()
        assert torch.equal(summed[name][:first], (ours[name][:first].double() + change).float()), name
        assert torch.equal(summed[name][first:], ours[name][first:]), name
    assert record["rows_kept"] == len(ours["model.embed_tokens.weight"]) - first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
    assert NewRows(**getattr(model.config, VOCABULARY_KEY)["rows"]) == NewRows(first, first + 3)


def test_a_tied_head_that_one_of_them_stores(tmp_path):
    adapted, base, chat = three(tmp_path, tied=True)
    for folder in (adapted, base):
        tensors = stored(folder)
        store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        add(adapted, base, chat, tmp_path / f"sum-{folder.name}")
        summed = stored(tmp_path / f"sum-{folder.name}")
        assert torch.equal(summed["lm_head.weight"], summed["model.embed_tokens.weight"])


def test_tied_parts_are_left_out_together(tmp_path):
    adapted, base, chat = three(tmp_path, tied=True)
    for folder in (adapted, base, chat):
        tensors = stored(folder)
        store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    add(adapted, base, chat, tmp_path / "sum", leave_out=["embedding"])
    ours, summed = stored(adapted), stored(tmp_path / "sum")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(summed[name], ours[name]), name


def test_parts_of_a_wrapper_are_left_out(tmp_path):
    """In the files of a Gemma 3 with a vision tower the embedding has another name than in the model."""
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = tiny_model(tiny_config("gemma3", text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "base")
    for name, seed in (("adapted", 1), ("chat", 2)):
        changed(model, tmp_path / name, seed)
    add(*(tmp_path / name for name in ("adapted", "base", "chat")), tmp_path / "sum", leave_out=["embedding", "norm"])
    ours, summed = stored(tmp_path / "adapted"), stored(tmp_path / "sum")
    same = {name for name in ours if torch.equal(ours[name], summed[name])}
    assert same == {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}


def test_chat_templates_are_the_chat_models_alone(tmp_path):
    adapted, base, chat = three(tmp_path)
    for folder, name in ((adapted, "old"), (chat, "rag")):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    (adapted / "chat_template.jinja").write_text("adapted")
    add(adapted, base, chat, tmp_path / "sum")
    assert [path.name for path in (tmp_path / "sum").rglob("*.jinja")] == ["rag.jinja"]


def test_settings_come_from_the_chat_model(tmp_path):
    adapted, base, chat = three(tmp_path)
    edit_config(chat, eos_token_id=[7, 9], rope_theta=5e5)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}))
    (adapted / "README.txt").write_text("adapted")
    record = add(adapted, base, chat, tmp_path / "sum")
    config = json.loads((tmp_path / "sum" / "config.json").read_text())
    assert config["eos_token_id"] == [7, 9]
    assert "rope_theta" in record["differs"]
    assert config.get("rope_theta") != 5e5
    assert json.loads((tmp_path / "sum" / "generation_config.json").read_text())["temperature"] == 0.6
    assert (tmp_path / "sum" / "README.txt").read_text() == "adapted"


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def test_without_generation_settings_of_the_chat_model_its_end_of_turn_counts(tmp_path):
    adapted, base, chat = three(tmp_path)
    for folder, end in ((adapted, 5), (base, 5), (chat, 9)):
        edit_config(folder, eos_token_id=end)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (chat / "generation_config.json").unlink()
    add(adapted, base, chat, tmp_path / "sum")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sum").generation_config.eos_token_id == 9


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """Base, chat model and adapted model with Qwen's kind of tokenizer; the adapted model once with new pieces too."""
    root = tmp_path_factory.mktemp("talking")
    tokenizer = tokenized(root, "base", "adapted", "chat")
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    tokenizer.save_pretrained(root / "chat")
    return root


def rendered(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, tokenizer.apply_chat_template([{"role": "user", "content": " ".join(KOREAN)}], tokenize=False)


def test_the_sum_talks_with_the_chat_models_template(talking, tmp_path, capsys):
    chat = shutil.copytree(talking / "chat", tmp_path / "chat")
    (chat / "README.md").write_text("I am the chat model.")
    main(
        [
            "chat-vector",
            str(talking / "adapted"),
            "--base",
            str(talking / "base"),
            "--chat",
            str(chat),
            "-o",
            str(tmp_path / "sum"),
        ]
    )
    tokenizer, prompt = rendered(tmp_path / "sum")
    assert prompt == f"<|im_start|>{' '.join(KOREAN)}<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer(prompt)["input_ids"] == AutoTokenizer.from_pretrained(talking / "chat")(prompt)["input_ids"]
    assert "added to" in capsys.readouterr().out
    assert (tmp_path / "sum" / "README_base.md").read_text() == "I am the chat model."
    card = (tmp_path / "sum" / "README.md").read_text()
    assert "adapted with the chat vector of chat." in card and str(tmp_path) not in card


@pytest.mark.parametrize("recorded", [True, False], ids=["by elo vocab", "by another tool"])
def test_new_pieces_and_the_template_go_together(talking, recorded, tmp_path):
    adapted = shutil.copytree(talking / "extended", tmp_path / "adapted")
    if not recorded:
        edit_config(adapted, **{VOCABULARY_KEY: None})
    chat_vector(adapted, talking / "base", talking / "chat", output=tmp_path / "sum")
    tokenizer, prompt = rendered(tmp_path / "sum")
    ours = AutoTokenizer.from_pretrained(talking / "extended")
    ids = tokenizer(prompt)["input_ids"]
    assert ids == ours(prompt)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == ours.convert_tokens_to_ids("<|im_end|>")
    assert len(ids) < len(AutoTokenizer.from_pretrained(talking / "chat")(prompt)["input_ids"])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
        assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()


def test_a_token_of_the_chat_model_that_is_another_piece_now_is_refused(talking, tmp_path):
    chat = shutil.copytree(talking / "chat", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(chat)
    with pytest.raises(EloError, match=r"at id \d+, where .* has '<\|tool\|>'"):
        chat_vector(talking / "extended", talking / "base", chat, output=tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: detach_checkpoint(root / "base", "0,1", root / "adapted", overwrite=True), "detached"),
        (lambda root: llama(layers=3).save_pretrained(root / "chat"), "has model.layers.3.*but .*chat does not"),
        (lambda root: llama(layers=5).save_pretrained(root / "base"), "base: has model.layers.4"),
        (lambda root: tiny_model(tiny_config("gpt2")).save_pretrained(root / "chat"), "has model type gpt2"),
        (lambda root: shutil.rmtree(root / "base"), "no such folder"),
    ],
    ids=["detached", "fewer layers", "more layers", "another family", "missing"],
)
def test_what_does_not_belong_together_is_refused(spoil, said, tmp_path):
    folders = three(tmp_path)
    spoil(tmp_path)
    with pytest.raises(EloError, match=said):
        chat_vector(*folders, output=tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("left_out", [[], ["embedding", "head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_only_the_chat_model_has_are_the_chat_models(tied, left_out, tmp_path):
    adapted, base, chat = three(tmp_path, torch.bfloat16, tied=tied)
    resized(chat, 70, tied=tied)
    record = add(adapted, base, chat, tmp_path / "sum", leave_out=left_out)
    assert record["rows_added"] == 6
    assert "vocab_size" not in record["differs"]
    ours, theirs, chats, summed = (stored(folder) for folder in (adapted, base, chat, tmp_path / "sum"))
    assert ("lm_head.weight" in summed) is not tied
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & summed.keys():
        change = 0 if left_out else chats[name][:64].double() - theirs[name].double()
        assert torch.equal(summed[name][:64], (ours[name].double() + change).to(torch.bfloat16)), name
        assert torch.equal(summed[name][64:], chats[name][64:].to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == 70


def with_two_more_tokens(talking, tmp_path):
    """Change the chat model as ChatML models made from Llama 2 or Mistral: 32000 tokens, then two more."""
    chat = shutil.copytree(talking / "chat", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    tokenizer.eos_token = "<|stop|>"
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}<|stop|>{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(chat)
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = rows + 1
    changed(model, chat, 5)
    tokenizer.save_pretrained(chat)
    return chat, rows


@pytest.mark.parametrize("left_out", [[], ["--leave-out", "embedding,head"]])
def test_a_chat_model_with_tokens_of_its_own_ends_its_turns(talking, left_out, tmp_path, caplog):
    chat, rows = with_two_more_tokens(talking, tmp_path)
    command = ["chat-vector", talking / "adapted", "--base", talking / "base", "--chat", chat, "-o", tmp_path / "sum"]
    main([str(each) for each in [*command, *left_out]])
    found, prompt = rendered(tmp_path / "sum")
    ids = found(prompt)["input_ids"]
    summed = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
    assert ids[-1] == found.eos_token_id == summed.generation_config.eos_token_id == rows + 1
    assert summed.get_input_embeddings().weight.shape[0] == rows + 2
    with torch.no_grad():
        assert torch.isfinite(summed(input_ids=torch.tensor([ids])).logits).all()
    assert not caplog.text
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": rows}))
    main([str(each) for each in [*command, *left_out, "--overwrite"]])
    assert f"eos_token is '<|stop|>' ({rows + 1}), but generation stops at {rows}" in caplog.text


@pytest.mark.parametrize("left_out", [[], ["embedding", "head"]])
def test_the_advice_for_an_extended_vocabulary_and_a_chat_model_with_more_tokens_works(talking, left_out, tmp_path):
    """The error's advice: one tokenizer with both, given to the base before it is adapted."""
    chat, rows = with_two_more_tokens(talking, tmp_path)
    for record in ({}, {VOCABULARY_KEY: None}):
        edit_config(extended := shutil.copytree(talking / "extended", tmp_path / f"extended{len(record)}"), **record)
        with pytest.raises(EloError, match=rf"at id {rows}, where .* has '<\|turn\|>'.*--tokenizer BOTH"):
            chat_vector(extended, talking / "base", chat, output=tmp_path / "sum", leave_out=left_out)
    corpora = talking / "ko.jsonl", talking / "en.jsonl"
    extend_vocabulary(chat, *corpora, output=tmp_path / "both", pieces=30, pad_to_multiple_of=8)
    extend_vocabulary(talking / "base", (), (), output=tmp_path / "base2", tokenizer=tmp_path / "both")
    adapted = shutil.copytree(tmp_path / "base2", tmp_path / "adapted")
    changed(AutoModelForCausalLM.from_pretrained(tmp_path / "base2"), adapted, 6)
    record = chat_vector(adapted, talking / "base", chat, output=tmp_path / "sum", leave_out=left_out)
    ours, theirs, chats, summed = (stored(each) for each in (adapted, talking / "base", chat, tmp_path / "sum"))
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & summed.keys():
        change = 0 if left_out else chats[name][:rows].double() - theirs[name][:rows].double()
        assert torch.equal(summed[name][:rows], (ours[name][:rows].double() + change).float()), name
        assert torch.equal(summed[name][rows : rows + 2], chats[name][rows : rows + 2]), name
        assert torch.equal(summed[name][rows + 2 :], ours[name][rows + 2 :]), name
        assert record["rows_kept"] == (0 if left_out else len(ours[name]) - rows - 2)
    found, prompt = rendered(tmp_path / "sum")
    ids = found(prompt)["input_ids"]
    assert ids[-1] == found.eos_token_id == rows + 1
    assert len(ids) < len(AutoTokenizer.from_pretrained(chat)(prompt)["input_ids"])


def test_only_parts_of_the_model_are_left_out(tmp_path):
    adapted, base, chat = three(tmp_path)
    with pytest.raises(EloError, match="choose among embedding, norm, head"):
        add(adapted, base, chat, tmp_path / "other", leave_out=["lm_head"])
