"""Check that each layer of a detached model is built exactly like the base layer that it was taken from.

Both models are built without weights and compared module by module: classes, shapes, scalar attributes, small buffers
and tied weights. In some families, layers depend on their depth in ways that the configuration edits do not cover. Such
layers differ here and are refused before training, because the trained layers could not be attached.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from elo.checkpoint import quirks
from elo.checkpoint.architecture import Architecture, find_architecture
from elo.checkpoint.model_config import config_of_class
from elo.checkpoint.reading import auto_class
from elo.errors import UnsupportedArchitectureError, error_line

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_FACTORIES = {torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}
_FILLERS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}
_SMALL = 1 << 16


class _WithoutLargeTensors(TorchFunctionMode):
    """Create uninitialised and large tensors on the meta device. Small constants keep their data for comparison.

    Initialisers skip tensors on the meta device, which halves the construction time.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _FILLERS:
            filled = args[0] if args else kwargs["tensor"]  # torch.nn.init passes it by keyword
            if filled.is_meta:
                return filled
        if func is torch.empty or (func in _FACTORIES and _numel(args, kwargs) > _SMALL):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _numel(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    sizes = args or (kwargs.get("size", ()),)
    first = sizes[0] if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes
    count = 1
    for size in first:
        count *= size if isinstance(size, int) else 1
    return count


@contextmanager
def _hollow_construction(model_type: str) -> Iterator[None]:
    try:
        with torch.random.fork_rng(devices=[]), _WithoutLargeTensors():
            yield
    except Exception as error:  # model constructors can raise any type for an invalid configuration
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: transformers cannot build a causal language model from this configuration "
            f"({error_line(error)}); choose another model"
        ) from None


def build_hollow(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of `config` with parameters on the meta device, and without changing the random state.

    Raises:
        UnsupportedArchitectureError: the model cannot be built.
    """
    with _hollow_construction(config.model_type):
        config = config_of_class(model_class, config)
        return model_class._from_config(copy.deepcopy(config), dtype=config.dtype or torch.float32)


def build_hollow_causal_lm(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal LM of `config` with parameters on the meta device; elo.checkpoint.reading chooses its class.

    Raises:
        UnsupportedArchitectureError: transformers has no causal LM for this configuration, or cannot build it.
    """
    with _hollow_construction(config.model_type):
        model: PreTrainedModel = auto_class(config).from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
        return model


def require_same_layers(base: PreTrainedModel, detached: PreTrainedModel, kept: Sequence[int]) -> None:
    """Check that a base and the model made of its layers `kept` differ only in the number and indices of layers.

    Both models may be on the meta device.

    Raises:
        UnsupportedArchitectureError: anything else differs.
    """
    base_parts, detached_parts = find_architecture(base), find_architecture(detached)
    if detached_parts.layers_path != base_parts.layers_path or detached_parts.tied != base_parts.tied:
        raise _refusal(base_parts, kept, "the detached model has a different structure")
    if detached_parts.num_layers != len(kept):
        raise _refusal(base_parts, kept, f"the detached model has {detached_parts.num_layers} layers")
    for position, index in enumerate(kept):
        old = base.get_submodule(f"{base_parts.layers_path}.{index}")
        new = detached.get_submodule(f"{base_parts.layers_path}.{position}")
        difference = _difference(old, new, _Place(index, position, kept))
        if difference:
            raise _refusal(base_parts, kept, f"layer {index} would change as layer {position}: {difference}")
    outside = base_parts.layers_path + "."
    old_shapes = {n: tuple(t.shape) for n, t in base.state_dict().items() if not n.startswith(outside)}
    new_shapes = {n: tuple(t.shape) for n, t in detached.state_dict().items() if not n.startswith(outside)}
    for name in sorted(old_shapes.keys() | new_shapes.keys()):
        if old_shapes.get(name) != new_shapes.get(name):
            raise _refusal(
                base_parts,
                kept,
                f"{name} is outside the layers but depends on their number "
                f"({old_shapes.get(name, 'absent')} in the base, {new_shapes.get(name, 'absent')} in the detached "
                "model)",
            )


def follow_configuration(
    detached: PreTrainedModel, base: PreTrainedModel, small: PreTrainedModel, kept: Sequence[int]
) -> None:
    """Set the plain attributes of a detached model's modules to the values that its own configuration gives.

    Its modules are copies of the base's, whose attributes can depend on the base's number of layers.

    Args:
        detached: model to change, a copy of the base with only the layers `kept`.
        base: model built from the base's configuration; may be on the meta device.
        small: model built from the detached model's configuration; may be on the meta device.
        kept: indices of the kept layers.
    """
    prefix = find_architecture(base).layers_path + "."
    base_modules, small_modules = dict(base.named_modules()), dict(small.named_modules())
    for name, module in detached.named_modules():
        base_name = name
        if name.startswith(prefix):
            position, dot, rest = name.removeprefix(prefix).partition(".")
            base_name = f"{prefix}{kept[int(position)]}{dot}{rest}"
        if base_name not in base_modules or name not in small_modules:
            continue  # the module belongs to a removed layer
        before, after = vars(base_modules[base_name]), vars(small_modules[name])
        for key in vars(module).keys() & before.keys() & after.keys():
            values = before[key], after[key]
            if not key.startswith("_") and all(map(_comparable, values)) and not _equal(*values):
                setattr(module, key, copy.deepcopy(after[key]))


class _Place(NamedTuple):
    """Index of a layer in the base (`old`) and in the detached model (`new`), and the indices of all kept layers."""

    old: int
    new: int
    kept: Sequence[int]


def _is_selection(before: Any, after: Any, place: _Place) -> bool:
    """Return whether `after` has the kept layers' entries of the per-layer list `before`.

    A module may keep a reference to such a list of the configuration.
    """
    return (
        isinstance(before, (list, tuple))
        and isinstance(after, (list, tuple))
        and len(after) == len(place.kept)
        and len(before) > max(place.kept)
        and [before[index] for index in place.kept] == list(after)
    )


def _refusal(parts: Architecture, kept: Sequence[int], what: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"layers: {list(kept)} cannot be detached from model type {parts.model_type!r}: {what}; "
        "try other layers (first:K keeps their positions), or train the whole model (method: full)"
    )


def _difference(old: nn.Module, new: nn.Module, place: _Place) -> str | None:
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    for name in sorted(old_modules.keys() ^ new_modules.keys()):
        return f"{name} is only in the {'base' if name in old_modules else 'detached model'}"
    for name, old_module in old_modules.items():
        new_module, where = new_modules[name], f"{name}." if name else ""
        if type(old_module) is not type(new_module):
            return (
                f"{name or 'the layer'} is {type(old_module).__name__} in the base, "
                f"{type(new_module).__name__} in the detached model"
            )
        if difference := _attribute_difference(old_module, new_module, place):
            return where + difference
    return None


def _attribute_difference(old: nn.Module, new: nn.Module, place: _Place) -> str | None:
    for table in ("_parameters", "_buffers"):
        old_tensors, new_tensors = getattr(old, table), getattr(new, table)
        for name in sorted(old_tensors.keys() | new_tensors.keys()):
            if difference := _tensor_difference(old_tensors.get(name), new_tensors.get(name)):
                return f"{name} {difference}"
    old_values, new_values = vars(old), vars(new)
    for name in sorted(old_values.keys() | new_values.keys()):
        if name in quirks.WITHOUT_EFFECT or (name.startswith("_") and name != "_attn_implementation"):
            continue
        before, after = old_values.get(name), new_values.get(name)
        if name in quirks.INDEX_ATTRIBUTES and isinstance(before, int) and isinstance(after, int):
            # A layer has one index, or two with two attentions. It may be 0- or 1-based, or not renumbered.
            if any(before - stride * place.old == after - stride * place.new for stride in (0, 1, 2)):
                continue
        elif _is_selection(before, after, place):
            continue
        if isinstance(before, torch.Tensor) or isinstance(after, torch.Tensor):
            if difference := _tensor_difference(before, after):
                return f"{name} {difference}"
        elif _comparable(before) and _comparable(after) and not _equal(before, after):
            return f"{name} is {before!r} in the base and {after!r} in the detached model"
    return None


def _comparable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_comparable(item) for item in value)
    if isinstance(value, dict):
        return all(_comparable(item) for item in value.values())
    return isinstance(value, _SCALARS)


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):  # a rescaled factor can differ in the last bit
        return math.isclose(before, after, rel_tol=1e-14) or (math.isnan(before) and math.isnan(after))
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) == len(after) and all(map(_equal, before, after))
    return bool(before == after)


def _tensor_difference(old: Any, new: Any) -> str | None:
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return None if old is None and new is None else "is only in one of the two models"
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"is {list(old.shape)} in the base and {list(new.shape)} in the detached model"
    if isinstance(old, nn.Parameter) or old.is_meta or new.is_meta:
        return None
    return None if torch.equal(old, new) else "has other values because it depends on the layer's depth"
