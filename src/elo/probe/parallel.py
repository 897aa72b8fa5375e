"""Difference between languages (after SLAM, arXiv 2501.03681): how differently a module treats a text's translation."""

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from elo.checkpoint.architecture import LayerModule, modules_in
from elo.checkpoint.layer_outputs import leaving
from elo.probe.base import MODULES, Scores, Subject, criterion

_BATCH = 16


@criterion("parallel", "1 - cosine of the outputs for parallel sentences", needs_parallel=True)
def score(subject: Subject) -> Scores:
    """Score by 1 - cosine of a module's output for a sentence and for its translation, by pair of languages.

    The output is a mean over the sentence's tokens, each scaled to norm 1 because a few tokens have huge hidden states,
    less the mean over all sentences of both languages. 0: the languages are treated alike; 2: only the language counts.
    """
    means = {language: _sentence_means(subject, sentences) for language, sentences in subject.sentences.items()}
    found: Scores = {which: {} for which in MODULES}
    for one, other in combinations(means, 2):
        for which in MODULES:
            a_SLD, b_SLD = means[one][which], means[other][which]
            centre_LD = torch.cat([a_SLD, b_SLD]).mean(0)
            cosine_SL = nn.functional.cosine_similarity(a_SLD - centre_LD, b_SLD - centre_LD, dim=-1)
            found[which][f"{one}-{other}"] = (1 - cosine_SL.mean(0)).tolist()
    return found


def _sentence_means(subject: Subject, sentences: Sequence[Tensor]) -> dict[LayerModule, Tensor]:
    """Return the mean output [sentences, layers, width] of each module."""
    found: dict[LayerModule, list[Tensor]] = {which: [] for which in MODULES}
    for start in range(0, len(sentences), _BATCH):
        batch = list(sentences[start : start + _BATCH])
        ids_NT = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(subject.device)
        mask_NT = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in batch], batch_first=True).to(ids_NT)
        outputs: dict[Any, Tensor] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for index, layer in enumerate(subject.layers):
                for which in MODULES:
                    # Of several, such as the two linear layers of OPT's feed-forward part, the last has the output.
                    for module in modules_in(layer, which)[-1:]:
                        hook = functools.partial(_record, outputs, (which, index), mask_NT)
                        hooks.callback(module.register_forward_hook(hook).remove)
            subject.run(ids_NT, attention_mask=mask_NT)
        nothing = torch.zeros_like(outputs["layer", 0])
        for which in MODULES:
            each = [outputs.get((which, index), nothing) for index in range(len(subject.layers))]
            found[which].append(torch.stack(each, 1).cpu())
    return {which: torch.cat(parts) for which, parts in found.items()}


def _record(outputs: dict[Any, Tensor], key: Any, mask_NT: Tensor, module: nn.Module, args: Any, output: Any) -> None:
    hidden_NTD = nn.functional.normalize(leaving(output).float(), dim=-1)
    if hidden_NTD.ndim == 2:  # a module that sees the tokens of all sentences in one row
        hidden_NTD = hidden_NTD.view(*mask_NT.shape, -1)
    outputs[key] = (hidden_NTD * mask_NT[..., None]).sum(1) / mask_NT.sum(1, keepdim=True)
