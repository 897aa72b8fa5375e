"""Detach decoder layers from a model in memory, and attach them again."""

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
    """Make a detached model of the same class: embedding, selected decoder layers, final norm and head.

    Args:
        model: decoder-only causal LM; it is not changed.
        layers: selection such as `first:1,last:1` or `[0, -1]`.

    Returns:
        A Hugging Face model that shares no memory with `model`, on the same devices and in the same dtypes.

    Raises:
        EloError: the selection is not valid for this model, or the model is already detached.
        UnsupportedArchitectureError: a kept layer would compute something different than in the base.
    """
    require_detachable(model.config)
    if (
        getattr(model.base_model, "layers_are_rescaled", False)
        and num_layers_of(model.config) > model.config.rescale_every
    ):
        raise EloError("detach: RWKV has rescaled its weights for inference; call model.train() and run the model once")
    if hasattr(model.config, PROVENANCE_KEY):
        raise EloError("detach: the model is already detached; give the whole model that it was detached from")
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
    """Write a detached model's layers to their positions in `model`, in place.

    Args:
        model: base that `detached` was made from.
        detached: model with the trained layers, in any dtype and on any device.
        scale: weights become theta0 + scale * (theta - theta0), computed in float32; 1 restores theta exactly.
            Vocabulary rows that `elo vocab` added are always taken as trained.
        include: parts to attach besides the layers: "embedding", "norm", "head".

    Returns:
        `model`.

    Raises:
        EloError: `detached` was not made from this model, or differs from it outside its layers and `include`.
    """
    check_include(include)
    provenance = read_provenance(getattr(detached.config, PROVENANCE_KEY, None), "the detached model")
    kept: list[int] = provenance["layers"]
    parts = find_architecture(model)
    if parts.num_layers != provenance["num_base_layers"] or model.config.model_type != detached.config.model_type:
        raise EloError(
            f"attach: the layers come from a {detached.config.model_type} model with {provenance['num_base_layers']} "
            f"layers, but the model is a {model.config.model_type} model with {parts.num_layers}; give the base of the "
            "layers"
        )
    if num_layers_of(detached.config) != len(kept):
        raise EloError(
            f"attach: the detached model has {num_layers_of(detached.config)} layers, but its record lists "
            f"{len(kept)}; detach again"
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
            raise EloError(
                f"attach: {source_name or name} {found} in the detached model; give the base it was detached from"
            )
        if layer is not None or groups.get(name) in include:
            updates.append((ours, new, first_new_row_of(model.config, groups.get(name))))
        elif not same_values(ours, new):
            raise EloError(
                f"attach: {name} is not in a detached layer, but differs from the base's; give the base of the layers, "
                f"or, if {name} was trained on purpose, include it ({', '.join(INCLUDABLE)})"
            )
    if theirs:
        raise EloError(
            f"attach: the detached model has {min(theirs)}, which the base does not; give the base of the layers"
        )
    with torch.no_grad():
        for ours, new, whole_from in updates:
            ours.copy_(blend(ours, new.to(ours.device), scale, whole_from))
    return model


def check_include(include: Sequence[str]) -> None:
    """Raise EloError if `include` names anything other than the parts that can be attached."""
    for name in include:
        if name not in INCLUDABLE:
            raise EloError(f"include: cannot attach {name!r}; choose among {', '.join(INCLUDABLE)}")


def blend(base: torch.Tensor, trained: torch.Tensor, scale: float, whole_from: int | None = None) -> torch.Tensor:
    """Compute theta0 + scale * (theta - theta0) in float32 or wider, rounded to the base's dtype.

    Elements that training did not change keep their bits, and at scale 0 all do. Integers and rows from `whole_from` on
    are taken as trained, because theta0 has no meaning for a new token.
    """
    if scale == 1.0 or not base.is_floating_point():
        return trained.to(base.dtype)
    wide = torch.promote_types(base.dtype, torch.float32)
    blended = (base.to(wide) + scale * (trained.to(wide) - base.to(wide))).to(base.dtype)
    # Keeps the sign of a negative zero, and at scale 0 the base where the trained value is not finite.
    blended = torch.where((base.to(wide) == trained.to(wide)) | (scale == 0.0), base, blended)
    if whole_from is not None:
        blended[whole_from:] = trained[whole_from:].to(base.dtype)
    return blended


def same_values(base: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape are equal bit for bit in the narrower of their dtypes."""
    other = other.to(base.device)
    if base.dtype != other.dtype and other.element_size() < base.element_size():
        base = base.to(other.dtype)
    return torch.equal(_bits(base), _bits(other.to(base.dtype)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, or a bool tensor itself; NaN and negative zero compare by their bits."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.dtype != torch.bool else tensor


def _small_config(config: PretrainedConfig, edits: dict[str, Any]) -> PretrainedConfig:
    try:
        small_config = type(config).from_dict(edit_json(config.to_dict(), config, edits))
    except Exception as error:  # configuration classes can raise any type
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r}: transformers rejects the configuration of these layers "
            f"({error_line(error)}); choose other layers"
        ) from None
    require_edits_kept(small_config, edits)
    return small_config


@contextmanager
def _only_layers(model: PreTrainedModel, parts: Architecture, kept: Sequence[int]) -> Iterator[None]:
    """Reduce `model` to the layers `kept` within the context, so that a copy contains only these."""
    path, _, name = parts.layers_path.rpartition(".")
    parent = model.get_submodule(path)
    layers: Any = model.get_submodule(parts.layers_path)
    setattr(parent, name, nn.ModuleList([layers[index] for index in kept]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and saved buffers by name; a tied tensor only once, under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _name_in_detached(name: str, parts: Architecture, kept: Sequence[int]) -> tuple[str | None, int | None]:
    """Return a base tensor's name in the detached model (None if it has none) and its layer (None outside layers)."""
    prefix = parts.layers_path + "."
    if not name.startswith(prefix):
        return name, None
    index, _, rest = name.removeprefix(prefix).partition(".")
    layer = int(index)
    return (f"{prefix}{kept.index(layer)}.{rest}" if layer in kept else None), layer
