"""Adaptability (after DAMA, arXiv 2602.01008): how much the loss falls in a few updates of one module alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from elo.checkpoint.architecture import LayerModule, modules_in
from elo.probe.base import Scores, Subject, Trace, by_module, criterion, gradients, score_each, traces

UPDATES = 2
"""Number of updates of each module."""
STEP = 0.0005
"""Size of an update: each tensor moves by this share of its own norm, against its gradient. With 0.02, the loss of
SmolLM2-135M rises for nearly all layers."""


@criterion("adaptability", "loss decrease after a few updates of it alone (nats per token)")
def score(subject: Subject) -> Scores:
    """Score by the decrease of the loss on the second half of the text after updates on the first half.

    Each update moves every tensor of the module by a fixed share of its norm, against the gradient on the first half.
    The gradient of the first update is computed once for all modules.
    """
    found = {}
    for language, ids_NT in subject.sequences.items():
        half = (len(ids_NT) + 1) // 2
        learned, measured = (list(traces(subject, each)) for each in (ids_NT[:half], ids_NT[half:]))
        with gradients(subject), torch.enable_grad():
            for trace in learned:
                (trace.share * subject.loss(trace.ids)).backward()
            first = {id(each): each.grad for each in subject.layers.parameters()}
        found[language] = score_each(subject, partial(_decrease, learned, measured, first))
    return by_module(found)


def _decrease(
    learned: Sequence[Trace],
    measured: Sequence[Trace],
    first: Mapping[int, Tensor | None],
    index: int,
    which: LayerModule,
) -> float:
    modules = modules_in(measured[0].subject.layers[index], which)
    with _restored(parameters := [each for module in modules for each in module.parameters()]):
        _update(parameters, [first[id(each)] for each in parameters])
        for _ in range(UPDATES - 1):
            with _training(parameters), torch.enable_grad():
                for trace in learned:
                    (trace.share * trace.loss(index)).backward()
                _update(parameters, [each.grad for each in parameters])
        with torch.no_grad():
            return sum((trace.share * (trace.base - float(trace.loss(index))) for trace in measured), 0.0)


def _update(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient * (STEP * parameter.norm() / gradient.norm().clamp_min(1e-30)))


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restore the parameters' values on exit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Require gradients of these parameters within the context; freeze them and clear their gradients on exit."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
