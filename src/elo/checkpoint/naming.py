"""Names as they stand in a checkpoint's files, which in many families are not the names of the modules.

Which tensor belongs to which layer is read from the names (`model.layers.3.mlp...`, `h.3.attn...`). Whether a set of
names makes a whole model is asked of transformers itself, by loading tensors without data.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.tensor_files import Checkpoint
from elo.errors import UnfinishedError, UnsupportedArchitectureError
from elo.surgery.layer_config import error_line

_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


@dataclass(frozen=True)
class LayerNames:
    """The layers' names in a file: `prefix` + index + `.` + rest, index from 0 to `num_layers - 1`."""

    prefix: str
    num_layers: int

    def split(self, name: str) -> tuple[int | None, str]:
        """(layer, rest of the name), or (None, name) outside the layers; extra layers count from num_layers."""
        if name.startswith(self.prefix):
            index, dot, rest = name.removeprefix(self.prefix).partition(".")
            if dot and index.isascii() and index.isdigit() and len(index) < 10:
                return int(index), rest
        return None, name

    def join(self, layer: int, rest: str) -> str:
        """The name of a layer's tensor."""
        return f"{self.prefix}{layer}.{rest}"


@dataclass(frozen=True)
class LoadingReport:
    """What transformers says of a set of tensors: module names, but for `unexpected`."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]
    errors: tuple[str, ...]

    def does_not_know(self, name: str) -> bool:
        """Whether a name in the file is among the unexpected ones, which are told with the model's prefix."""
        return any(
            name == other or other.endswith("." + name) or name.endswith("." + other) for other in self.unexpected
        )

    def incomplete(self) -> str | None:
        """The first thing that keeps the tensors from making a model, in words; unknown ones do not."""
        for names, what in ((self.missing, "is missing"), (self.mismatched, "has another shape")):
            if names:
                return f"{min(names)} {what}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
        if self.errors:
            return self.errors[0]
        return None

    def problem(self) -> str | None:
        """The first thing wrong, in words; None if the tensors are the model's, no more and no less."""
        if self.unexpected and not self.incomplete():
            return f"{min(self.unexpected)} is unknown to the model"
        return self.incomplete()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers neither warns nor draws progress bars: these loads are not the user's."""
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
    """Load tensors without data (meta device) through transformers' own name conversions."""
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state_dict,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # a conversion of names or tensors that fails without data, in its own way
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: transformers cannot lay out its tensors without their data "
            f"({error_line(error)}), so what is written could not be checked"
        ) from None
    model, info = loaded
    mismatched = frozenset(entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"])
    report = LoadingReport(
        frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched, tuple(info["error_msgs"])
    )
    return model, report


def find_layer_names(hollow: PreTrainedModel, weights: Checkpoint) -> LayerNames:
    """Find the prefix of the decoder layers' names in a checkpoint of the model that `hollow` is.

    Raises:
        UnfinishedError: the checkpoint does not make that model.
        UnsupportedArchitectureError: the names do not number the layers from 0 to n-1.
    """
    parts, config, model_class = find_architecture(hollow), hollow.config, type(hollow)
    state_dict = weights.meta_state_dict()
    loaded, report = load_hollow(model_class, config, state_dict)
    if problem := report.incomplete():
        raise UnfinishedError(
            f"{weights.folder}: its tensors do not make the {model_class.__name__} that its config.json describes: "
            f"{problem}"
        )
    candidates = _numbered_prefixes(state_dict, parts.num_layers)
    if len(candidates) > 1:  # a vision tower may have as many layers: keep what fills the decoder's layers
        every = frozenset(loaded.state_dict())
        inside = frozenset(name for name in every if name.startswith(parts.layers_path + "."))
        candidates = [
            prefix for prefix in candidates if inside - _missing_with(model_class, config, state_dict, prefix)
        ]
    if len(candidates) != 1:
        found = f"found {', '.join(candidates)}" if candidates else "found no such names"
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: cannot tell the names of its {parts.num_layers} decoder layers in the "
            f"checkpoint, which should read PREFIX.0... to PREFIX.{parts.num_layers - 1}... ({found})"
        )
    return LayerNames(candidates[0], parts.num_layers)


def _missing_with(
    model_class: type[PreTrainedModel], config: PretrainedConfig, state_dict: dict[str, torch.Tensor], prefix: str
) -> frozenset[str]:
    subset = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    return load_hollow(model_class, config, subset)[1].missing


def _numbered_prefixes(names: Iterable[str], num_layers: int) -> list[str]:
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    full = [prefix for prefix, found in numbers.items() if found >= set(range(num_layers))]
    return sorted(p for p in full if not any(p != other and p.startswith(other) for other in full))
