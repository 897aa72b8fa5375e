"""Block influence (ShortGPT, arXiv 2403.03853): how much a module changes the direction of the hidden states."""

import torch
from torch import nn

from elo.checkpoint.architecture import LayerModule
from elo.probe.base import Scores, Subject, Trace, by_module, criterion, score_traces


@criterion("block_influence", "1 - cosine of hidden states with and without it")
def score(subject: Subject) -> Scores:
    """Score by 1 - cosine between a layer's outputs with and without the module, as a mean over tokens.

    Without the whole layer, the output is the layer's input.
    """
    return by_module(
        {language: score_traces(subject, ids_NT, _influence) for language, ids_NT in subject.sequences.items()}
    )


def _influence(trace: Trace, index: int, which: LayerModule) -> float:
    with torch.no_grad(), trace.skipped(index, which):
        without_NTD = trace.output_again(index).float()
    cosine_NT = nn.functional.cosine_similarity(without_NTD, trace.output(index).float(), dim=-1)
    return float(1 - cosine_NT.mean())
