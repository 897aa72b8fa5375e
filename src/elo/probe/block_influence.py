"""Block influence (ShortGPT, arXiv 2403.03853): how much a module changes the direction of the hidden states."""

import torch
from torch import nn

from elo.checkpoint.architecture import LayerModule
from elo.probe.base import Scores, Subject, Trace, by_module, criterion, score_each


@criterion("block_influence", "1 - cosine of hidden states with and without it")
def score(subject: Subject) -> Scores:
    """Score by 1 - cosine between a layer's outputs with and without the module, as a mean over tokens.

    Without the whole layer, the output is the layer's input.
    """
    found = {}
    for language, ids_NT in subject.sequences.items():
        trace = Trace(subject, ids_NT)

        def influence(index: int, which: LayerModule, trace: Trace = trace) -> float:
            with torch.no_grad(), trace.skipped(index, which):
                without_NTD = trace.output_again(index).float()
            cosine_NT = nn.functional.cosine_similarity(without_NTD, trace.output(index).float(), dim=-1)
            return float(1 - cosine_NT.mean())

        found[language] = score_each(subject, influence)
    return by_module(found)
