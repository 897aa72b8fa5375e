"""Give embedding and LM head their own learning rate in an optimizer, and keep old vocabulary rows unchanged."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import get_rank
from torch.distributed.tensor import distribute_tensor

from elo.checkpoint.architecture import find_architecture


def set_embeddings_apart(
    optimizer: torch.optim.Optimizer, model: Any, learning_rate: float | None = None, first_row: int = 0
) -> None:
    """Move trained embedding and head weights to separate groups of an optimizer that has not stepped yet.

    With `first_row`, the optimizer gets only the rows from there on, as a view into the weight. Weight decay, moments
    and rounding then cannot change the other rows, and they have no optimizer state. Their gradients are set to zero,
    so that clipping ignores them too.

    Args:
        model: model on its training device. It must not be moved afterwards, because views share its memory.
        learning_rate: peak learning rate of these groups; None keeps that of the other groups.
        first_row: first row of [V, D] weights and [V] biases that changes.
    """
    apart = {id(each) for each in _trained(model)}
    for group in list(optimizer.param_groups):
        found = [each for each in group["params"] if id(each) in apart]
        if not found:
            continue
        group["params"] = [each for each in group["params"] if id(each) not in apart]
        chosen = [_rows_from(optimizer, each, first_row) for each in found] if first_row else found
        settings = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group(
            {**settings, "params": chosen, "lr": group["lr"] if learning_rate is None else learning_rate}
        )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def keep_old_rows(optimizer: torch.optim.Optimizer, model: Any, first_row: int) -> Callable[[], None]:
    """Keep the rows before `first_row` of trained embedding and head weights unchanged under FSDP.

    The optimizer has whole shards, with moments for all rows. The old rows' values are restored after each update.

    Returns:
        A function that sets the gradients of old rows to zero. Call it before clipping.
    """
    sharded: list[Any] = list(_trained(model))
    num_old: list[int] = []
    for weight in sharded:
        numbers = torch.arange(len(weight), device=weight.device_mesh.device_type)
        local = distribute_tensor(numbers, weight.device_mesh, weight.placements).to_local()
        num_old.append(int((local < first_row).sum()))

    def drop_gradients() -> None:
        for weight, count in zip(sharded, num_old, strict=True):
            if weight.grad is not None:
                weight.grad.to_local()[:count].zero_()

    _restore_after_step(
        optimizer, lambda: [each.detach().to_local()[:n] for each, n in zip(sharded, num_old, strict=True)]
    )
    return drop_gradients


def keep_old_rows_in_flat(
    optimizer: torch.optim.Optimizer, owners: Sequence[nn.Parameter], model: Any, first_row: int
) -> None:
    """Keep the rows before `first_row` of trained embedding and head weights unchanged under DeepSpeed.

    Args:
        optimizer: DeepSpeed's optimizer, in which each of these weights is a flat shard in a separate group.
        owners: one parameter of each group, from `elo.train.distributed.divide_groups`.
    """
    num_old: dict[int, int] = {}
    for weight in _trained(model):
        weight.register_hook(lambda gradient: _without_rows(gradient, first_row))
        num_old[id(weight)] = first_row * math.prod(getattr(weight, "ds_shape", weight.shape)[1:])

    def old_elements() -> list[torch.Tensor]:
        shards = [
            (num_old.get(id(owners[g["number"]]), 0), flat) for g in optimizer.param_groups for flat in g["params"]
        ]
        return [flat.detach()[: max(0, count - get_rank() * flat.numel())] for count, flat in shards]

    _restore_after_step(optimizer, old_elements)


def _restore_after_step(optimizer: torch.optim.Optimizer, views: Callable[[], list[torch.Tensor]]) -> None:
    """Restore the values of `views()`, which share memory with an optimizer's parameters, after each of its steps."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        kept.extend((view, view.clone()) for view in views())

    def restore(*_: Any) -> None:
        for view, before in kept:
            view.copy_(before)
        kept.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(restore)


def rows_left_out(model: Any, first_row: int) -> int:
    """Return the number of elements of trained embedding and head weights in rows before `first_row`."""
    return sum(each[:first_row].numel() for each in _trained(model))


def _trained(model: Any) -> list[nn.Parameter]:
    """Return the trained weights and biases of embedding and head; a tied weight only once."""
    parts = find_architecture(model)
    modules = [model.get_submodule(path) for path in (parts.embedding_path, parts.head_path)]
    every = {id(each): each for module in modules for each in module.parameters() if each.requires_grad}
    return list(every.values())


def _rows_from(optimizer: torch.optim.Optimizer, weight: nn.Parameter, first_row: int) -> nn.Parameter:
    """Return the rows of a weight from `first_row` on as a parameter that shares the weight's memory.

    During an optimizer's step, it shares the gradient too.
    """
    rows = nn.Parameter(weight.data[first_row:])

    def lend(*_: Any) -> None:
        rows.grad = None if weight.grad is None else weight.grad[first_row:]

    def give_back(*_: Any) -> None:
        rows.grad = None

    weight.register_hook(lambda gradient: _without_rows(gradient, first_row))
    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(give_back)
    return rows


def _without_rows(gradient: torch.Tensor, first_row: int) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:first_row] = 0
    return gradient
