"""Hidden states that enter and leave decoder layers, and the norm that turns the last ones into the head's input."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture, layers_of


class LayerOutputs:
    """Hooks on a model that record the hidden states [B, T, D] after some of its decoder layers."""

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        self._recorded: dict[int, Tensor] | None = None
        modules = layers_of(model)
        self._hooks = [modules[index].register_forward_hook(self._record(index)) for index in layers]

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs by layer, filled by the forward pass within the context.

        Outside it the hooks do nothing: activation checkpointing runs the layers again in the backward pass.
        """
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int) -> Any:
        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            if self._recorded is not None:
                self._recorded[index] = leaving(output)

        return after


def entering(args: Any, kwargs: Any) -> Any:
    """Return the hidden states among a layer's arguments; None if there are none."""
    return args[0] if args else kwargs.get("hidden_states")


def with_entering(args: Any, kwargs: Any, hidden: Tensor | None) -> tuple[Any, Any]:
    """Return a layer's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def leaving(output: Any) -> Any:
    """Return the hidden states in the output of a layer or a module."""
    return output[0] if isinstance(output, tuple) else output


def with_leaving(output: Any, hidden: Tensor) -> Any:
    """Return the output of a layer or a module with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after the last decoder layer; the identity if the model has none."""
    path = find_architecture(model).norm_path
    return nn.Identity() if path is None else model.get_submodule(path)
