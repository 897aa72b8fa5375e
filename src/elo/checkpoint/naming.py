"""Relate tensor names in a checkpoint's files to names in the model; in many families they differ.

Only `map_names` does this, with transformers' own renamings and conversions. Use it to decide whether a tensor in a
file belongs to the embedding, norm, head or a decoder layer. `load_hollow` loads tensors without data through
transformers, which shows whether a set of names makes a complete model.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging as transformers_logging

from elo.checkpoint.architecture import find_architecture, tensor_groups
from elo.checkpoint.model_config import config_of_class
from elo.checkpoint.tensor_files import Checkpoint
from elo.errors import EloError, UnfinishedError, UnsupportedArchitectureError, error_line

_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


@dataclass(frozen=True)
class LayerNames:
    """Naming scheme of decoder layers in a file: `prefix` + index + `.` + rest, index from 0 to `num_layers - 1`."""

    prefix: str
    num_layers: int

    def split(self, name: str) -> tuple[int | None, str]:
        """Split a name into (layer, rest), or (None, name) outside the layers; extra layers start at num_layers."""
        if name.startswith(self.prefix):
            index, dot, rest = name.removeprefix(self.prefix).partition(".")
            if dot and index.isascii() and index.isdigit() and len(index) < 10:
                return int(index), rest
        return None, name

    def join(self, layer: int, rest: str) -> str:
        """Return the name of a layer's tensor."""
        return f"{self.prefix}{layer}.{rest}"


@dataclass(frozen=True)
class Link:
    """Tensors in a file and the model's tensors that they become.

    Attributes:
        stored: names in the file; several if transformers joins them (experts, fused projections).
        loaded: names in the model's state dict; several if transformers splits a stored tensor.
        converted: whether loading changes more than names.
    """

    stored: tuple[str, ...]
    loaded: tuple[str, ...]
    converted: bool


@dataclass(frozen=True)
class NameMap:
    """Links between the names in a checkpoint's files and the names in a model."""

    links: tuple[Link, ...]
    """Links of all tensors that the model loads; tensors of multi-token prediction, for example, are not loaded."""
    unknown: Mapping[str, str]
    """Names in the file that the model does not load, each with the name that transformers gives it."""
    _groups: Mapping[str, str]
    _used: Any = field(compare=False, repr=False)
    _by_stored: dict[str, Link] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_stored", {name: link for link in self.links for name in link.stored})

    def link(self, stored: str) -> Link | None:
        """Return the link of a tensor in the file, or None if the model does not load it."""
        return self._by_stored.get(stored)

    def group(self, stored: str) -> str | None:
        """Return "embedding", "head" or "norm" for a tensor in the file; None for layers and everything else."""
        link = self.link(stored)
        return next((self._groups[name] for name in link.loaded if name in self._groups), None) if link else None

    def identity(self, stored: str) -> tuple[str, ...]:
        """Return a key that identifies a tensor in checkpoints of one model whose files use different names."""
        link = self.link(stored)
        if link is None:
            return ("unknown", stored)
        return ("converted", *link.loaded, stored) if link.converted else ("renamed", *link.loaded)

    def revert(self, link: Link, loaded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert a link's model tensors back to the tensors of the file.

        Raises:
            UnsupportedArchitectureError: transformers cannot revert its conversion.
        """
        if not link.converted:
            return dict.fromkeys(link.stored, loaded[link.loaded[0]])
        model = self._used
        try:
            reverted = revert_weight_conversion(model, {name: loaded[name] for name in link.loaded})
        except Exception as error:  # conversions can raise any type
            raise self._cannot_revert(link, error_line(error)) from None
        found: dict[str, torch.Tensor] = {}
        for name, tensor in reverted.items():
            prefix = f"{model.base_model_prefix}."  # the file, the model, both or neither may use it
            for candidate in (name, name.removeprefix(prefix), prefix + name):
                if candidate in link.stored:
                    found[candidate] = tensor
        if len(reverted) != len(link.stored) or found.keys() != set(link.stored):
            raise self._cannot_revert(link, f"the result is {', '.join(sorted(reverted))}")
        return found

    def _cannot_revert(self, link: Link, why: str) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"model type {self._used.config.model_type!r}: transformers converts {link.stored[0]} on loading and "
            f"cannot convert it back ({why}); choose another model"
        )


def map_names(model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> NameMap:
    """Relate the names in a checkpoint's files to the names in `model`, as transformers does on loading.

    Args:
        model: the model of the checkpoint's configuration, with or without tensor data.
        stored: the checkpoint's tensors on the meta device, by their names in the files.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    renamed: dict[str, list[str]] = {}
    joined: dict[str, tuple[Any, list[str]]] = {}
    unknown: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):  # some renamings depend on earlier names
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unknown[name] = target
        elif pattern is None:
            renamed.setdefault(target, []).append(name)
        else:
            converter, names = joined.setdefault(target, (copy.deepcopy(by_pattern[pattern]), []))
            converter.add_tensor(target, name, pattern, stored[name].to(torch.float32))  # one dtype, to be joined
            names.append(name)
    links = [Link(tuple(names), (target,), converted=False) for target, names in renamed.items()]
    for target, (converter, names) in joined.items():
        links.append(Link(tuple(names), _converted_names(converter, target, model, state), converted=True))
    used = [each for each in transforms if each.was_used()]
    reverting = SimpleNamespace(
        _weight_conversions=used, config=model.config, base_model_prefix=prefix, get_parameter=model.get_parameter
    )
    return NameMap(tuple(links), unknown, tensor_groups(model), reverting)


def _converted_names(converter: Any, target: str, model: PreTrainedModel, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the model names that a conversion produces, found by converting tensors without data."""
    try:
        made = converter.convert(target, model=model, config=model.config)
    except Exception:  # mismatched shapes, which loading reports
        return (target,)
    return tuple(name for name in made if name in state) or (target,)


@dataclass(frozen=True)
class LoadingReport:
    """Problems that transformers reports when it loads a set of tensors."""

    missing: frozenset[str]
    """Names in the model."""
    unexpected: frozenset[str]
    """Names in the file."""
    mismatched: frozenset[str]
    """Names in the model of tensors with another shape."""
    errors: tuple[str, ...]

    def incomplete(self) -> str | None:
        """Describe the first missing, mismatched or failed tensor; None if the model is complete."""
        for names, what in ((self.missing, "is missing"), (self.mismatched, "has another shape")):
            if names:
                return f"{min(names)} {what}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
        if self.errors:
            return self.errors[0]
        return None

    def problem(self) -> str | None:
        """Describe the first problem; None if the tensors are exactly those of the model."""
        if self.unexpected and not self.incomplete():
            return f"{min(self.unexpected)} is unknown to the model"
        return self.incomplete()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars during internal loads."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_hollow(
    model_class: type[PreTrainedModel], config: PretrainedConfig, state_dict: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, LoadingReport]:
    """Load tensors without data (on the meta device) with transformers' own name conversions."""
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            loaded: Any = model_class.from_pretrained(
                None,
                config=config_of_class(model_class, config),
                state_dict=state_dict,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # conversions that need data can raise any type
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: transformers cannot load its tensors without data "
            f"({error_line(error)}), so the output could not be checked; choose another model"
        ) from None
    model, info = loaded
    mismatched = frozenset(entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"])
    report = LoadingReport(
        frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched, tuple(info["error_msgs"])
    )
    return model, report


def find_layer_names(hollow: PreTrainedModel, weights: Checkpoint) -> LayerNames:
    """Find the prefix of the decoder layers' names in a checkpoint of the model `hollow`.

    Raises:
        UnfinishedError: the checkpoint's tensors do not make that model.
        UnsupportedArchitectureError: the names do not number the layers from 0 to n-1.
    """
    parts, config, model_class = find_architecture(hollow), hollow.config, type(hollow)
    state_dict = weights.meta_state_dict()
    loaded, report = load_hollow(model_class, config, state_dict)
    if problem := report.incomplete():
        raise UnfinishedError(
            f"{weights.folder}: the tensors do not match the {model_class.__name__} in config.json: {problem}; "
            "download the checkpoint again"
        )
    prefixes = _layer_prefixes(map_names(loaded, state_dict), parts.layers_path)
    if not prefixes:
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: the checkpoint does not name its {parts.num_layers} decoder layers "
            f"PREFIX.0... to PREFIX.{parts.num_layers - 1}...; choose another model"
        )
    return LayerNames(min(prefixes, key=len), parts.num_layers)


def refuse_more_layers(weights: Checkpoint, names: LayerNames) -> None:
    """Raise EloError if the weights hold more decoder layers than the configuration counts.

    Layers for multi-token prediction have other tensors and are not counted.
    """
    made_of: dict[int, set[str]] = {}
    for name in weights.tensors:
        layer, rest = names.split(name)
        if layer is not None:
            made_of.setdefault(layer, set()).add(rest)
    more = [index for index in made_of if index >= names.num_layers and made_of[index] == made_of.get(0)]
    if more:
        raise EloError(
            f"{weights.folder}: config.json counts {names.num_layers} decoder layers, but the weights also hold "
            f"layer {min(more)}; download the checkpoint again"
        )


def _layer_prefixes(names: "NameMap", layers_path: str) -> set[str]:
    """Return the prefixes before the layer index that the names of all decoder layers' tensors share."""
    found: set[str] | None = None
    modules = LayerNames(layers_path + ".", 0)
    for link in names.links:
        layers = {modules.split(name)[0] for name in link.loaded}
        if layers == {None}:
            continue
        (layer, *others) = layers
        for stored in link.stored:
            here = {stored[: match.start()] for match in _NUMBER.finditer(stored) if int(match[1]) == layer}
            found = here if found is None else found & here
        if others:
            return set()
    return found or set()
