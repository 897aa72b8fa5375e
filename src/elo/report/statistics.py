"""Paired differences in bits per byte, with intervals that cover both sources of randomness: documents and seeds.

Two models are compared on the same documents and, seed by seed, on the same training data, so that only differences
matter. Bits per byte is a ratio of sums, so a document weighs as much as it has bytes.

Documents are resampled (bootstrap). A resample is the same for all seeds and all pairs, because all models were
measured on the same documents.

Seeds are not resampled: there are two to five, which would make intervals far too narrow. Three seeds that scatter
around zero have the same sign in one case of four, and then so has every resample. The error of the mean over seeds is
therefore drawn from Student's t distribution, scaled by the standard error over seeds. With one seed, intervals cover
documents only: callers have to report that, and to call no such difference supported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_CONFIDENCE = 0.95
_AT_ONCE = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean difference in bits per byte, its confidence interval and its two-sided p-value."""

    value: float
    low: float
    high: float
    p_value: float


def resampled_documents(nats_D: Floats, bytes_D: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return bits per byte [resamples] on resampled documents, the same for every call with this number of documents.

    Args:
        nats_D: nats, or differences of nats, of D documents.
        bytes_D: UTF-8 bytes of the documents.
    """
    times_RD = _times_drawn(bytes_D.size, resamples, seed)
    sums = [times_RD[at : at + _AT_ONCE] @ np.stack([nats_D, bytes_D], axis=1) for at in range(0, resamples, _AT_ONCE)]
    nats_R, bytes_R = np.concatenate(sums).T
    return np.asarray(
        nats_R / (math.log(2) * np.maximum(bytes_R, 1.0))
    )  # a resample may hold nothing but empty documents


@lru_cache(maxsize=4)
def _times_drawn(documents: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """Return how often each document is drawn, [resamples, documents]."""
    generator = np.random.default_rng(seed)
    times_RD = np.empty((resamples, documents), np.uint8)
    for row in times_RD:
        row[:] = np.bincount(generator.integers(0, documents, documents), minlength=documents)
    return times_RD


def estimate(per_seed: Sequence[float], documents_R: Floats, seed: int = 0) -> Estimate:
    """Estimate a mean difference, combining the error over seeds with that over documents.

    Args:
        per_seed: difference in bits per byte on all documents, seed by seed.
        documents_R: the mean difference over seeds on resampled documents, from `resampled_documents`.
        seed: of the draws from Student's t distribution.
    """
    seeds = np.asarray(per_seed, dtype=np.float64)
    draws_R = documents_R
    if seeds.size > 1:
        error = float(seeds.std(ddof=1)) / math.sqrt(seeds.size)
        generator = np.random.default_rng([seed, seeds.size])
        draws_R = draws_R + error * generator.standard_t(seeds.size - 1, draws_R.size)
    low, high = np.quantile(draws_R, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    rarer = min(int((draws_R <= 0).sum()), int((draws_R >= 0).sum()))
    p_value = min(1.0, 2 * (rarer + 1) / (draws_R.size + 1))
    return Estimate(float(seeds.mean()), float(low), float(high), p_value)


def estimate_items(differences_SN: Floats) -> Estimate:
    """Estimate a mean difference over items, whose error is drawn from Student's t distribution, and over seeds.

    Args:
        differences_SN: differences of S seeds on N items.
    """
    means_N = differences_SN.mean(axis=0)
    error = float(means_N.std(ddof=1)) / math.sqrt(means_N.size)
    drawn_R = means_N.mean() + error * np.random.default_rng(means_N.size).standard_t(means_N.size - 1, RESAMPLES)
    return estimate(differences_SN.mean(axis=1).tolist(), drawn_R)


def mcnemar(ours_N: Floats, theirs_N: Floats) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Its null hypothesis: among the items that only one of the models gets right, each model gets as many.
    """
    alone = [int((ours_N > theirs_N).sum()), int((ours_N < theirs_N).sum())]
    total = sum(alone)
    return min(1.0, 2 * sum(math.comb(total, count) for count in range(min(alone) + 1)) / 2**total)


def bits_per_byte(nats_SD: Floats, bytes_D: Floats) -> Floats:
    """Return the bits per byte [S] of each seed."""
    return np.asarray(nats_SD.sum(axis=1) / (math.log(2) * bytes_D.sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
