"""Stop the gradient below the trained layers, so that no backward pass runs there, or scale it at a layer."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture, layers_of
from elo.checkpoint.layer_outputs import entering, with_entering


class _Scaled(torch.autograd.Function):
    """The identity, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0] * ctx.factor, None


class GradientFloor:
    """Hooks on a model that stop the gradient below its trained layers, or scale it.

    While the floor is closed, neither the embedding's output nor the first layer's input has a gradient, so autograd
    builds no graph for the frozen layers at the bottom. A tied embedding still trains through the head. An untied
    embedding requires no gradient while the floor is closed, because FSDP and DeepSpeed would otherwise update it with
    a gradient of zero.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._embedding = embedding = model.get_submodule(find_architecture(model).embedding_path)
        self._closed = False
        tied = model.get_output_embeddings().weight is embedding.weight
        self._trains = embedding.weight.requires_grad and not tied
        self._scale: tuple[int, float] | None = None
        self._hooks = [embedding.register_forward_hook(self._after_embedding)]
        for index, layer in enumerate(layers_of(model)):
            self._hooks.append(layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True))

    def close(self) -> None:
        """Stop the gradient at the embedding's output."""
        self._closed, self._scale = True, None
        self._set_gradient(False)

    def open(self, layer_idx: int = 0, scale: float = 1.0) -> None:
        """Let the gradient pass, multiplied by `scale` below layer `layer_idx`."""
        self._closed, self._scale = False, None if scale == 1.0 else (layer_idx, scale)
        self._set_gradient(True)

    def supervised_output(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Return a layer's output for a loss of its own, whose gradient is scaled as if it came from above."""
        if self._scale is None or layer_idx >= self._scale[0]:
            return hidden
        return _scaled(hidden, self._scale[1])

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _set_gradient(self, required: bool) -> None:
        if self._trains:
            self._embedding.weight.requires_grad_(required)

    def _after_embedding(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach() if self._closed else output

    def _before_layer(self, index: int) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._closed and index == 0:  # position embeddings and norms may come after the embedding
                change: Callable[[Tensor], Tensor] = Tensor.detach
            elif self._scale is not None and self._scale[0] == index:
                change = functools.partial(_scaled, factor=self._scale[1])
            else:
                return None
            return with_entering(args, kwargs, change(entering(args, kwargs)))

        return before


def _scaled(hidden: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _Scaled.apply(hidden, factor)
    return scaled
