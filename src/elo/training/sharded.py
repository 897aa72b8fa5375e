"""Weights that FSDP holds in pieces, one part of the model at a time: no process ever holds the whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import FSDP_MODEL_NAME

from elo.errors import EloError
from elo.model.architecture import find_architecture


def check_sharding(trainer: Any, checkpoint: Path | None) -> None:
    """Raise EloError for FSDP of the first kind, or where a checkpoint was written with FSDP and is read without it."""
    sharded = trainer.is_fsdp_enabled
    if sharded and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise EloError("FSDP: the launcher asks for its first version; only FSDP2 is supported (fsdp_version: 2)")
    if checkpoint is None:
        return
    was = (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir()
    if was != sharded:
        way, other = ("with", "without") if was else ("without", "with")
        raise EloError(
            f"{checkpoint}: was written {way} FSDP, and this run is {other}; go on {way} it (training_arguments.fsdp), "
            f"or remove {checkpoint.parent} to begin the phase anew"
        )


def whole_parts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Each decoder layer's tensors, and each tensor outside the layers, whole and on the CPU; tied ones once.

    What is given is decided when this is called; every process has to go through the iterator to its end, since all
    take part in putting a tensor together.
    """
    prefix = find_architecture(model).layers_path + "."
    parts: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = prefix + name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else name
        parts.setdefault(part, {})[name] = tensor

    def gather() -> Iterator[dict[str, Tensor]]:
        while parts:
            yield {name: _whole(tensor) for name, tensor in parts.pop(next(iter(parts))).items()}

    return gather()


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
        if hasattr(tensor, "wait"):  # gathered without waiting for it
            tensor = tensor.wait()
    return tensor.to("cpu")
