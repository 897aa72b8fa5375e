"""Interface of the criteria, which score every decoder layer, its attention and its feed-forward part.

A criterion is one file in this package: a function with the decorator `criterion`. Importing `elo.probe.criteria`
imports all of these files. For every criterion, a higher score means more important.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import LayerModule, layers_of, modules_in
from elo.checkpoint.layer_outputs import entering, leaving, with_leaving
from elo.evaluate.scoring import forward_logits

MODULES: tuple[LayerModule, ...] = ("layer", "attention", "mlp")
BATCH_TOKENS = 4096
"""Maximum number of tokens that go through the model together."""

Scores = dict[LayerModule, dict[str, list[float]]]
"""Module, then language (or pair of languages), then one score per decoder layer."""


@dataclass(frozen=True)
class Subject:
    """The model that is probed, and the text.

    Attributes:
        model: the model, with all parameters frozen.
        sequences: token ids [N, T] by language.
        sentences: token ids of parallel sentences by language, in the same order; empty without parallel text.
        autocast: dtype of autocast; None computes in the model's dtype.
    """

    model: PreTrainedModel
    sequences: Mapping[str, Tensor]
    sentences: Mapping[str, Sequence[Tensor]]
    autocast: torch.dtype | None = None

    @cached_property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.model)

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def loss(self, ids_NT: Tensor) -> Tensor:
        """Return the mean cross-entropy of the sequences [N, T], in nats per predicted token."""
        logits_NTV = self.run(ids_NT)
        return nn.functional.cross_entropy(logits_NTV[:, :-1].float().flatten(0, 1), ids_NT[:, 1:].flatten())

    def run(self, ids_NT: Tensor, **inputs: Tensor) -> Tensor:
        """Return the logits [N, T, V]."""
        with self.computing():
            return forward_logits(self.model, input_ids=ids_NT, **inputs)

    def computing(self) -> torch.autocast:
        """Return the autocast context of the model's computations."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class Criterion:
    """A way to score layers.

    Attributes:
        label: measured quantity with its unit, for charts and tables.
        score: function that scores every module of every layer.
        needs_parallel: whether the criterion needs parallel sentences.
    """

    name: str
    label: str
    score: Callable[[Subject], Scores]
    needs_parallel: bool = False


CRITERIA: dict[str, Criterion] = {}
"""All criteria, by name."""


def criterion(
    name: str, label: str, *, needs_parallel: bool = False
) -> Callable[[Callable[[Subject], Scores]], Callable[[Subject], Scores]]:
    """Register a function as a criterion."""

    def register(score: Callable[[Subject], Scores]) -> Callable[[Subject], Scores]:
        CRITERIA[name] = Criterion(name, label, score, needs_parallel)
        return score

    return register


def score_each(subject: Subject, score: Callable[[int, LayerModule], float]) -> dict[LayerModule, list[float]]:
    """Call `score` for every module of every layer. A layer without the module scores 0."""
    return {
        which: [score(index, which) if modules_in(layer, which) else 0.0 for index, layer in enumerate(subject.layers)]
        for which in MODULES
    }


def by_module(by_language: Mapping[str, Mapping[LayerModule, list[float]]]) -> Scores:
    """Regroup scores from language, then module, to module, then language."""
    return {which: {language: list(found[which]) for language, found in by_language.items()} for which in MODULES}


class Trace:
    """The inputs and outputs of each layer for a batch, so that a changed layer and those above it can be recomputed.

    Attributes:
        share: share of the batch among the sequences of the text.
        base: loss of the unchanged model, in nats per predicted token.
    """

    def __init__(self, subject: Subject, ids_NT: Tensor, share: float) -> None:
        self.subject, self.ids, self.share = subject, ids_NT, share
        self._calls: list[tuple[Any, Any]] = []
        self._outputs: list[Any] = []
        with torch.no_grad(), ExitStack() as hooks:
            for layer in subject.layers:
                hooks.callback(layer.register_forward_hook(self._record, with_kwargs=True).remove)
            self.base = float(subject.loss(ids_NT))

    def _record(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._calls.append((args, kwargs))
        self._outputs.append(output)

    def input(self, index: int) -> Tensor:
        """Return the hidden states that enter layer `index`."""
        hidden: Tensor = entering(*self._calls[index])
        return hidden

    def output(self, index: int) -> Tensor:
        """Return the hidden states that leave layer `index`."""
        hidden: Tensor = leaving(self._outputs[index])
        return hidden

    def output_again(self, index: int) -> Tensor:
        """Compute layer `index` again on the same input, and return the hidden states that leave it."""
        args, kwargs = self._calls[index]
        with self.subject.computing():
            hidden: Tensor = leaving(self.subject.layers[index](*args, **kwargs))
        return hidden

    def loss(self, index: int) -> Tensor:
        """Recompute layer `index` and those above it, and return the loss in nats per predicted token."""
        with ExitStack() as changes:
            for below in range(index):
                changes.enter_context(self.replaced(below, self.input(index)))
            return self.subject.loss(self.ids)

    @contextmanager
    def replaced(self, index: int, output: Tensor | None = None) -> Iterator[None]:
        """Make layer `index` return `output` within the context, or its input if `output` is None."""
        layer, recorded = self.subject.layers[index], self._outputs[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return with_leaving(recorded, entering(args, kwargs) if output is None else output)

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward

    @contextmanager
    def skipped(self, index: int, which: LayerModule) -> Iterator[None]:
        """Keep a module of layer `index` from adding to the residual stream within the context."""
        with ExitStack() as changes:
            if which == "layer":
                changes.enter_context(self.replaced(index))
            for module in modules_in(self.subject.layers[index], which) if which != "layer" else ():
                changes.callback(module.register_forward_hook(_zero_output).remove)
            yield


def batches(ids_NT: Tensor) -> Sequence[Tensor]:
    """Divide sequences into batches of at most `BATCH_TOKENS` tokens, with at least one sequence each."""
    return ids_NT.split(max(1, BATCH_TOKENS // ids_NT.shape[1]))


def traces(subject: Subject, ids_NT: Tensor) -> Iterator[Trace]:
    """Yield the trace of each batch of the sequences."""
    for batch in batches(ids_NT):
        yield Trace(subject, batch, len(batch) / len(ids_NT))


def score_traces(
    subject: Subject, ids_NT: Tensor, score: Callable[[Trace, int, LayerModule], float]
) -> dict[LayerModule, list[float]]:
    """Call `score` for every batch and every module of every layer, and return the means over the sequences."""
    found = {which: [0.0] * len(subject.layers) for which in MODULES}
    for trace in traces(subject, ids_NT):
        for which, values in score_each(subject, partial(score, trace)).items():
            found[which] = [total + trace.share * value for total, value in zip(found[which], values, strict=True)]
    return found


def _zero_output(module: nn.Module, args: Any, output: Any) -> Any:
    return with_leaving(output, torch.zeros_like(leaving(output)))


@contextmanager
def gradients(subject: Subject) -> Iterator[None]:
    """Require gradients of the decoder layers' parameters within the context, and clear them on exit."""
    subject.layers.requires_grad_(True)
    try:
        yield
    finally:
        subject.layers.requires_grad_(False)
        subject.model.zero_grad()


def sums_of_gradients(
    subject: Subject, ids_NT: Tensor, measure: Callable[[nn.Parameter, Tensor], Tensor]
) -> dict[LayerModule, list[float]]:
    """Return the sum of `measure(weight, gradient)` over the parameters of every module of every layer.

    The gradients are those of the loss on `ids_NT`. Each one is freed as soon as it is measured, with the last batch.
    """
    found: dict[int, float] = {}

    def take(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        found[id(parameter)] = float(measure(parameter, parameter.grad))
        parameter.grad = None

    def backward(batch: Tensor) -> None:
        (subject.loss(batch) * (len(batch) / len(ids_NT))).backward()

    *earlier, last = batches(ids_NT)
    with gradients(subject), torch.enable_grad(), ExitStack() as hooks:
        for batch in earlier:
            backward(batch)
        for parameter in subject.layers.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        backward(last)
        for parameter in subject.layers.parameters():
            if parameter.grad is not None:  # such as an expert that no token of the last batch is sent to
                take(parameter)
    return {
        which: [
            sum((found.get(id(each), 0.0) for part in modules_in(layer, which) for each in part.parameters()), 0.0)
            for layer in subject.layers
        ]
        for which in MODULES
    }
