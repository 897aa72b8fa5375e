"""Edit a model's configuration for a subset of its layers: counts, per-layer lists, index sets and thresholds."""

import copy
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from elo.checkpoint import quirks
from elo.checkpoint.folder import write_config
from elo.checkpoint.model_config import count_key, num_layers_of, text_config_of
from elo.errors import UnsupportedArchitectureError, error_line

_PER_LAYER_CONFIG = "per_layer_config"  # transformers' own key for layers that differ: {layer: {key: value}}


def layer_edits(text_config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Return the keys of the decoder's configuration that change if only the layers `kept` remain, with new values.

    Args:
        text_config: configuration of the whole decoder.
        kept: increasing 0-based layer indices.

    Raises:
        UnsupportedArchitectureError: no configuration of this family describes these layers.
    """
    num_layers, model_type = num_layers_of(text_config), text_config.model_type
    edits: dict[str, Any] = {count_key(text_config): len(kept)}
    for key, value in vars(text_config).items():
        if key in edits or value is None:
            continue
        if key in quirks.LENDERS:
            _require_lenders(key, value, kept, model_type)
        if key in quirks.LAYER_COUNT_COPIES and value == num_layers:
            edits[key] = len(kept)
        elif key in quirks.INDEX_SETS and isinstance(value, (list, tuple)):
            edits[key] = [kept.index(index) for index in value if index in kept]
        elif key in quirks.THRESHOLDS and isinstance(value, int):
            edits[key] = sum(index < value for index in kept)
        elif key == quirks.REPEATED_LISTS.get(model_type):
            edits[key] = [value[index % len(value)] for index in kept]
        elif key == quirks.OVER_ROOT_DEPTH.get(model_type):
            edits[key] = value / math.sqrt(num_layers) * math.sqrt(len(kept))
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and quirks.PER_LAYER_LIST.search(key):
            edits[key] = [copy.deepcopy(value[index]) for index in kept]
    if getattr(text_config, "decoder_sparse_step", 1) != 1:
        edits |= _without_sparse_step(text_config, kept)
    for rule in quirks.RULES.get(model_type, ()):
        edits |= _find_rule_values(rule, text_config, kept)
    if overrides := text_config.to_dict().get(_PER_LAYER_CONFIG):
        by_index = {int(index): value for index, value in overrides.items()}
        edits[_PER_LAYER_CONFIG] = {str(kept.index(i)): value for i, value in by_index.items() if i in kept}
    return edits


def with_layers(text_config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """Copy a decoder's configuration for a model of its layers `kept`.

    Raises:
        UnsupportedArchitectureError: no configuration of this family describes these layers.
    """
    small = copy.deepcopy(text_config)
    for key, value in layer_edits(small, kept).items():
        setattr(small, key, value)
    return small


def edit_json(config_json: dict[str, Any], config: PretrainedConfig, edits: dict[str, Any]) -> dict[str, Any]:
    """Copy a stored configuration and replace only the decoder's keys in `edits`.

    Args:
        config_json: content of config.json.
        config: configuration that transformers reads from it.

    Raises:
        UnsupportedArchitectureError: no part of the configuration describes the decoder.
    """
    edited = copy.deepcopy(config_json)
    text_config = text_config_of(config)
    part = edited
    if text_config is not config:
        name = _part_name(config, text_config)
        if not isinstance(edited.get(name), dict):  # a part with only default values is not stored
            edited[name] = text_config.to_dict()
        part = edited[name]
    aliases = {target: alias for alias, target in type(text_config).attribute_map.items()}
    for key, value in edits.items():
        stored = aliases.get(key)
        if stored is not None and stored in part:
            part[stored] = copy.deepcopy(value)
        if stored not in part or key in part:
            part[key] = copy.deepcopy(value)
    key_of_count = count_key(text_config)
    hidden = part.get("num_hidden_layers")
    if key_of_count in edits and "num_hidden_layers" not in edits and isinstance(hidden, int):
        part["num_hidden_layers"] = hidden * edits[key_of_count] // num_layers_of(config)
    return edited


def apply_edits(config: PretrainedConfig, small_config: PretrainedConfig, edits: dict[str, Any]) -> None:
    """Apply edits to a configuration in place. Settings that are not stored, such as the attention, are kept."""
    text_config, small_text = text_config_of(config), text_config_of(small_config)
    for key, value in edits.items():
        if key != _PER_LAYER_CONFIG:
            setattr(text_config, key, copy.deepcopy(value))
    if _PER_LAYER_CONFIG in edits:
        vars(text_config)["_heterogeneity_spec"] = copy.deepcopy(vars(small_text)["_heterogeneity_spec"])


def read_edited_config(
    config_json: dict[str, Any], base_config: PretrainedConfig, edits: dict[str, Any]
) -> PretrainedConfig:
    """Read the edited configuration as transformers reads it from disk, and check that it keeps the edits.

    Raises:
        UnsupportedArchitectureError: transformers rejects the configuration or changes an edited value.
    """
    with tempfile.TemporaryDirectory(prefix="elo-detach-") as scratch:
        write_config(Path(scratch), config_json)
        try:
            small_config = type(base_config).from_pretrained(scratch)
        except Exception as error:  # configuration classes can raise any type
            raise UnsupportedArchitectureError(
                f"model type {base_config.model_type!r}: transformers rejects the configuration of these layers "
                f"({error_line(error)}); choose other layers"
            ) from None
    require_edits_kept(small_config, edits)
    return small_config


def require_edits_kept(small_config: PretrainedConfig, edits: dict[str, Any]) -> None:
    """Raise UnsupportedArchitectureError if the configuration class changed an edited value."""
    small_text = text_config_of(small_config)
    for key, value in edits.items():
        if key == _PER_LAYER_CONFIG:
            continue  # the class stores it in another form; require_same_layers checks its effect
        found = vars(small_text).get(key, getattr(small_text, key, None))
        if list(found) != list(value) if isinstance(found, (list, tuple)) else found != value:
            raise UnsupportedArchitectureError(
                f"model type {small_config.model_type!r}: a model of these layers needs {key}={value!r}, but "
                f"transformers changes it to {found!r}; choose other layers"
            )


def _part_name(config: PretrainedConfig, text_config: PretrainedConfig) -> str:
    for name, value in vars(config).items():
        if value is text_config:
            return name
    raise UnsupportedArchitectureError(
        f"model type {config.model_type!r}: no part of its configuration describes the decoder; choose another model"
    )


def _require_lenders(key: str, kinds: Sequence[str], kept: Sequence[int], model_type: str) -> None:
    """Raise UnsupportedArchitectureError if a kept layer needs the result of a layer that is not kept."""
    borrower, lender = quirks.LENDERS[key]
    for index in kept:
        if kinds[index] == borrower:
            source = max((i for i in range(index) if kinds[i] == lender), default=None)
            if source not in kept:
                raise UnsupportedArchitectureError(
                    f"model type {model_type!r}: layer {index} ({key}: {borrower}) uses the result of layer {source}; "
                    f"keep layer {source} too, or choose layers whose {key} is {lender!r}"
                )


def _without_sparse_step(text_config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Replace Qwen MoE's "every n-th layer has experts" with the list of layers without experts."""
    step, dense = text_config.decoder_sparse_step, text_config.mlp_only_layers or []
    without = [position for position, i in enumerate(kept) if i in dense or (i + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": without}


def _find_rule_values(rule: quirks.Rule, text_config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Search for values of a rule's keys with which it holds for the same layers as in the base."""
    values = [getattr(text_config, key) for key in rule.keys]
    wanted = [rule.holds(index, *values) for index in kept]
    for candidate in itertools.product(range(1, len(kept) + 2), *[range(len(kept) + 1)] * (len(rule.keys) - 1)):
        if [rule.holds(position, *candidate) for position in range(len(kept))] == wanted:
            return dict(zip(rule.keys, candidate, strict=True))
    raise UnsupportedArchitectureError(
        f"model type {text_config.model_type!r}: no values of {' and '.join(rule.keys)} describe the layers "
        f"{list(kept)}; choose layers at regular intervals"
    )
