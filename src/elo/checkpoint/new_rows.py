"""Record in config.json which rows of embedding and head `elo vocab` added."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from elo.checkpoint.model_config import text_config_of
from elo.errors import EloError

VOCABULARY_KEY = "elo_vocabulary"
"""Extra key of config.json that records which rows are new; other tools' save_pretrained keeps it."""


@dataclass(frozen=True)
class NewRows:
    """Rows of a model's embedding and head that belong to tokens added to its vocabulary.

    Attributes:
        start: first new row; every row before it comes from the base.
        stop: one past the last new token's row; rows from here on belong to no token.
    """

    start: int
    stop: int


def record_of(config: PretrainedConfig) -> Any:
    """Return the record that `extend_checkpoint` wrote into a configuration or its decoder's part, or None."""
    parts = (config, text_config_of(config))
    return next((found for part in parts if (found := getattr(part, VOCABULARY_KEY, None)) is not None), None)


def share_record(whole: PretrainedConfig, part: PretrainedConfig) -> None:
    """Copy the record of a wrapper's configuration to its decoder's; loading the decoder alone drops it."""
    record = record_of(whole)
    if record is not None and record_of(part) is None:
        setattr(part, VOCABULARY_KEY, record)


def read_new_rows(config: PretrainedConfig) -> NewRows | None:
    """Read which rows `extend_checkpoint` added; None if the vocabulary was not extended.

    Raises:
        EloError: the record is damaged.
    """
    value = record_of(config)
    if value is None:
        return None
    rows = value.get("rows") if isinstance(value, dict) else None
    size = text_config_of(config).vocab_size
    if (
        not isinstance(rows, dict)
        or set(rows) != {"start", "stop"}
        or not all(type(number) is int for number in rows.values())
        or not 0 < rows["start"] < rows["stop"] <= size
    ):
        raise EloError(
            f"{config.name_or_path or 'the model'}: its {VOCABULARY_KEY!r} record is damaged or does not fit its "
            f"{size} embedding rows; extend the base's vocabulary again"
        )
    return NewRows(**rows)


def first_new_row_of(config: PretrainedConfig, group: str | None) -> int | None:
    """Return the first new row of a tensor in `group` (elo.checkpoint.naming.NameMap.group), or None."""
    rows = read_new_rows(config) if group in ("embedding", "head") else None
    return None if rows is None else rows.start
