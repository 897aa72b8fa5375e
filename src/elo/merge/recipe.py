"""Which models a merge sums, and with which factors."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from elo.checkpoint.tensor_files import StoredTensor
from elo.errors import EloError
from elo.merge.weights import Factors, shared_chunks

METHODS = ("linear", "slerp", "task_arithmetic")
_PARALLEL = 0.9995  # cosine from which mergekit interpolates linearly: the sine of the angle is too small to divide by
_ZERO = 1e-8


@dataclass(frozen=True)
class Recipe:
    """A merge.

    Attributes:
        method: one of METHODS.
        models: folders or hub ids; names, dtypes and other files are those of the first.
        factors: factors of the models for one tensor.
        settings: what was asked for, as JSON.
        dtype: dtype of the output; None keeps the first model's.
    """

    method: str
    models: tuple[str, ...]
    factors: Factors
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def two_models(method: str, models: tuple[str, ...], weight: float) -> Recipe:
    """Return the merge that takes `weight` of the second model, or of what it learnt from the third, the base.

    Raises:
        EloError: the method, the weight or the number of models does not fit.
    """
    if method not in METHODS:
        raise EloError(f"--method {method}: no such method; choose among {', '.join(METHODS)}")
    if not (math.isfinite(weight) and abs(weight) <= 100):
        raise EloError(f"--weight {weight}: must be a number from -100 to 100; 0.5 takes half of the second model")
    if method == "task_arithmetic" and len(models) == 2:
        raise EloError("--base: task_arithmetic needs the base of both models; give --base MODEL")
    if method != "task_arithmetic" and len(models) == 3:
        raise EloError(f"--base: {method} has no base; remove it, or choose --method task_arithmetic")
    return Recipe(method, models, _factors(method, weight), {"weight": weight})


def _factors(method: str, weight: float) -> Factors:
    if method == "slerp":
        return lambda place, tensors, elements: slerp_factors(tensors[0], tensors[1], elements, weight)
    factors = (1.0 - weight, weight) if method == "linear" else (1.0, weight, -weight)
    return lambda place, tensors, elements: factors


def slerp_factors(first: StoredTensor, second: StoredTensor, elements: int, t: float) -> tuple[float, float]:
    """Return the factors of spherical linear interpolation (SLERP) of two tensors, taken as vectors.

    Tensors that are almost parallel are interpolated linearly, as in mergekit.
    """
    dot = left = right = 0.0
    for one, other in shared_chunks((first, second), elements):
        dot += float(one @ other)
        left += float(one @ one)
        right += float(other @ other)
    lengths = [math.sqrt(each) if math.sqrt(each) > _ZERO else 1.0 for each in (left, right)]
    cosine = max(-1.0, min(1.0, dot / lengths[0] / lengths[1]))
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
