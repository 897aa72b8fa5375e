"""results.json as read back: every key with its unit. docs/results.md is the prose of it.

Keys that are not listed are ignored, so that later versions can add some; keys that are listed are checked.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elo.errors import EloError, UnfinishedError
from elo.store.files import read_json

FILE_NAME = "results.json"
SCHEMA = 1

Language = str
BitsPerByteOf = dict[Language, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Checked keys; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ClozeGroup(Record):
    accuracy: float = Field(ge=0, le=1)
    """Share of the group's items answered rightly."""
    items: Count


class Cloze(Record):
    accuracy: float = Field(ge=0, le=1)
    """Share of items answered rightly."""
    items: Count
    chance: float = Field(ge=0, le=1)
    """Accuracy of guessing."""
    groups: dict[str, ClozeGroup] = {}
    """By the `group` of the items; items without one are in none."""


class Sample(Record):
    language: Language
    prompt: str
    text: str
    """The continuation, without the prompt."""


class Generation(Record):
    characters: Count
    """Written as samples, greedily, one prompt at a time."""
    seconds: Seconds
    """That it took."""

    @property
    def rate(self) -> float | None:
        """Characters a second."""
        return self.characters / self.seconds if self.seconds else None


class Measurement(Record):
    """What a model can do: the base, or a method's final model."""

    bpb: BitsPerByteOf = {}
    """Bits per byte of held-out text by language; lower is better."""
    cloze: dict[Language, Cloze] = {}
    samples: tuple[Sample, ...] = ()
    generation: dict[Language, Generation] = {}


class BeforeAlignment(Record):
    """The attached model before layer alignment."""

    bpb: BitsPerByteOf = {}


class Stage(Record):
    name: str
    """detach, elo_pretraining, attach, layer_alignment, full, ..."""
    seconds: Seconds
    """Wall time of the stage, evaluation not counted."""
    tokens: Count = 0
    """Tokens trained on in this stage."""
    tokens_per_second: Seconds | None = None
    peak_memory_bytes: Count | None = None


class Loss(Record):
    """One point of a training curve; `tokens` and `seconds` count from the start of the method, over its stages."""

    stage: str
    tokens: Count
    seconds: Seconds
    loss: float = Field(allow_inf_nan=False)
    """Mean nats a token since the point before."""


class Evaluation(Record):
    """One measurement during training; `tokens` and `seconds` as in `Loss`.

    In the stage `elo_pretraining` it is the detached model alone that is measured.
    """

    stage: str
    tokens: Count
    seconds: Seconds
    bpb: BitsPerByteOf


class Method(Measurement):
    """One way of training, from the same base on the same data."""

    name: str
    label: str | None = None
    note: str | None = None
    tokens: Count
    wall_seconds: Seconds
    """Wall time of the training stages, evaluation not counted."""
    peak_memory_bytes: Count | None = None
    stages: tuple[Stage, ...] = ()
    before_alignment: BeforeAlignment | None = None
    losses: tuple[Loss, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def title(self) -> str:
        return self.label or self.name

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def detached_stage(self) -> str | None:
        """The stage in which a detached model trains; None where nothing was detached."""
        return "elo_pretraining" if self.stage("attach") else None


class NewRows(Record):
    start: Count
    stop: Count

    @model_validator(mode="after")
    def _in_order(self) -> "NewRows":
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} lies before start {self.start}")
        return self

    def __len__(self) -> int:
        return self.stop - self.start


class Vocabulary(Record):
    """What `elo vocab extend` did to the base model."""

    rows: NewRows
    """Ids of the new tokens."""
    target_bytes_per_token: tuple[float, float] | None = None
    """Before and after."""
    source_bytes_per_token: tuple[float, float] | None = None


class Model(Record):
    name: str
    parameters: Count | None = None
    num_layers: Count | None = None
    layers: tuple[int, ...] = ()
    """0-based indices of the layers that ELO trains."""
    trainable_parameters: Count | None = None
    """Parameters that train in ELO pretraining."""
    vocabulary: Vocabulary | None = None


class Languages(Record):
    target: Language
    source: Language


class TextSize(Record):
    tokens: Count | None = None
    bytes: Count | None = None
    documents: Count | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """What a token stands for: the more, the less there is to compute."""
        return self.bytes / self.tokens if self.bytes and self.tokens else None


class Data(Record):
    train: dict[Language, TextSize] = {}
    heldout: dict[Language, TextSize] = {}
    replay_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    sequence_length: Count | None = None


class Setting(Record):
    """What was run, on what, with what: the head of a results file."""

    schema_version: Literal[1] = Field(alias="schema")
    title: str = "ELO"
    created: str | None = None
    command: str | None = None
    model: Model
    languages: Languages
    hardware: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    data: Data = Data()
    config: dict[str, Any] = {}


class Results(Setting):
    seed: int | None = None
    base: Measurement
    methods: tuple[Method, ...] = Field(min_length=1)
    """The run's own method first, then the controls."""

    @model_validator(mode="after")
    def _methods_differ(self) -> "Results":
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods: names must differ, got {', '.join(names)}")
        return self

    def method(self, name: str) -> Method | None:
        return next((method for method in self.methods if method.name == name), None)


def read_results(source: dict[str, Any] | str | Path) -> Results:
    """Read and check results from memory, a file, or the run folder that holds `results.json`.

    Raises:
        UnfinishedError: there is no such file, or it is not JSON.
        EloError: it is something else than the results of a run; the message names key and value.
    """
    name, value = read_source(source, FILE_NAME)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "evaluation":
        raise EloError(f"{name}: holds what `elo evaluate` measured of one model; a report needs a run's {FILE_NAME}")
    if kind == "comparison":
        raise EloError(f"{name}: holds a comparison of several methods, not the results of one run")
    return checked(Results, name, value, SCHEMA, "the results of a run")


def read_source(source: dict[str, Any] | str | Path, file_name: str) -> tuple[str, Any]:
    """What a results file holds, unchecked, and what to call it in messages.

    Args:
        source: the content itself, a file, or a run folder that holds `file_name`.

    Raises:
        UnfinishedError: there is no such file, or it is not JSON.
    """
    if isinstance(source, dict):
        return file_name.removesuffix(".json"), source
    path = Path(source)
    if path.is_dir():
        path = path / file_name
        if not path.exists():
            raise UnfinishedError(f"{path}: no such file; give a run folder whose run has ended, or a {file_name}")
    return str(path), read_json(path)


Checked = TypeVar("Checked", bound=Record)


def checked(record: type[Checked], name: str, value: Any, schema: int, what: str) -> Checked:
    """`value` as `record`.

    Raises:
        EloError: `value` is of a later schema or not `what`; the message names the key and its value.
    """
    if isinstance(value, dict) and isinstance(value.get("schema"), int) and value["schema"] > schema:
        raise EloError(f"{name}: schema {value['schema']} is newer than this version reads ({schema}); update elo")
    try:
        return record.model_validate(value)
    except ValidationError as error:
        raise EloError(f"{name}: not {what}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first, more = error.errors()[0], error.error_count() - 1
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"] or first["type"] != "value_error":
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        got = "" if first["type"] == "missing" else f", got {_short(first['input'])}"
        message = f"{where}: {message}{got}"
    return message + (f" (and {more} more)" if more else "")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
