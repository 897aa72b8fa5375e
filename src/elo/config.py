"""The configuration of a run: one YAML file, checked whole before anything is loaded."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from elo.errors import EloError
from elo.layers import DEFAULT_LAYERS
from elo.training.settings import EloOptions, LisaSettings, LoraSettings, TrainingSettings

_TRAINING_SECTIONS = ("elo_pretraining", "layer_alignment", "full", "lora", "lisa")
# Spellings of other tools, answered with ours.
_ELSEWHERE = {
    "base_model": "model",
    "model_name_or_path": "model",
    "model_id": "model",
    "output_dir": "output",
    "cutoff_len": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "sequence_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "datasets": "data.corpora",
    "dataset": "data.corpora",
    "text_field": "text_column",
    "dataset_text_field": "text_column",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "gradient_checkpointing": "activation_checkpointing",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "tokens_per_step",
    "num_train_epochs": "tokens",
    "num_epochs": "tokens",
    "max_steps": "tokens",
    "sample_packing": "data.packing",
    "split_special_tokens": "data.split_special_tokens",
    "warmup_ratio": "warmup_steps",
    "flash_attention": "attn_implementation",
    "alignment": "layer_alignment",
    "pretraining": "elo_pretraining",
    "also_train": "elo.also_train",
    "include": "elo.also_train",
    "bridge": "elo.stand_in",
    "train_embeddings": "elo.embedding_rows",
    "embedding_lr": "embedding_learning_rate",
    "modules_to_save": "lora.also_train",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
}

_MAX_VALUES = 100_000

MethodName = Literal["elo", "elo_paper", "full", "embeddings_first", "align_only", "frozen", "lora", "lisa"]
Control = Literal[MethodName, "full_at_wall_time"]


M = TypeVar("M", bound=BaseModel)
Rate = Annotated[float, Field(gt=0, le=1)]


def _whole_number(value: Any) -> Any:
    """1e9 is text to YAML 1.1, and true is 1 to Python: take the first for a number, and the second for a mistake."""
    if isinstance(value, bool):
        raise ValueError("must be a number of tokens, not true or false")
    if isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CorpusConfig(_Section):
    """One corpus; written as a bare string it is its path."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .parquet, .txt, each also .gz or .zst), a folder, a glob, or a Hugging Face dataset id."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Relative number of passes over this corpus among those of its language."""
    text_column: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(_Section):
    """What is trained on."""

    target: str
    """Key of the target language in `corpora`."""
    source: str
    """Key of the source language in `corpora`, replayed and watched for forgetting."""
    corpora: dict[str, list[CorpusConfig]]
    heldout: dict[str, CorpusConfig] = Field(default_factory=dict)
    """Text to measure on, by language. A language without it has `heldout_share` of its documents cut out."""
    heldout_share: float = Field(0.005, gt=0, lt=0.5)
    replay_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of training tokens in the source language."""
    sequence_length: int = Field(2048, ge=8, le=1 << 24)
    """Tokens in a packed row."""
    packing: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    """What a document that cannot be read does: `stop` the run, or be left out and counted (`skip`)."""
    split_special_tokens: bool = True
    """Whether special tokens spelled in a document (`<|endoftext|>`) are tokenised as text; otherwise they become the
    tokens."""
    allow_lost_text: bool = False
    """Accept text of which the tokenizer loses more than 5 %, by unknown tokens or dropped characters."""
    workers: int | None = Field(None, ge=1, le=4096)
    """Processes that tokenise; by default chosen by the number of cores."""

    @field_validator("corpora", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item if isinstance(item, list) else [item] for name, item in value.items()}
        return value

    @model_validator(mode="after")
    def _languages(self) -> "DataConfig":
        for language in (*self.corpora, *self.heldout):
            if not language.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"language name {language!r} may hold letters, digits, - and _ alone")
        if self.target == self.source:
            raise ValueError(f"target and source are both {self.target!r}; they must be two languages")
        for role in ("target", "source"):
            language = getattr(self, role)
            needed = role == "target" or self.replay_ratio > 0
            if needed and not self.corpora.get(language):
                raise ValueError(
                    f"{role}: {language!r} has no corpus; corpora holds {', '.join(self.corpora) or 'none'}"
                )
        unknown = [language for language in self.heldout if language not in (self.target, self.source)]
        unknown += [language for language in self.corpora if language not in (self.target, self.source)]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is neither the target {self.target!r} nor the source {self.source!r} language"
            )
        return self


class LayerAlignmentConfig(TrainingSettings):
    """The brief full fine-tune of the whole model."""

    share: float = Field(0.1, ge=0, lt=1)
    """Share of the run's tokens, which ELO pretraining does not see."""


class EvaluationConfig(_Section):
    """What is measured before and after."""

    max_tokens: int | None = Field(100_000, gt=0)
    """Held-out tokens a language, in whole documents, during training as well; null takes all."""
    cloze: dict[str, str] = Field(default_factory=dict)
    """Cloze items (.jsonl) by language."""
    prompts: dict[str, list[str]] = Field(default_factory=dict)
    """Prompts by language, for samples before and after."""
    max_new_tokens: int = Field(48, gt=0)


class RunConfig(_Section):
    """A whole run."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face checkpoint, or a hub id."""
    output: str = Field(min_length=1)
    """Run folder: every artefact of the run is in it."""
    data: DataConfig
    method: MethodName = "elo"
    layers: str | int | list[int] = DEFAULT_LAYERS
    tokens: Annotated[int | None, BeforeValidator(_whole_number)] = Field(None, gt=0, le=10**15)
    """The run's token budget; null: one pass over the target language."""
    seed: int = Field(42, ge=0, lt=2**32)
    tokenizer: str | None = Field(None, min_length=1)
    """Folder or hub id, if it is not the model's."""
    elo: EloOptions = EloOptions()
    elo_pretraining: TrainingSettings = TrainingSettings()
    """Training arguments of ELO pretraining."""
    layer_alignment: LayerAlignmentConfig = LayerAlignmentConfig()
    full: TrainingSettings = TrainingSettings()
    """Training arguments of full CPT and the frozen middle."""
    lora: LoraSettings = LoraSettings()
    lisa: LisaSettings = LisaSettings()
    evaluation: EvaluationConfig = EvaluationConfig()
    controls: tuple[Control, ...] = ()
    """Other methods to run beside, on the same data, for the comparison in the report."""
    trust_remote_code: bool = False
    """Run code that ships with the checkpoint. Only for checkpoints you trust."""
    title: str | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which Python takes for 1
            raise ValueError("write layers such as first:1,last:1, got " + repr(value))
        return value

    @model_validator(mode="after")
    def _controls(self) -> "RunConfig":
        if "full_at_wall_time" in self.controls and (self.method == "full" or "full" not in self.controls):
            raise ValueError(
                "controls: full_at_wall_time takes its budget from the wall time of the run's own method and from the "
                "rate of full, so it needs a method other than full, and full among the controls"
            )
        twice = [name for index, name in enumerate(self.controls) if name in self.controls[:index]]
        if twice:
            raise ValueError(f"controls: {twice[0]!r} stands there twice")
        if self.method in self.controls:
            raise ValueError(f"controls: {self.method!r} is the run's own method")
        return self


class Contestant(_Section):
    """One way of adapting that takes part in a comparison."""

    method: MethodName | None = None
    """By default the contestant's name."""
    label: str | None = None
    changes: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run that this contestant has otherwise, as key.path: value."""
    learning_rates: list[Rate] | dict[str, list[Rate]] | None = None
    """Rates to try, for all its phases or by section; by default those of the comparison."""


class Budget(_Section):
    """What every contestant may spend: tokens, or wall time in training."""

    tokens: Annotated[int | None, BeforeValidator(_whole_number)] = Field(None, gt=0, le=10**15)
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.tokens is None) == (self.seconds is None):
            raise ValueError("a budget is either tokens or seconds: write one of the two")
        return self

    @property
    def name(self) -> str:
        return f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.seconds:g} s"


class CompareConfig(_Section):
    """A comparison of methods on one base, one corpus and one held-out text."""

    run: str | dict[str, Any]
    """What all contestants share: the configuration of a run, or its file."""
    output: str = Field(min_length=1)
    """Folder of the comparison."""
    contestants: dict[str, Contestant] = Field(min_length=1)
    budgets: list[Budget] = Field(min_length=1)
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    """Of the order of rows and all else that is drawn; learning rates are tuned with the first."""
    learning_rates: list[Rate] = Field([1e-4, 3e-4, 1e-3], min_length=1)
    """Rates that are tried for each phase of each contestant, on the budget itself. Where the lowest or the highest is
    best, the next beyond is tried too."""
    source_weight: float = Field(0.0, ge=0, le=10)
    """Rates are chosen by target bits per byte + this x source bits per byte, on validation text."""
    title: str | None = None

    @field_validator("contestants", mode="before")
    @classmethod
    def _empty_is_plain(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {str(name): {} for name in value}
        return {name: item or {} for name, item in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known(self) -> "CompareConfig":
        names = get_args(MethodName)
        for name, contestant in self.contestants.items():
            if contestant.method is None and name not in names:
                raise ValueError(f"contestants.{name}: is not a method; write method: one of {', '.join(names)}")
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(f"contestants: name {name!r} may hold letters, digits, -, _ and . alone")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds one twice")
        return self

    def method(self, name: str) -> str:
        """The method of contestant `name`."""
        return self.contestants[name].method or name


def load_comparison(path: str | Path | dict[str, Any], overrides: list[str] | None = None) -> CompareConfig:
    """Read the configuration of a comparison; as `load_config`.

    Raises:
        EloError: as `load_config`.
    """
    return _load(CompareConfig, path, overrides)


def contestant_run(
    config: CompareConfig, name: str, folder: Path, *, learning_rates: dict[str, float], tokens: int, seed: int
) -> RunConfig:
    """The run of one contestant: what is shared, its changes, and these learning rates by section.

    Raises:
        EloError: the run's configuration or the changes are wrong.
    """
    value = _plain_copy(_read_yaml(Path(config.run)) if isinstance(config.run, str) else config.run)
    where = config.run if isinstance(config.run, str) else "run"
    contestant = config.contestants[name]
    changes = {
        **contestant.changes,
        **{f"{section}.learning_rate": rate for section, rate in learning_rates.items()},
        "method": config.method(name),
        "controls": [],
        "evaluation.cloze": {},
        "evaluation.prompts": {},
        **{f"{section}.evaluations": 0 for section in _TRAINING_SECTIONS},
        "output": str(folder),
        "tokens": tokens,
        "seed": seed,
    }
    for key, item in changes.items():
        _put(value, key, item, f"contestants.{name}.changes")
    return _validated(RunConfig, value, f"{where}, as contestant {name!r} changes it")


def load_config(path: str | Path | dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """Read a configuration file (or a dict of the same form) and apply `key.path=value` overrides.

    Raises:
        EloError: the file cannot be read, or a key or value is wrong: which, where, what was got, what to do.
    """
    return _load(RunConfig, path, overrides)


def _load(model: type[M], path: str | Path | dict[str, Any], overrides: list[str] | None) -> M:
    if isinstance(path, dict):
        name, value = "configuration", path
    else:
        name, value = str(path), _read_yaml(Path(path))
    try:
        value = _plain_copy(value)
    except RecursionError:
        raise EloError(f"{name}: is nested too deeply, or refers to itself") from None
    except OverflowError:
        raise EloError(f"{name}: its aliases stand for more than {_MAX_VALUES:,} values; write them out") from None
    for override in overrides or []:
        _override(value, override)
    return _validated(model, value, name)


def _validated(model: type[M], value: dict[str, Any], name: str) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise EloError(f"{name}: " + "; ".join(_explain(each, model) for each in error.errors())) from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice in one section", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise EloError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise EloError(f"{path}: is a folder; give the configuration file (YAML) itself") from None
    except PermissionError:
        raise EloError(f"{path}: cannot be read (permission denied)") from None
    except UnicodeDecodeError as error:
        raise EloError(f"{path}: is not UTF-8 text (byte {error.start}); is it a configuration file?") from None
    except yaml.YAMLError as error:
        raise EloError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise EloError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # a date such as 2026-99-99, a number of thousands of digits
        raise EloError(f"{path}: holds a value that YAML cannot make ({error}); quote it") from None
    if not isinstance(value, dict):
        raise EloError(f"{path}: holds {type(value).__name__}, not a mapping of keys to values")
    return value


def _plain_copy(value: Any, seen: list[None] | None = None) -> Any:
    """A copy in which nothing is shared; ten lines of YAML aliases can stand for a billion values."""
    seen = [] if seen is None else seen
    seen.append(None)
    if len(seen) > _MAX_VALUES:
        raise OverflowError
    if isinstance(value, str) and "\0" in value:
        raise EloError(f"configuration: {_short(value)} holds a null byte, which no name or path may; remove it")
    if isinstance(value, dict):
        return {key: _plain_copy(item, seen) for key, item in value.items()}
    return [_plain_copy(item, seen) for item in value] if isinstance(value, list | tuple) else value


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise EloError(
            f"--set {override!r}: write key.path=value, for example --set elo_pretraining.learning_rate=2e-4"
        )
    try:
        parsed = _plain_copy(yaml.load(text, _UniqueKeys))
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None)
        raise EloError(f"--set {_short(override)}: the value is not YAML ({why})") from None
    except EloError:
        raise
    except ValueError as error:
        raise EloError(f"--set {_short(override)}: YAML cannot make a value of it ({error}); quote it") from None
    except (RecursionError, OverflowError):
        raise EloError(f"--set {_short(override)}: the value is nested too deeply, or too large") from None
    _put(value, key.strip(), parsed, f"--set {override!r}")


def _put(value: dict[str, Any], key: str, item: Any, where: str) -> None:
    """Set `key`, a dotted path, in a nested dict."""
    *parents, last = key.split(".")
    here: Any = value
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise EloError(f"{where}: {parent!r} is a value, not a section")
    here[last] = item


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One pydantic error in words: the key, what is wrong, what was got, what to write."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = _known_keys(model, error["loc"][:-1])
        elsewhere = _ELSEWHERE.get(key)
        close = [elsewhere] if elsewhere else difflib.get_close_matches(key, known, 1, 0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(sorted(known))}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {path!r}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error["input"], bool):
        message += " (YAML reads bare no, yes, on and off as true or false: quote it)"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if error["type"] == "float_type" or error["type"].startswith(("float_parsing", "int_parsing", "int_type")):
        message += _number_hint(error["input"])
    return f"{path}: {message[:1].lower()}{message[1:]}, got {_short(error['input'])}"


def _number_hint(value: Any) -> str:
    # YAML 1.1 reads 1e-4 (no dot) as text, which pydantic turns back into a number; what still fails is something else.
    return " (write a plain number)" if isinstance(value, str) else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at `location`."""
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is not None:
            model = _section_of(field.annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    """The section class inside an annotation such as dict[str, list[CorpusConfig]]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None
