"""Difference between languages (after SLAM, arXiv 2501.03681): how differently a module treats translations."""

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
    """Score by 1 - cosine between a module's outputs for a sentence and for its translation, by pair of languages.

    The output for a sentence is the mean over its tokens, minus the mean over all sentences of both languages. Each
    token is first scaled to norm 1, because a few tokens have huge hidden states. A score of 0 means that the languages
    are treated alike, a score of 2 that the output depends on the language alone.
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
    """Return each module's mean output over the tokens of each sentence: [sentences, layers, width]."""
    found: dict[LayerModule, list[Tensor]] = {which: [] for which in MODULES}
    for start in range(0, len(sentences), _BATCH):
        batch = list(sentences[start : start + _BATCH])
        ids_NT = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(subject.device)
        mask_NT = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in batch], batch_first=True).to(ids_NT)
        outputs: dict[Any, Tensor] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for index, layer in enumerate(subject.layers):
                for which in MODULES:
                    # If a part consists of several modules, as OPT's feed-forward part does, the last has its output.
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
    if hidden_NTD.ndim == 2:  # the module gets the tokens of all sentences as one dimension
        hidden_NTD = hidden_NTD.view(*mask_NT.shape, -1)
    outputs[key] = (hidden_NTD * mask_NT[..., None]).sum(1) / mask_NT.sum(1, keepdim=True)
