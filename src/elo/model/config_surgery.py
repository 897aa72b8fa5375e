"""A model's configuration after layers were taken out: lists selected, index sets renumbered, thresholds recounted."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from elo.errors import UnsupportedArchitectureError
from elo.model import quirks


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the decoder (itself, or for example its `text_config`)."""
    return config.get_text_config(decoder=True)


def num_layers_of(config: PretrainedConfig) -> int:
    """Number of decoder layers.

    Raises:
        UnsupportedArchitectureError: the configuration does not say.
    """
    count = getattr(text_config_of(config), "num_hidden_layers", None)
    if not isinstance(count, int) or isinstance(count, bool):
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: its configuration gives no number of decoder layers (num_hidden_layers)"
        )
    return count


def layer_edits(text_config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The decoder configuration's keys that change when only the layers `kept` (increasing, 0-based) stay."""
    num_layers = int(text_config.num_hidden_layers)
    count_key = type(text_config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    edits: dict[str, Any] = {count_key: len(kept)}
    for key, value in vars(text_config).items():
        if key in edits or value is None:
            continue
        if key in quirks.INDEX_SETS and isinstance(value, (list, tuple)):
            edits[key] = [kept.index(index) for index in value if index in kept]
        elif key in quirks.THRESHOLDS and isinstance(value, int):
            edits[key] = sum(index < value for index in kept)
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and quirks.PER_LAYER_LIST.search(key):
            edits[key] = [copy.deepcopy(value[index]) for index in kept]
    return edits


def edit_json(config_json: dict[str, Any], config: PretrainedConfig, edits: dict[str, Any]) -> dict[str, Any]:
    """A copy of the configuration as stored, with the decoder's keys in `edits` replaced and nothing else touched."""
    edited = copy.deepcopy(config_json)
    text_config = text_config_of(config)
    part = edited
    if text_config is not config:
        name = _part_name(config, text_config)
        if not isinstance(edited.get(name), dict):  # all defaults, so nothing was stored
            edited[name] = text_config.to_dict()
        part = edited[name]
    aliases = {target: alias for alias, target in type(text_config).attribute_map.items()}
    for key, value in edits.items():
        stored = aliases.get(key)
        if stored in part and key not in part:
            part[stored] = value
        else:
            part[key] = value
            if stored in part:
                part[stored] = value
    return edited


def _part_name(config: PretrainedConfig, text_config: PretrainedConfig) -> str:
    for name, value in vars(config).items():
        if value is text_config:
            return name
    raise UnsupportedArchitectureError(
        f"model type {config.model_type!r}: cannot tell which part of its configuration describes the decoder"
    )
