"""Check that a checkpoint folder's parts match: weights, special ids, generation settings, tokenizer, chat templates.

Each part can be valid alone while the folder is unusable, for example if the end-of-text id has no embedding row.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
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
    """Load a written checkpoint and raise EloError unless its parts match.

    Args:
        folder: checkpoint folder to check.
        inputs: checkpoint folders that it was made from; problems that one of them already has are ignored.
        remedy: what to do, for the error message.
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
    """Yield a checkpoint folder's problems as `where: what was found`, without the folder's name.

    Raises:
        EloError: the folder is not a checkpoint that transformers can load.
    """
    opened = open_folder(folder, trust_remote_code)
    hollow = build_hollow_causal_lm(opened.config, trust_remote_code=trust_remote_code)
    try:
        _, report = load_hollow(type(hollow), opened.config, opened.weights.meta_state_dict())
    except UnsupportedArchitectureError:  # transformers cannot load this family without data
        pass
    else:
        if problem := report.incomplete():
            yield f"config.json: the weights do not match the model ({problem})"
    rows = vocabulary_size(hollow)
    parts = {id(part): part for part in (opened.config, text_config_of(opened.config))}.values()
    settings: list[tuple[str, Any]] = [("config.json", part) for part in parts]
    settings.append(("generation_config.json", _generation_config(folder, opened.config)))
    for name, config in settings:
        if isinstance(config, str):
            yield f"{name}: {config}"
            continue
        for key in _IDS:
            value = getattr(config, key, None)
            if value is not None and not _token_ids(value):
                yield f"{name}: {key} is {value!r}, which is not a token id"
            for number in _token_ids(value):
                if number >= rows:
                    yield f"{name}: {key} is {number}, but the embedding has {rows} rows"
    yield from _tokenizer_problems(folder, rows, trust_remote_code)


def _warn_of_end_of_text(folder: Path, trust_remote_code: bool) -> None:
    """Warn if generation does not stop at the tokenizer's end-of-text token."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer, _ = load_with_settings(folder, trust_remote_code)
    generation = _generation_config(folder, read_config(folder, trust_remote_code=trust_remote_code))
    stops = _token_ids(generation.eos_token_id)
    if stops and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        log.warning(
            "warning: output: the tokenizer's eos_token is %r (%s), but generation stops at %s (eos_token_id of "
            "generation_config.json or config.json); set them to the same token",
            tokenizer.eos_token,
            tokenizer.eos_token_id,
            ", ".join(map(str, stops)),
        )


def generation_problem(folder: Path, config: Any) -> str | None:
    """Return why transformers rejects a folder's generation settings, or None if it accepts them."""
    found = _generation_config(folder, config)
    return found if isinstance(found, str) else None


def _generation_config(folder: Path, config: Any) -> Any:
    """Return the generation settings that transformers reads, or its reason to reject them."""
    try:
        with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
            if (folder / "generation_config.json").exists():
                found = GenerationConfig.from_pretrained(folder)
            else:
                found = GenerationConfig.from_model_config(config)
            found.save_pretrained(scratch)
            return found
    except Exception as error:  # transformers raises ValueError, TypeError, AttributeError, OSError
        return f"transformers rejects it ({error_line(error).replace(f'{folder}/', '')})"


def _tokenizer_problems(folder: Path, rows: int, trust_remote_code: bool) -> Iterator[str]:
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
        try:
            written = template + _rendered(settings, name)
        except TemplateSyntaxError as error:
            yield f"chat template {name!r}: is not a valid template (line {error.lineno}: {error_line(error)})"
            continue
        for token, number in beyond.items():
            if token in written:
                yield f"chat template {name!r}: uses {token!r} (id {number}), but the embedding has {rows} rows"


def _rendered(tokenizer: Any, name: str) -> str:
    """Render a short chat with a template; empty if the template needs other messages or arguments."""
    try:
        return str(
            tokenizer.apply_chat_template(
                _CHAT,
                chat_template=tokenizer.chat_template[name] if isinstance(tokenizer.chat_template, dict) else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except TemplateSyntaxError:
        raise
    except Exception:  # a template can raise any type, also to reject these messages, which is no problem of the folder
        return ""


def _token_ids(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
