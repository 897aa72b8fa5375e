"""Find the decoder's part of a configuration and its number of layers."""

from typing import Any

from transformers import PretrainedConfig

from elo.checkpoint import quirks
from elo.errors import UnsupportedArchitectureError


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a configuration that describes the decoder: the whole, or for example its `text_config`."""
    return config.get_text_config(decoder=True)


def config_of_class(model_class: Any, config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a configuration that `model_class` takes; for some wrappers that is only the decoder's."""
    return config if isinstance(config, model_class.config_class) else text_config_of(config)


def num_layers_of(config: PretrainedConfig) -> int:
    """Return the number of decoder layers.

    Raises:
        UnsupportedArchitectureError: the configuration does not contain it.
    """
    text_config = text_config_of(config)
    count = getattr(text_config, count_key(text_config), None)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: its configuration has no number of decoder layers; "
            "set num_hidden_layers, or choose another model"
        )
    return count


def count_key(text_config: PretrainedConfig) -> str:
    """Return the key of a decoder's configuration that holds its number of layers."""
    by_type = quirks.LAYER_COUNT_KEY.get(text_config.model_type)
    return by_type or type(text_config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
