"""Importance of weights and activations, fused into one score (after SAAP, arXiv 2412.15127)."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elo.checkpoint.architecture import LayerModule, modules_in
from elo.probe.base import MODULES, Scores, Subject, by_module, criterion, sums_of_gradients


@criterion("importance", "fused importance of weights and activations (mean 1)")
def score(subject: Subject) -> Scores:
    """Score by the weighted mean of two kinds of importance, each relative to its mean over layers.

    - Fine: |weight x gradient|, the first-order change of the loss if the weight were zero.
    - Coarse: |weight| x norm of the input feature that it multiplies.

    As in SAAP, each kind is weighted by the inverse of its variance, here between sequences.
    """
    found = {}
    for language, ids_NT in subject.sequences.items():
        fine, coarse = [], []
        for row_1T in ids_NT.split(1):
            activations: dict[int, Tensor] = {}
            with _recording_input_norms(subject, activations):
                fine.append(sums_of_gradients(subject, row_1T, lambda weight, slope: (weight * slope).abs().sum()))
            coarse.append(_coarse_importance(subject, activations))
        found[language] = {
            which: _fuse([[sums[which] for sums in kind] for kind in (fine, coarse)]).tolist() for which in MODULES
        }
    return by_module(found)


def _recording_input_norms(subject: Subject, found: dict[int, Tensor]) -> ExitStack:
    """Record the norm of each input feature of every linear layer within the returned context, by the layer's `id`."""

    def record(module: nn.Module, args: Any) -> None:
        found[id(module)] = args[0].detach().float().flatten(0, -2).norm(dim=0)

    hooks = ExitStack()
    for module in subject.layers.modules():
        if isinstance(module, nn.Linear | Conv1D):
            hooks.callback(module.register_forward_pre_hook(record).remove)
    return hooks


def _coarse_importance(subject: Subject, activations: dict[int, Tensor]) -> dict[str, list[float]]:
    """Sum |weight| x input norm over the linear layers of each module."""

    def total(part: nn.Module) -> float:
        found = 0.0
        for each in part.modules():
            if (norms := activations.get(id(each))) is not None:
                assert isinstance(each.weight, Tensor)
                found += float(each.weight.float().abs().sum(1 if isinstance(each, Conv1D) else 0) @ norms)
        return found

    def of_layer(layer: nn.Module, which: LayerModule) -> float:
        return sum((total(part) for part in modules_in(layer, which)), 0.0)

    return {which: [of_layer(layer, which) for layer in subject.layers] for which in MODULES}


def _fuse(kinds: list[list[list[float]]]) -> Tensor:
    """Fuse kinds of importance, each [sequences][layers], into one score per layer with mean 1."""
    fused, weights = torch.zeros(len(kinds[0][0]), dtype=torch.float64), 0.0
    for by_sequence in kinds:
        values_NL = torch.tensor(by_sequence, dtype=torch.float64)
        if not values_NL.any():  # no linear layers, such as in stacked experts
            continue
        values_NL = values_NL / values_NL.mean(1, keepdim=True).clamp_min(1e-30)
        certainty = 1.0 / (float(values_NL.var(0, correction=0).mean()) + 1e-6)
        fused += certainty * values_NL.mean(0)
        weights += certainty
    return fused / (weights or 1.0)
