"""A checkpoint folder is checked as a whole: no id, template or tokenizer may name a row that is not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input_fixtures import assert_refused, copy_of, run_elo
from bad_input_fixtures import write_config as write_yaml
from run_fixtures import write_base, write_world
from safetensors.torch import load_file, save_file
from surgery_fixtures import edit_config
from transformers import AutoTokenizer

from elo import stages
from elo.check_output import check_output, problems
from elo.errors import EloError
from elo.run import run
from elo.surgery import on_disk
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer of as many tokens as rows, and a chat template."""
    folder = write_base(tmp_path_factory.mktemp("sound") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def generation(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def tokenizer(folder: Path, edit: Callable[[Any], Any]) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    edit(loaded)
    loaded.save_pretrained(folder)


def with_template(template: str | dict[str, str]) -> Callable[[Any], Any]:
    def edit(loaded: Any) -> None:
        loaded.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
        loaded.chat_template = template

    return edit


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BREAKS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "config eos": (lambda f: edit_config(f, eos_token_id=rows_of(f)), ("config.json: eos_token_id is",)),
    "config eos of several": (lambda f: edit_config(f, eos_token_id=[0, 9999]), ("config.json: eos_token_id is 9999",)),
    "config bos": (lambda f: edit_config(f, bos_token_id=9999), ("config.json: bos_token_id is 9999",)),
    "generation eos": (lambda f: generation(f, eos_token_id=[0, 9999]), ("generation_config.json: eos_token_id is",)),
    "generation pad": (lambda f: generation(f, pad_token_id=9999), ("generation_config.json: pad_token_id is",)),
    "generation refused": (
        lambda f: generation(f, max_new_tokens=-5),
        ("generation_config.json: transformers rejects it", "max_new_tokens"),
    ),
    "generation no JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ("generation_config.json: transformers rejects it",),
    ),
    "generation eos as text": (
        lambda f: generation(f, eos_token_id="0"),
        ("generation_config.json: eos_token_id is '0', which is not a token id",),
    ),
    "a template that is none": (
        lambda f: tokenizer(f, with_template("{% for m in messages %}{{ m.role ")),
        ("chat template 'default': is not a valid template (line 1: ",),
    ),
    "tokenizer eos": (
        lambda f: tokenizer(f, lambda t: t.add_special_tokens({"eos_token": "<|end|>"})),
        ("token ids up to", "embedding rows"),
    ),
    "tokenizer pad": (
        lambda f: tokenizer(f, lambda t: t.add_special_tokens({"pad_token": "<|pad|>"})),
        ("tokenizer: its pad_token '<|pad|>' has id",),
    ),
    "template spells a token": (
        lambda f: tokenizer(f, with_template("<|user|>{{ messages[0].content }}")),
        ("chat template 'default': uses '<|user|>'",),
    ),
    "template puts a token together": (
        lambda f: tokenizer(f, with_template("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}")),
        ("chat template 'default': uses '<|user|>'",),
    ),
    "one of several templates": (
        lambda f: tokenizer(f, with_template({"default": "{{ messages[0].content }}", "tool_use": "<|user|>"})),
        ("chat template 'tool_use': uses '<|user|>'",),
    ),
    "a tensor missing": (without_a_tensor, ("the weights do not match the model", "model.norm.weight")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_does_not_fit_is_named(name: str, sound: Path, tmp_path: Path) -> None:
    check_output(sound, remedy="...")
    broken = copy_of(sound, tmp_path / "broken")
    damage, words = BREAKS[name]
    damage(broken)
    with pytest.raises(EloError) as refusal:
        check_output(broken, (sound,), remedy="mend it")
    message = str(refusal.value)
    assert message.startswith("output: ") and message.endswith("; mend it")
    assert all(word in message for word in words), message
    check_output(broken, (copy_of(broken, tmp_path / "input"),), remedy="...")  # what was wrong before is let pass


def test_a_token_beyond_the_rows_that_nothing_writes_is_let_pass(sound: Path, tmp_path: Path) -> None:
    """Gemma 3 1B has one for images."""
    folder = copy_of(sound, tmp_path / "it")
    tokenizer(folder, lambda t: t.add_special_tokens({"additional_special_tokens": ["<image>"]}))
    assert not list(problems(folder))


def test_a_chat_vector_whose_parts_do_not_fit_is_refused_and_leaves_nothing(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = copy_of(sound, tmp_path / "chat")
    generation(chat, eos_token_id=[0, 9999])
    command = ["chat-vector", sound, "--base", sound, "--chat", chat, "-o", tmp_path / "sum"]
    assert_refused(command, ("generation_config.json: eos_token_id is 9999", "rows"), (tmp_path,), capsys)


def test_a_run_names_refused_generation_settings_before_tokenising_and_warns_of_pad_that_is_bos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = write_world(tmp_path)
    generation(tmp_path / "base", num_return_sequences=4)
    path = write_yaml(tmp_path, config)
    words = ("generation_config.json", "num_return_sequences", "correct the file or remove it")
    assert_refused(["prepare", path], words, (tmp_path,), capsys)
    (tmp_path / "base" / "generation_config.json").unlink()
    edit_config(tmp_path / "base", pad_token_id=3, bos_token_id=3)
    assert run_elo(["prepare", path], capsys)[0] == 0
    assert "pad_token_id and bos_token_id are both 3" in caplog.text


def test_a_stage_is_done_only_once_its_output_is_loaded_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_world(tmp_path)

    def damage(detached: Path, base: Path, output: Path, **keywords: Any) -> dict[str, Any]:
        record = attach_checkpoint(detached, base, output, **keywords)
        without_a_tensor(output)
        return record

    monkeypatch.setattr(stages, "attach_checkpoint", damage)
    with pytest.raises(EloError, match=r"model\.norm\.weight.*attach is not a correct checkpoint"):
        run(config, until="attach")
    monkeypatch.undo()
    record = Path(config["output"]) / "stages" / "attach.json"
    assert not record.exists()
    run(config, until="attach")
    assert record.exists()


@pytest.mark.parametrize("command", ["detach", "attach"])
def test_what_detach_and_attach_write_is_checked_before_it_appears(
    command: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copy_of(sound, tmp_path / "base")
    arguments: list[Any] = ["detach", base]
    if command == "attach":
        detach_checkpoint(base, "0,-1", tmp_path / "detached")
        arguments = ["attach", tmp_path / "detached", "--base", base]
    copy = on_disk.copy_side_files

    def break_ids(source: Path, folder: Path, **keywords: Any) -> None:  # as a fault of ours might
        copy(source, folder, **keywords)
        generation(folder, eos_token_id=9999)

    monkeypatch.setattr(on_disk, "copy_side_files", break_ids)
    words = ("generation_config.json: eos_token_id is 9999", "nothing was written")
    assert_refused([*arguments, "-o", tmp_path / "out"], words, (tmp_path,), capsys)
    generation(base, eos_token_id=9999)  # what was wrong before is accepted
    assert run_elo([*arguments, "-o", tmp_path / "out"], capsys)[0] == 0
