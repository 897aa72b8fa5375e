"""Which rows of embedding and head `elo vocab` added: an extra key of config.json."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from elo.checkpoint.model_config import text_config_of
from elo.errors import EloError

VOCABULARY_KEY = "elo_vocabulary"
"""Extra key of config.json that says which rows are new; it survives other tools' save_pretrained."""


@dataclass(frozen=True)
class NewRows:
    """Which rows of a model's embedding and head belong to tokens that were added to its vocabulary.

    Attributes:
        start: the first new row; every row before it is the base's.
        stop: one more than the last new token's; rows from here on belong to no token.
    """

    start: int
    stop: int


def record_of(config: PretrainedConfig) -> Any:
    """What `extend_checkpoint` wrote into a configuration or, of a wrapper, its decoder's part; None without."""
    parts = (config, text_config_of(config))
    return next((found for part in parts if (found := getattr(part, VOCABULARY_KEY, None)) is not None), None)


def share_record(whole: PretrainedConfig, part: PretrainedConfig) -> None:
    """Give the configuration of a wrapper's decoder the record of the wrapper, which loading it alone drops."""
    record = record_of(whole)
    if record is not None and record_of(part) is None:
        setattr(part, VOCABULARY_KEY, record)


def read_new_rows(config: PretrainedConfig) -> NewRows | None:
    """What `extend_checkpoint` wrote into a model's configuration; None where the vocabulary was not extended.

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
    """The first new row of a tensor of this group (elo.checkpoint.naming.NameMap.group); None where it has none."""
    rows = read_new_rows(config) if group in ("embedding", "head") else None
    return None if rows is None else rows.start
