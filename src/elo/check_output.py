"""A checkpoint folder checked as a whole: weights, special ids, generation settings, tokenizer, chat templates.

Each part may be right alone and the folder still be useless, such as with an end-of-text id that has no embedding row.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from elo.checkpoint.counting import read_config
from elo.checkpoint.folder import open_folder
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.naming import load_hollow, quiet_transformers
from elo.data.tokenizer import TOKENIZER_FILES, load_with_settings
from elo.errors import EloError, UnsupportedArchitectureError, error_line
from elo.evaluate.scoring import vocabulary_size
from elo.surgery.equivalence import build_hollow_causal_lm

log = logging.getLogger(__name__)

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]


def check_output(folder: Path, inputs: Sequence[Path] = (), *, remedy: str, trust_remote_code: bool = False) -> None:
    """Load back what was written and raise EloError unless its parts fit one another.

    Args:
        folder: a checkpoint folder.
        inputs: what it was made from, where what is wrong with one of these already is to be let pass.
        remedy: what to do, for the message.
        trust_remote_code: run code that ships with the checkpoint.
    """
    known: set[str] | None = None
    for problem in problems(folder, trust_remote_code=trust_remote_code):
        if known is None:
            known = {each for source in inputs for each in problems(source, trust_remote_code=trust_remote_code)}
        if problem not in known:
            raise EloError(f"output: {problem}; {remedy}")
    if not inputs:
        _warn_of_end_of_text(folder, trust_remote_code)


def problems(folder: Path, *, trust_remote_code: bool = False) -> Iterator[str]:
    """What is wrong with a checkpoint folder: where, and what was found, without the folder's own name.

    Raises:
        EloError: it is no checkpoint that transformers loads whole.
    """

    opened = open_folder(folder, trust_remote_code)
    hollow = build_hollow_causal_lm(opened.config, trust_remote_code=trust_remote_code)
    try:
        _, report = load_hollow(type(hollow), opened.config, opened.weights.meta_state_dict())
    except UnsupportedArchitectureError:  # transformers cannot load this family without data
        pass
    else:
        if problem := report.incomplete():
            yield f"config.json: the weights do not make the model that it describes ({problem})"
    rows = vocabulary_size(hollow)
    parts = {id(part): part for part in (opened.config, text_config_of(opened.config))}.values()
    settings: list[tuple[str, Any]] = [("config.json", part) for part in parts]
    settings.append(("generation_config.json", _generation_config(folder, opened.config)))
    for name, config in settings:
        if isinstance(config, str):
            yield f"{name}: {config}"
            continue
        for key in _IDS:
            for number in _numbers(getattr(config, key, None)):
                if number >= rows:
                    yield f"{name}: {key} is {number}, but the embedding has {rows} rows"
    yield from _of_tokenizer(folder, rows, trust_remote_code)


def _warn_of_end_of_text(folder: Path, trust_remote_code: bool) -> None:
    """Warn where generation does not stop at the tokenizer's end of text."""

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer, _ = load_with_settings(folder, trust_remote_code)
    generation = _generation_config(folder, read_config(folder, trust_remote_code=trust_remote_code))
    stops = _numbers(generation.eos_token_id)
    if stops and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        log.warning(
            "warning: output: the tokenizer's eos_token is %r (%s), but generation stops at %s (eos_token_id of "
            "generation_config.json or config.json); set them to the same token",
            tokenizer.eos_token,
            tokenizer.eos_token_id,
            ", ".join(map(str, stops)),
        )


def generation_problem(folder: Path, config: Any) -> str | None:
    """Why transformers refuses to load or save a folder's generation settings; None where it does not."""
    found = _generation_config(folder, config)
    return found if isinstance(found, str) else None


def _generation_config(folder: Path, config: Any) -> Any:
    """The generation settings that transformers reads, or its reason to refuse them."""

    try:
        with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
            if (folder / "generation_config.json").exists():
                found = GenerationConfig.from_pretrained(folder)
            else:
                found = GenerationConfig.from_model_config(config)
            found.save_pretrained(scratch)
            return found
    except Exception as error:  # transformers raises ValueError, TypeError, AttributeError, OSError
        return f"transformers refuses it ({error_line(error).replace(f'{folder}/', '')})"


def _of_tokenizer(folder: Path, rows: int, trust_remote_code: bool) -> Iterator[str]:

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        settings, tokenizer = load_with_settings(folder, trust_remote_code)
        tokenizer.check_embedding(rows)
    except EloError as error:
        yield str(error).replace(f"{folder}: ", "").replace(str(folder), "of the folder")
        return
    for key in (*_IDS, "unk_token_id"):
        number = getattr(settings, key, None)
        if isinstance(number, int) and number >= rows:
            name = key.removesuffix("_id")
            token = getattr(settings, name)
            yield f"tokenizer: its {name} {token!r} has id {number}, but the embedding has {rows} rows"
    added: dict[int, Any] = tokenizer.backend.get_added_tokens_decoder()
    beyond = {token.content: number for number, token in added.items() if number >= rows}
    templates = settings.chat_template or {}
    for name, template in ({"default": templates} if isinstance(templates, str) else templates).items():
        written = template + _rendered(settings, name)
        for token, number in beyond.items():
            if token in written:
                yield f"chat template {name!r}: writes {token!r}, of id {number}, but the embedding has {rows} rows"


def _rendered(tokenizer: Any, name: str) -> str:
    """A short chat as a template writes it; empty for one that wants other messages or arguments."""
    try:
        return str(
            tokenizer.apply_chat_template(
                _CHAT,
                chat_template=tokenizer.chat_template[name] if isinstance(tokenizer.chat_template, dict) else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception:  # whatever a template raises
        return ""


def _numbers(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
