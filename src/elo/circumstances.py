"""Record the circumstances of a run or comparison in its results: command, base model, languages, machine and data."""

from pathlib import Path
from typing import Any

from elo.budget import training_shares
from elo.checkpoint.counting import footprint, read_config
from elo.checkpoint.new_rows import read_new_rows, record_of
from elo.config import RunConfig
from elo.data.shards import PreparedData
from elo.store.environment import command_line, environment


def circumstances(config: RunConfig, base: Path, data: PreparedData) -> dict[str, Any]:
    """Return the fields of `elo.report.schema.Results` that do not depend on training."""
    section = config.data
    replay_ratio, shares = training_shares(section, data)
    return {
        **environment(),
        "command": command_line(),
        "model": model_record(config, base),
        "languages": {"targets": section.targets, "sources": section.sources},
        "data": {
            **data.summary(),
            "replay_ratio": replay_ratio,
            "shares": shares,
            "sequence_length": section.sequence_length,
        },
    }


def model_record(config: RunConfig, base: Path) -> dict[str, Any]:
    """Return the fields of `elo.report.schema.Model`."""
    model_config = read_config(str(base), trust_remote_code=config.trust_remote_code)
    counted = footprint(model_config, trust_remote_code=config.trust_remote_code)
    extended = read_new_rows(model_config) is not None
    return {
        "name": config.model,
        "parameters": counted.total,
        "num_layers": counted.num_layers,
        "vocabulary_size": counted.vocab_size,
        **({"vocabulary": record_of(model_config)} if extended else {}),
    }
