"""Match the tensors of a trained detached checkpoint with those of the base, and compare them.

Any tool may have saved the detached checkpoint: in other shards, in another dtype, and with the names that transformers
writes, which can differ from the names in the base's files.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from elo.checkpoint.naming import load_hollow, map_names, quiet_transformers
from elo.checkpoint.tensor_files import CHUNK_BYTES, Checkpoint, StoredTensor, open_checkpoint
from elo.errors import EloError
from elo.surgery.equivalence import build_hollow
from elo.surgery.in_memory import same_values


def match_tensors(
    wanted: dict[str, StoredTensor],
    trained: Checkpoint,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    scratch: Path,
) -> dict[str, StoredTensor]:
    """Find the trained tensor for each name in `wanted`. Tensors that the model can be loaded without may be missing.

    Args:
        wanted: the base's tensors, by their names in a detached checkpoint.
        trained: trained detached checkpoint.
        model_class: class of the model.
        config: configuration of the detached model.
        scratch: empty folder for the trained tensors under the base's names, if they have to be converted.

    Raises:
        EloError: a tensor is missing or unknown to the base, or a tied head differs from the embedding.
    """
    hollow = build_hollow(model_class, config)
    matched, absent = match_names(wanted, trained, hollow)
    if absent and not redundant(wanted, absent, model_class, config):
        trained = _under_base_names(wanted, trained, model_class, config, scratch)
        matched, absent = match_names(wanted, trained, hollow)
        if absent and not redundant(wanted, absent, model_class, config):
            raise EloError(f"{trained.folder}: {min(absent)} is missing; save all tensors of the detached model")
    used = {tensor.name for tensor in matched.values()}
    extra = trained.tensors.keys() - used
    if extra:
        _, report = load_hollow(model_class, config, {name: trained.tensors[name].meta() for name in used})
        _, full_report = load_hollow(model_class, config, trained.meta_state_dict())
        unknown = map_names(hollow, trained.meta_state_dict()).unknown
        for name in sorted(extra):
            if report.incomplete() or unknown.get(name) in full_report.unexpected:
                raise EloError(
                    f"{trained.folder}: has {name}, which the base does not have; save only the detached model's "
                    "tensors (merge adapters first)"
                )
            _require_copy(trained.tensors[name], matched.values())
    return matched


def paired_chunks(base: StoredTensor, other: StoredTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield matching chunks of two tensors of one shape as flat tensors, each in its stored dtype."""
    elements = CHUNK_BYTES // 16
    base_chunks = base.chunks(elements * base.torch_dtype.itemsize)
    other_chunks = other.chunks(elements * other.torch_dtype.itemsize)
    for base_bytes, other_bytes in zip(base_chunks, other_chunks, strict=True):
        yield (
            torch.frombuffer(bytearray(base_bytes), dtype=base.torch_dtype),
            torch.frombuffer(bytearray(other_bytes), dtype=other.torch_dtype),
        )


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def same_bytes(base: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors are equal bit for bit in the narrower of their dtypes."""
    return base.shape == other.shape and all(same_values(*pair) for pair in paired_chunks(base, other))


def _require_copy(extra: StoredTensor, matched: Iterable[StoredTensor]) -> None:
    """Raise EloError if a redundant tensor, such as a tied head, differs from the tensor that it is tied to."""
    alike = [tensor for tensor in matched if tensor.shape == extra.shape and tensor.dtype == extra.dtype]
    if extra.name.endswith(".weight") and alike and not any(same_bytes(tensor, extra) for tensor in alike):
        raise EloError(
            f"{extra.file}: {extra.name} is tied to the embedding in the base, but differs from it here; "
            "train with tied embeddings, or use a base without them"
        )


def match_names(
    wanted: Mapping[str, StoredTensor], other: Checkpoint, hollow: PreTrainedModel
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Match tensors that load into the same tensor of the model `hollow`, even if their names in the files differ.

    Returns:
        Matched tensors of `other` by their names in `wanted`, and the names in `wanted` without a match.
    """
    theirs = map_names(hollow, other.meta_state_dict())
    found = {theirs.identity(name): tensor for name, tensor in other.tensors.items()}
    ours = map_names(hollow, {name: tensor.meta() for name, tensor in wanted.items()})
    identities = {name: ours.identity(name) for name in wanted}
    matched = {name: found[identity] for name, identity in identities.items() if identity in found}
    return matched, wanted.keys() - matched.keys()


def redundant(
    wanted: dict[str, StoredTensor], absent: set[str], model_class: type[PreTrainedModel], config: PretrainedConfig
) -> bool:
    """Return whether the model loads completely without `absent`, such as tied heads or buffers of older versions."""
    rest = {name: tensor.meta() for name, tensor in wanted.items() if name not in absent}
    return bool(rest) and load_hollow(model_class, config, rest)[1].incomplete() is None


def _under_base_names(
    wanted: dict[str, StoredTensor],
    trained: Checkpoint,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    scratch: Path,
) -> Checkpoint:
    """Load the trained model and save it in `scratch` with the tensor names of the base's files.

    This holds the detached model in memory. It is needed only if the files store tensors in different forms, such as
    fused and separate experts.
    """
    with quiet_transformers():
        loaded: Any = model_class.from_pretrained(trained.folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        first = min(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise EloError(
            f"{trained.folder}: the tensors do not match the model in config.json: {first}; save the model again"
        )
    template, _ = load_hollow(model_class, config, {name: tensor.meta() for name, tensor in wanted.items()})
    with quiet_transformers():
        template.save_pretrained(scratch, state_dict=model.state_dict())
    return open_checkpoint(scratch)
