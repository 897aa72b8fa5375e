"""Read and check configuration files, with one error message per mistake, before anything is loaded."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from elo.config.chat import ChatConfig
from elo.config.comparison import CompareConfig
from elo.config.other_tools import AXOLOTL, SAME
from elo.config.schema import EvaluationConfig, RunConfig
from elo.errors import EloError
from elo.evaluate.measures import MEASURES, Measure
from elo.methods import METHODS, Method

M = TypeVar("M", bound=BaseModel)

# Keys of other tools, for the hint of an error message.
_ELSEWHERE = {
    **SAME,
    **{AXOLOTL[name]: key for name, key in SAME.items() if name in AXOLOTL},
    "model_id": "model",
    "sequence_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "datasets": "data.corpora",
    "dataset": "data.corpora",
    "text_field": "text_column",
    "dataset_text_field": "text_column",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "gradient_checkpointing": "training.activation_checkpointing",
    "batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "num_train_epochs": "tokens",
    "num_epochs": "tokens",
    "max_steps": "tokens",
    "sample_packing": "data.packing",
    "split_special_tokens": "data.split_special_tokens",
    "warmup_ratio": "training.warmup_steps",
    "flash_attention": "training.attn_implementation",
    "modules_to_save": "method.also_train",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    # Keys of ELO 0.1.
    "elo_pretraining": "training",
    "layer_alignment": "training.phases.layer_alignment",
    "full": "training",
    "elo": "method",
    "lora": "method",
    "lisa": "method",
    "stand_in": "method.middle",
    "also_train": "method.also_train",
    "embedding_rows": "method.embedding_rows",
    "alignment": "method.alignment",
    "controls": "contestants of a comparison (elo compare)",
    "loss_spike": "max_loss_spike_nats",
    "max_tokens": "evaluation.max_bytes",
}


_MAX_VALUES = 100_000


def load_comparison(path: str | Path | dict[str, Any], overrides: list[str] | None = None) -> CompareConfig:
    """Read the configuration of a comparison and apply overrides, like `load_config`.

    Raises:
        EloError: for the same reasons as `load_config`.
    """
    return _load(CompareConfig, path, overrides)


def contestant_run(
    config: CompareConfig, name: str, folder: Path, *, learning_rates: dict[str, float], tokens: int, seed: int
) -> RunConfig:
    """Return the run of one contestant: the shared run, its changes, and the learning rates by phase.

    Raises:
        EloError: the run's configuration or the changes are invalid.
    """
    value = _plain_copy(read_yaml(Path(config.run)) if isinstance(config.run, str) else config.run)
    where = config.run if isinstance(config.run, str) else "run"
    contestant = config.contestants[name]
    base = {"model": contestant.model, "tokenizer": contestant.tokenizer} if contestant.model else {}
    changes = {
        **contestant.changes,
        **base,
        **{f"training.phases.{phase}.learning_rate": rate for phase, rate in learning_rates.items()},
        "method": config.method(name).model_dump(mode="json"),
        "training.evaluations": 0,
        "output": str(folder),
        "tokens": tokens,
        "seed": seed,
    }
    for key, item in changes.items():
        put(value, key, item, f"contestants.{name}.changes")
    return _validated(RunConfig, value, f"{where}, as contestant {name!r} changes it")


def load_config(path: str | Path | dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """Read a configuration file (or a dict of the same form) and apply `key.path=value` overrides.

    Raises:
        EloError: the file cannot be read, or a key or value is invalid.
    """
    return _load(RunConfig, path, overrides)


def load_chat(value: dict[str, Any], overrides: list[str] | None = None) -> ChatConfig:
    """Read a section `chat` and apply overrides, like `load_config`.

    Raises:
        EloError: for the same reasons as `load_config`.
    """
    return _load(ChatConfig, value, overrides)


def load_measures(overrides: list[str]) -> list[Measure]:
    """Return the measures that `key.path=value` overrides of an empty section `evaluation` configure.

    Raises:
        EloError: a key is not that of a measure, or for the same reasons as `load_config`.
    """
    config = _load(EvaluationConfig, {}, overrides)
    for key in sorted(config.model_fields_set - MEASURES.keys()):
        raise EloError(f"--set {key}: is not a measure; choose among {', '.join(MEASURES)}, or use the other options")
    return config.measures


def _load(model: type[M], path: str | Path | dict[str, Any], overrides: list[str] | None) -> M:
    if isinstance(path, dict):
        name, value = "configuration", path
    else:
        name, value = str(path), read_yaml(Path(path))
    try:
        value = _plain_copy(value)
    except RecursionError:
        raise EloError(f"{name}: is nested too deeply or refers to itself; write the values out") from None
    except OverflowError:
        raise EloError(f"{name}: its aliases expand to more than {_MAX_VALUES:,} values; write them out") from None
    for override in overrides or []:
        _override(value, override)
    return _validated(model, value, name)


def _validated(model: type[M], value: dict[str, Any], name: str) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise EloError(f"{name}: " + "; ".join(_explain(each, model) for each in error.errors())) from None


class _UniqueKeys(yaml.SafeLoader):
    """Raise an error for a duplicate key, of which YAML would silently take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} appears twice in one section", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        EloError: the file cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise EloError(f"{path}: no such configuration file; check the path") from None
    except IsADirectoryError:
        raise EloError(f"{path}: is a folder; give the path of the configuration file (YAML)") from None
    except PermissionError:
        raise EloError(f"{path}: permission denied; make the file readable") from None
    except UnicodeDecodeError as error:
        raise EloError(f"{path}: is not UTF-8 text (byte {error.start}); give a configuration file (YAML)") from None
    except yaml.YAMLError as error:
        raise EloError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise EloError(f"{path}: is nested too deeply; give a configuration file (YAML)") from None
    except ValueError as error:  # a date such as 2026-99-99, a number of thousands of digits
        raise EloError(f"{path}: has a value that YAML cannot convert ({error}); quote it") from None
    if not isinstance(value, dict):
        raise EloError(f"{path}: contains {type(value).__name__}; write a mapping of keys to values")
    return value


def _plain_copy(value: Any, seen: list[None] | None = None) -> Any:
    """Return a copy without shared objects. Ten lines of YAML aliases can expand to a billion values."""
    seen = [] if seen is None else seen
    seen.append(None)
    if len(seen) > _MAX_VALUES:
        raise OverflowError
    if isinstance(value, str) and "\0" in value:
        raise EloError(f"configuration: {_short(value)} contains a null byte; remove it")
    if isinstance(value, dict):
        return {key: _plain_copy(item, seen) for key, item in value.items()}
    return [_plain_copy(item, seen) for item in value] if isinstance(value, list | tuple) else value


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise EloError(f"--set {override!r}: write key.path=value, for example --set training.learning_rate=2e-4")
    try:
        parsed = _plain_copy(yaml.load(text, _UniqueKeys))
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None)
        raise EloError(f"--set {_short(override)}: the value is not YAML ({why}); quote it") from None
    except EloError:
        raise
    except ValueError as error:
        raise EloError(f"--set {_short(override)}: YAML cannot convert the value ({error}); quote it") from None
    except (RecursionError, OverflowError):
        raise EloError(f"--set {_short(override)}: the value is nested too deeply or too large; simplify it") from None
    put(value, key.strip(), parsed, f"--set {override!r}")


def put(value: dict[str, Any], key: str, item: Any, where: str) -> None:
    """Set `key`, a dotted path, in a nested dict.

    Raises:
        EloError: a part of the path is a value; the message starts with `where`.
    """
    *parents, last = key.split(".")
    here: Any = value
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise EloError(f"{where}: {parent!r} is a value, not a section; remove what follows it in the key")
    here[last] = item


def _explain(error: Any, model: type[BaseModel]) -> str:
    """Describe one pydantic error: the key, what was found, and what to write."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = _known_keys(model, error["loc"][:-1])
        elsewhere = _ELSEWHERE.get(key)
        close = [elsewhere] if elsewhere else difflib.get_close_matches(key, known, 1, 0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(sorted(known))}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        name = str(error["ctx"]["tag"])
        known = re.findall(r"'(\w+)'", str(error["ctx"]["expected_tags"]))
        close = difflib.get_close_matches(name, known, 1, 0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        return f"{path}: there is no method {name!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {path!r}; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error["input"], bool):
        message += " (YAML reads bare no, yes, on and off as true or false: quote it)"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if error["type"] == "float_type" or error["type"].startswith(("float_parsing", "int_parsing", "int_type")):
        message += _number_hint(error["input"])
    return f"{path}: {message[:1].lower()}{message[1:]}, got {_short(error['input'])}"


def _number_hint(value: Any) -> str:
    # YAML 1.1 reads 1e-4 (no dot) as text, and pydantic converts that. Text that still fails is no number at all.
    return " (write a plain number)" if isinstance(value, str) else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Return the keys of the section at `location`."""
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is not None:
            model = _section_of(field.annotation) or model
        elif part in METHODS and issubclass(model, Method):
            model = METHODS[part]
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    """Return the section class inside an annotation such as dict[str, list[CorpusConfig]]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None
