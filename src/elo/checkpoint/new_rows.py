"""Which rows of embedding and head `elo vocab` added: an extra key of config.json."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from elo.errors import EloError
from elo.surgery.layer_config import text_config_of

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


def read_new_rows(config: PretrainedConfig) -> NewRows | None:
    """What `extend_checkpoint` wrote into a model's configuration; None where the vocabulary was not extended.

    Raises:
        EloError: the record is damaged.
    """
    value = getattr(config, VOCABULARY_KEY, None)
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
    """The first new row of a tensor of this group (elo.checkpoint.architecture.group_of); None where it has none."""
    rows = read_new_rows(config) if group in ("embedding", "head") else None
    return None if rows is None else rows.start
