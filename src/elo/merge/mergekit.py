"""Read mergekit's YAML for the merges that `elo merge` computes in the same way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from elo.checkpoint.folder import open_folder
from elo.checkpoint.model_config import num_layers_of
from elo.checkpoint.tensor_files import StoredTensor
from elo.config.load import read_yaml
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.merge.recipe import METHODS, Recipe, slerp_factors
from elo.merge.weights import Factors, Place

_SHARED = {"linear": {"normalize"}, "slerp": {"t"}, "task_arithmetic": {"normalize", "lambda"}}
_OWN = {"linear": {"weight"}, "slerp": set(), "task_arithmetic": {"weight"}}
"""Parameters of the whole merge, and of each model, by method."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Input(_Strict):
    model: str
    parameters: dict[str, Any] = {}
    layer_range: tuple[int, int] | None = None


class _Slice(_Strict):
    sources: list[_Input]


class _Config(_Strict):
    merge_method: Literal["linear", "slerp", "task_arithmetic"]
    models: list[_Input] | None = None
    slices: list[_Slice] | None = None
    base_model: str | None = None
    parameters: dict[str, Any] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None


def read_mergekit(path: Path, *, trust_remote_code: bool = False) -> Recipe:
    """Read a merge from mergekit's YAML. The base model comes first in the result, if there is one.

    Raises:
        EloError: the file cannot be read, or holds a method, key or value that `elo merge` does not know.
    """
    value = read_yaml(path)
    try:
        config = _Config.model_validate(value)
    except ValidationError as error:
        raise EloError(_problem(path, error)) from None
    method, inputs = config.merge_method, _inputs(path, config, trust_remote_code)
    base = config.base_model
    if base is None and method != "linear":
        raise EloError(f"{path}: base_model is missing; {method} needs it")
    if base is not None and base not in [each.model for each in inputs]:
        if method == "linear":
            raise EloError(
                f"{path}: base_model: {base} is not among the models of a linear merge; list it with its weight"
            )
        inputs = [_Input(model=base), *inputs]
    inputs.sort(key=lambda each: each.model != base)  # stable: the base first, the others in their order
    if len({each.model for each in inputs}) < len(inputs):
        raise EloError(f"{path}: a model is listed twice; list each once")
    if len(inputs) < 2 or (method == "slerp" and len(inputs) > 2):
        raise EloError(f"{path}: {len(inputs)} models; {method} needs {'two' if method == 'slerp' else 'two or more'}")
    _check_parameters(path, config, inputs)
    return Recipe(
        method,
        tuple(each.model for each in inputs),
        _factors(path, config, inputs),
        {"mergekit": value},
        getattr(torch, config.dtype) if config.dtype else None,
    )


def _inputs(path: Path, config: _Config, trust_remote_code: bool) -> list[_Input]:
    if (config.models is None) == (config.slices is None):
        raise EloError(f"{path}: needs either models or slices; write models")
    if config.models is not None:
        return config.models
    slices = config.slices or []
    if len(slices) != 1:
        raise EloError(
            f"{path}: slices: {len(slices)} slices; elo merge keeps every layer, so write models, or one slice"
        )
    for each in slices[0].sources:
        folder = resolve_checkpoint(each.model, trust_remote_code=trust_remote_code)
        layers = num_layers_of(open_folder(folder, trust_remote_code).config)
        if each.layer_range != (0, layers):
            raise EloError(
                f"{path}: slices: layer_range of {each.model} is {list(each.layer_range or ())}, but the model has "
                f"{layers} layers; elo merge keeps every layer, so write [0, {layers}] or models"
            )
    return slices[0].sources


def _check_parameters(path: Path, config: _Config, inputs: Sequence[_Input]) -> None:
    own, shared = _OWN[config.merge_method], _SHARED[config.merge_method]
    allowed = [("parameters", config.parameters, own | shared)]
    allowed += [(f"parameters of {each.model}", each.parameters, own) for each in inputs]
    for where, parameters, known in allowed:
        for name in parameters.keys() - known:
            raise EloError(
                f"{path}: {where}: {name!r} is not a parameter of {config.merge_method} here; elo merge reads "
                f"{', '.join(sorted(known)) or 'none'}, for others use mergekit"
            )


def _factors(path: Path, config: _Config, inputs: Sequence[_Input]) -> Factors:
    method, given = config.merge_method, config.parameters

    def number(place: Place, name: str, *settings: dict[str, Any], default: float | None = None) -> float:
        for each in settings:
            if name in each and (value := _evaluated(path, name, each[name], place)) is not None:
                return value
        if default is None:
            raise EloError(f"{path}: no {name} for {place.name}; give one to every model and tensor")
        return default

    def factors(place: Place, tensors: Sequence[StoredTensor], elements: int) -> tuple[float, ...]:
        if method == "slerp":
            return slerp_factors(tensors[0], tensors[1], elements, number(place, "t", given))
        weighted = inputs if method == "linear" else inputs[1:]
        weights = [number(place, "weight", each.parameters, given) for each in weighted]
        total = sum(weights)
        if number(place, "normalize", given, default=float(method == "linear")):
            if abs(total) < 1e-8:
                raise EloError(f"{path}: the weights for {place.name} sum to 0; change them, or set normalize: false")
            weights = [weight / total for weight in weights]
        if method == "linear":
            return tuple(weights)
        scale = number(place, "lambda", given, default=1.0)
        return (1.0 - scale * sum(weights), *(scale * weight for weight in weights))

    whole = Place("", None, 0.0, False)
    for each in (given, *(one.parameters for one in inputs)):
        for name, value in each.items():
            _evaluated(path, name, value, whole)  # raise for a wrong value before weights are read
    return factors


def _evaluated(path: Path, name: str, setting: Any, place: Place) -> float | None:
    """Return a parameter's value for a tensor: a number, numbers over depth, or filters with values."""
    if isinstance(setting, bool | int | float):
        return float(setting)
    conditions = setting if isinstance(setting, list) else [setting]
    if conditions and all(isinstance(each, int | float) and not isinstance(each, bool) for each in conditions):
        position = place.depth * (len(conditions) - 1)
        low = int(position)
        high = min(len(conditions) - 1, low + 1)
        return float(conditions[low] + (position - low) * (conditions[high] - conditions[low]))
    for each in conditions:
        if not isinstance(each, dict) or "value" not in each or each.keys() - {"value", "filter"}:
            raise EloError(f"{path}: {name}: {each!r} is not a number, a list of numbers, or filter and value")
        pattern = each.get("filter")
        value = _evaluated(path, name, each["value"], place)
        if pattern in (None, "*") or str(pattern) in place.name:
            return value
    return None


def _problem(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    if where == "merge_method":
        return (
            f"{path}: merge_method: {first['input']!r} is not computed by elo merge; write {', '.join(METHODS)}, "
            "or merge with mergekit"
        )
    if first["type"] == "extra_forbidden":
        return f"{path}: {where}: elo merge does not read this key; remove it, or merge with mergekit"
    return f"{path}: {where}: {first['msg']}, got {str(first['input'])[:60]!r}; write it as in docs/merging.md"
