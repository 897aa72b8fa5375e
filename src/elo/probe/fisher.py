"""Fisher information: how strongly the predictions depend on the weights of a module."""

import torch

from elo.probe.base import MODULES, Scores, Subject, by_module, criterion, sums_of_gradients


@criterion("fisher", "squared gradient, mean over sequences (nats squared)")
def score(subject: Subject) -> Scores:
    """Score by the trace of the empirical Fisher information: the squared gradient of one sequence, as a mean."""
    found = {}
    for language, ids_NT in subject.sequences.items():
        of_sequences = [
            sums_of_gradients(subject, row_1T, lambda weight, gradient: gradient.float().square().sum())
            for row_1T in ids_NT.split(1)
        ]
        found[language] = {
            which: torch.tensor([sums[which] for sums in of_sequences]).mean(0).tolist() for which in MODULES
        }
    return by_module(found)
