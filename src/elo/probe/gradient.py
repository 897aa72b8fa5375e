"""Gradient norm: how steeply a language's loss changes with the weights of a module."""

from elo.probe.base import Scores, Subject, by_module, criterion, sums_of_gradients


@criterion("gradient", "norm of the gradient (nats)")
def score(subject: Subject) -> Scores:
    """Score by the norm of the gradient of the loss on all sequences together."""
    found = {}
    for language, ids_NT in subject.sequences.items():
        sums = sums_of_gradients(subject, ids_NT, lambda weight, gradient: gradient.float().square().sum())
        found[language] = {which: [each**0.5 for each in values] for which, values in sums.items()}
    return by_module(found)
