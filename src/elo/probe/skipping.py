"""Skipping: how much the loss rises if a module adds nothing to the residual stream."""

import torch

from elo.checkpoint.architecture import LayerModule
from elo.probe.base import Scores, Subject, Trace, by_module, criterion, score_each


@criterion("skipping", "loss increase without it (nats per token)")
def score(subject: Subject) -> Scores:
    """Score by the increase of the loss (the logarithm of the perplexity) when the module is skipped."""
    found = {}
    for language, ids_NT in subject.sequences.items():
        trace = Trace(subject, ids_NT)

        def increase(index: int, which: LayerModule, trace: Trace = trace) -> float:
            with torch.no_grad(), trace.skipped(index, which):
                return float(trace.loss(index)) - trace.base

        found[language] = score_each(subject, increase)
    return by_module(found)
