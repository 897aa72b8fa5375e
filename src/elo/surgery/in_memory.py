"""Detach decoder layers from a model in memory, and put them back."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from elo.checkpoint.architecture import Architecture, find_architecture, tensor_groups
from elo.checkpoint.layers import parse_layers
from elo.checkpoint.model_config import num_layers_of, text_config_of
from elo.checkpoint.new_rows import first_new_row_of
from elo.checkpoint.refusals import require_detachable
from elo.errors import EloError, UnsupportedArchitectureError, error_line
from elo.surgery.equivalence import build_hollow, follow_configuration, require_same_layers
from elo.surgery.layer_config import apply_edits, edit_json, layer_edits, require_edits_kept
from elo.surgery.provenance import PROVENANCE_KEY, read_provenance

INCLUDABLE = ("embedding", "norm", "head")


def detach_layers(model: PreTrainedModel, layers: str | int | Sequence[int]) -> PreTrainedModel:
    """A small model of the same class: the embedding, the chosen decoder layers, the final norm and the head.

    Args:
        model: a decoder-only causal LM; it is not changed.
        layers: a selection such as `first:1,last:1` or `[0, -1]`.

    Returns:
        An ordinary Hugging Face model that shares no memory with `model`, on the same devices and in the same dtypes.

    Raises:
        EloError: the selection does not fit the model.
        UnsupportedArchitectureError: a kept layer would compute something else than in the base.
    """
    require_detachable(model.config)
    if (
        getattr(model.base_model, "layers_are_rescaled", False)
        and num_layers_of(model.config) > model.config.rescale_every
    ):
        raise EloError("detach: RWKV has rescaled its weights for inference; call model.train() and run it once")
    if hasattr(model.config, PROVENANCE_KEY):
        raise EloError("detach: the model is a detached one already; give the whole model it was detached from")
    parts = find_architecture(model)
    kept = parse_layers(layers, parts.num_layers)
    config = model.config
    edits = layer_edits(text_config_of(config), kept)
    small_config = _small_config(config, edits)
    base_hollow = build_hollow(type(model), config)
    small_hollow = build_hollow(type(model), small_config)
    require_same_layers(base_hollow, small_hollow, kept)
    with _only_layers(model, parts, kept):
        detached = copy.deepcopy(model)
    apply_edits(detached.config, small_config, edits)
    follow_configuration(detached, base_hollow, small_hollow, kept)
    for parameter in detached.parameters():
        parameter.grad = None
    setattr(
        detached.config,
        PROVENANCE_KEY,
        {"base": config.name_or_path or None, "layers": list(kept), "num_base_layers": parts.num_layers},
    )
    return detached


def attach_layers(
    model: PreTrainedModel, detached: PreTrainedModel, *, scale: float = 1.0, include: Sequence[str] = ()
) -> PreTrainedModel:
    """Put a detached model's layers back at their places in `model`, in place.

    Args:
        model: the base that `detached` was made from.
        detached: its trained layers; any dtype, any device.
        scale: what is put back is theta0 + scale * (theta - theta0), computed in float32; 1 puts theta back exactly.
            Rows that `elo vocab` added are put back as they were trained, whatever the scale.
        include: of "embedding", "norm" and "head", what is put back besides the layers.

    Returns:
        `model`.

    Raises:
        EloError: `detached` was not made from this model, or was changed outside its layers and `include`.
    """
    check_include(include)
    provenance = read_provenance(getattr(detached.config, PROVENANCE_KEY, None), "the detached model")
    kept: list[int] = provenance["layers"]
    parts = find_architecture(model)
    if parts.num_layers != provenance["num_base_layers"] or model.config.model_type != detached.config.model_type:
        raise EloError(
            f"attach: the layers come from a {detached.config.model_type} of {provenance['num_base_layers']} layers, "
            f"but the model is a {model.config.model_type} of {parts.num_layers}; give the base they were detached from"
        )
    if num_layers_of(detached.config) != len(kept):
        raise EloError(
            f"attach: the detached model should have {len(kept)} layers, but has {num_layers_of(detached.config)}"
        )
    theirs, groups = dict(_named_tensors(detached)), tensor_groups(model)
    updates: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []
    for name, ours in _named_tensors(model):
        source_name, layer = _name_in_detached(name, parts, kept)
        if layer is not None and source_name is None:
            continue
        new = theirs.pop(source_name or name, None)
        if new is None or new.shape != ours.shape:
            found = "is missing" if new is None else f"is {list(new.shape)} instead of {list(ours.shape)}"
            raise EloError(f"attach: {source_name or name} {found} in the detached model; it is not from this base")
        if layer is not None or groups.get(name) in include:
            updates.append((ours, new, first_new_row_of(model.config, groups.get(name))))
        elif not same_values(ours, new):
            raise EloError(
                f"attach: {name} is not in a detached layer, but differs from the base's; give the base that the "
                f"layers were detached from, or, if {name} was trained on purpose, include it ({', '.join(INCLUDABLE)})"
            )
    if theirs:
        raise EloError(f"attach: the detached model has {min(theirs)}, which the base has not")
    with torch.no_grad():
        for ours, new, whole_from in updates:
            ours.copy_(blend(ours, new.to(ours.device), scale, whole_from))
    return model


def check_include(include: Sequence[str]) -> None:
    """Raise EloError unless `include` names things that can be put back."""
    for name in include:
        if name not in INCLUDABLE:
            raise EloError(f"include: cannot put back {name!r}; choose among {', '.join(INCLUDABLE)}")


def blend(base: torch.Tensor, trained: torch.Tensor, scale: float, whole_from: int | None = None) -> torch.Tensor:
    """theta0 + scale * (theta - theta0) in float32, in the base's dtype; what did not change keeps its bits.

    Integers are taken as trained. So are rows from `whole_from` on: of a token that is new, theta0 is nothing to go
    back to.
    """
    if scale == 1.0 or not base.is_floating_point():
        return trained.to(base.dtype)
    wide = torch.promote_types(base.dtype, torch.float32)
    blended = (base.to(wide) + scale * (trained.to(wide) - base.to(wide))).to(base.dtype)
    blended = torch.where(base.to(wide) == trained.to(wide), base, blended)  # a negative zero would become positive
    if whole_from is not None:
        blended[whole_from:] = trained[whole_from:].to(base.dtype)
    return blended


def same_values(base: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `other` is `base` bit for bit, in the coarser of their dtypes (a checkpoint may be saved in another)."""
    other = other.to(base.device)
    if base.dtype != other.dtype and other.element_size() < base.element_size():
        base = base.to(other.dtype)
    return torch.equal(_bits(base), _bits(other.to(base.dtype)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.dtype != torch.bool else tensor


def _small_config(config: PretrainedConfig, edits: dict[str, Any]) -> PretrainedConfig:
    try:
        small_config = type(config).from_dict(edit_json(config.to_dict(), config, edits))
    except Exception as error:  # configuration classes raise anything
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: these layers make a configuration that transformers refuses "
            f"({error_line(error)}); choose other layers"
        ) from None
    require_edits_kept(small_config, edits)
    return small_config


@contextmanager
def _only_layers(model: PreTrainedModel, parts: Architecture, kept: Sequence[int]) -> Iterator[None]:
    """Within, `model` holds the layers `kept` alone, so that copying it copies nothing else."""
    path, _, name = parts.layers_path.rpartition(".")
    parent = model.get_submodule(path)
    layers = _layers(model, parts)
    setattr(parent, name, nn.ModuleList([layers[index] for index in kept]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def _layers(model: PreTrainedModel, parts: Architecture) -> Any:
    return model.get_submodule(parts.layers_path)


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers; a tied one once, under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _name_in_detached(name: str, parts: Architecture, kept: Sequence[int]) -> tuple[str | None, int | None]:
    prefix = parts.layers_path + "."
    if not name.startswith(prefix):
        return name, None
    index, _, rest = name.removeprefix(prefix).partition(".")
    layer = int(index)
    return (f"{prefix}{kept.index(layer)}.{rest}" if layer in kept else None), layer
