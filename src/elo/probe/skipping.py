"""Skipping: how much the loss rises if a module adds nothing to the residual stream."""

import torch

from elo.checkpoint.architecture import LayerModule
from elo.probe.base import Scores, Subject, Trace, by_module, criterion, score_traces


@criterion("skipping", "loss increase without it (nats per token)")
def score(subject: Subject) -> Scores:
    """Score by the increase of the loss (the logarithm of the perplexity) when the module is skipped."""
    return by_module(
        {language: score_traces(subject, ids_NT, _increase) for language, ids_NT in subject.sequences.items()}
    )


def _increase(trace: Trace, index: int, which: LayerModule) -> float:
    with torch.no_grad(), trace.skipped(index, which):
        return float(trace.loss(index)) - trace.base
