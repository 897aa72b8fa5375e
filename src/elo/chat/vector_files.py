"""Add a chat vector, the change of chat training, to a model adapted from the same base (arXiv 2310.04799)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.folder import (
    TEMPLATE_PATTERNS,
    TOKENIZER_PATTERNS,
    CheckpointFolder,
    copy_side_files,
    copy_unlisted_weights,
    open_folder,
    refuse_overlap,
    write_config,
)
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.naming import NameMap, map_names
from elo.checkpoint.new_rows import first_new_row_of
from elo.checkpoint.tensor_files import CHUNK_BYTES, MAX_SHARD_BYTES, NewTensor, StoredTensor, write_checkpoint
from elo.errors import EloError
from elo.store.files import atomic_directory, disk_errors_told
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.surgery.in_memory import INCLUDABLE
from elo.surgery.layer_config import edit_json
from elo.surgery.matching import match_names, redundant, tensor_bytes
from elo.surgery.provenance import PROVENANCE_KEY

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAYS_NOTHING = {
    *_TOKEN_IDS, "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Keys of config.json that do not affect computation, so a base and its chat model may differ in them."""


def add_chat_vector(
    adapted: Path,
    base: Path,
    chat: Path,
    output: Path,
    *,
    save_tokenizer: Callable[[Path], None],
    check: Callable[[Path], None] = lambda folder: None,
    scale: float = 1.0,
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str | None = None,
) -> dict[str, Any]:
    """Write adapted + scale * (chat - base), tensor by tensor, without holding a model in memory.

    Sums are computed in float64 and rounded once, to the adapted model's dtype. Tensors in which the adapted model
    equals the base become those of the chat model, bit for bit.

    Embedding and head rows that base and chat do not have, such as those of `elo vocab`, are kept. Rows that only the
    chat model has, such as those of ChatML's tokens, are copied from it, even in parts that are left out.

    The bos, eos and pad token ids and generation_config.json come from the chat model, the rest of config.json from the
    adapted model.

    Args:
        adapted: folder of a checkpoint trained from `base`.
        base: folder of the base of both models.
        chat: folder of the chat model made from `base`.
        output: folder to write. It appears only when complete.
        save_tokenizer: writes the tokenizer's files and chat template into a folder.
        check: called with the complete folder before it is renamed to `output`; raises EloError to reject it.
        scale: factor for the vector.
        leave_out: parts to which nothing is added, among "embedding", "norm" and "head". If embedding and head are
            tied, either name covers both.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoints' own Python code to define the model.
        max_shard_bytes: maximum size of a weight file, in bytes.
        label: label of the progress bar; None shows no progress.

    Returns:
        {"adapted", "base", "chat", "scale", "leave_out", "tensors" (number of tensors the vector was added to),
        "rows_kept" (unchanged rows of embedding and head), "rows_added" (rows that only the chat model has), "differs"
        (keys of config.json in which chat model and base differ; the adapted model's values are kept)}

    Raises:
        EloError: a folder cannot be used, or the three models do not match. The message names the first tensor.
    """
    ours, theirs, chats = (open_folder(folder, trust_remote_code) for folder in (adapted, base, chat))
    for each in (ours, theirs, chats):
        refuse_overlap(output, each.folder)
    sums = _sums(ours, theirs, chats, scale, leave_out, trust_remote_code)
    added = max((each.rows_added for each in sums), default=0)
    resized = ours.config_json
    if added:
        resized = edit_json(resized, ours.config, {"vocab_size": text_config_of(ours.config).vocab_size + added})
    config_json = resized | {key: chats.config_json[key] for key in _TOKEN_IDS if key in chats.config_json}
    with disk_errors_told(output), atomic_directory(output, overwrite=overwrite) as folder:
        write_config(folder, config_json)
        save_tokenizer(folder)  # first, because it may fail and the weights are large
        write_checkpoint(folder, [each.tensor() for each in sums], max_shard_bytes, label)
        copy_unlisted_weights(ours.weights, folder)
        copy_side_files(chats.folder, folder, python=trust_remote_code, leave_out=TOKENIZER_PATTERNS)
        without = (*TOKENIZER_PATTERNS, *TEMPLATE_PATTERNS)
        copy_side_files(ours.folder, folder, python=trust_remote_code, leave_out=without)
        check(folder)
    return {
        "adapted": str(adapted),
        "base": str(base),
        "chat": str(chat),
        "scale": scale,
        "leave_out": list(leave_out),
        "tensors": sum(each.elements > 0 for each in sums),
        "rows_kept": max((each.rows_kept for each in sums), default=0),
        "rows_added": added,
        "differs": sorted(
            key
            for key in theirs.config_json.keys() | chats.config_json.keys()
            if key not in (_SAYS_NOTHING | ({"vocab_size"} if added else set()))
            and theirs.config_json.get(key) != chats.config_json.get(key)
        ),
    }


def check_models(
    adapted: Path, base: Path, chat: Path, *, leave_out: Sequence[str] = (), trust_remote_code: bool = False
) -> None:
    """Raise EloError if `add_chat_vector` would refuse these checkpoints, without reading weights."""
    ours, theirs, chats = (open_folder(folder, trust_remote_code) for folder in (adapted, base, chat))
    _sums(ours, theirs, chats, 1.0, leave_out, trust_remote_code)


def _sums(
    ours: CheckpointFolder,
    theirs: CheckpointFolder,
    chats: CheckpointFolder,
    scale: float,
    leave_out: Sequence[str],
    trust_remote_code: bool,
) -> "list[_Sum]":
    """Match the tensors of the three models. Raise EloError if they are not of one architecture."""
    for name in leave_out:
        if name not in INCLUDABLE:
            raise EloError(f"leave_out: there is no {name!r}; choose among {', '.join(INCLUDABLE)}")
    for each in (ours, theirs, chats):
        if PROVENANCE_KEY in each.config_json:
            raise EloError(f"{each.folder}: is a detached checkpoint; attach its layers first, or give the full model")
        if each.config.model_type != ours.config.model_type:
            raise EloError(
                f"{each.folder}: has model type {each.config.model_type}, but {ours.folder} has "
                f"{ours.config.model_type}; give an adapted model, base and chat model of the same architecture"
            )
    hollow = build_hollow_causal_lm(ours.config, trust_remote_code=trust_remote_code)
    names, tied = map_names(hollow, ours.weights.meta_state_dict()), find_architecture(hollow).tied
    left_out = {*leave_out}
    if tied and left_out & {"embedding", "head"}:
        left_out |= {"embedding", "head"}
    in_base, in_chat = (_matched(ours, each, hollow, names) for each in (theirs, chats))
    return [
        _Sum.of(
            tensor,
            in_base.get(name),
            in_chat.get(name),
            ours,
            names.group(name),
            0.0 if names.group(name) in left_out else scale,
        )
        for name, tensor in ours.weights.tensors.items()
    ]


@dataclass(frozen=True)
class _Sum:
    """A tensor of the adapted model, the change added to its first `elements`, and rows added from the chat model."""

    adapted: StoredTensor
    base: StoredTensor
    chat: StoredTensor
    scale: float
    elements: int
    rows_added: int = 0

    @classmethod
    def of(
        cls,
        adapted: StoredTensor,
        base: StoredTensor | None,
        chat: StoredTensor | None,
        ours: CheckpointFolder,
        group: str | None,
        scale: float,
    ) -> "_Sum":
        """Add `scale` times the change of chat training to the rows that all three models have."""
        added = 0
        if group in ("embedding", "head") and base is not None and chat is not None and adapted.shape == base.shape:
            added = max(0, chat.shape[0] - base.shape[0]) if chat.shape[1:] == base.shape[1:] else 0
        if base is None or chat is None or scale == 0 or not adapted.torch_dtype.is_floating_point:
            return cls(adapted, adapted, chat if added and chat is not None else adapted, 0.0, 0, added)
        if added:
            return cls(adapted, base, chat, scale, math.prod(base.shape), added)
        longer = group in ("embedding", "head") and adapted.shape[0] >= base.shape[0]
        if base.shape != chat.shape or adapted.shape[longer:] != base.shape[longer:]:
            raise EloError(
                f"{chat.file}: {chat.name} is {list(chat.shape)}, {list(base.shape)} in the base and "
                f"{list(adapted.shape)} in {ours.folder}; "
                + (
                    "leave embedding and head out, or give a chat model with at least the base's rows"
                    if group in ("embedding", "head")
                    else "give an adapted model and a chat model made from the same base"
                )
            )
        first_new = first_new_row_of(ours.config, "embedding" if longer else None)
        rows = base.shape[0] if first_new is None else min(first_new, base.shape[0])
        return cls(adapted, base, chat, scale, rows * math.prod(adapted.shape[1:]) if longer else math.prod(base.shape))

    @property
    def rows_kept(self) -> int:
        """Number of unchanged rows at the end of the tensor; 0 if nothing is added to the tensor at all."""
        return (
            (math.prod(self.adapted.shape) - self.elements) // math.prod(self.adapted.shape[1:]) if self.elements else 0
        )

    def tensor(self) -> NewTensor:
        """Return the sum, whose bytes are computed while they are written."""
        each = self.adapted
        shape = (each.shape[0] + self.rows_added, *each.shape[1:]) if self.rows_added else each.shape
        size = math.prod(shape) * each.size // max(1, math.prod(each.shape))
        return NewTensor(each.name, each.dtype, shape, size, self._with_added_rows)

    def _with_added_rows(self) -> Iterator[bytes]:
        yield from self._chunks() if self.elements else self.adapted.chunks()
        if self.rows_added:
            rows = bytearray(self.chat.read(self.chat.size // self.chat.shape[0] * self.adapted.shape[0]))
            tail = torch.frombuffer(rows, dtype=self.chat.torch_dtype)
            yield tensor_bytes(tail.to(self.adapted.torch_dtype))

    def _chunks(self) -> Iterator[bytes]:
        step, left = CHUNK_BYTES // 16, self.elements
        streams = [each.chunks(step * each.torch_dtype.itemsize) for each in (self.adapted, self.base, self.chat)]
        for chunks in zip_longest(*streams, fillvalue=b""):  # the adapted model may have more rows
            count = min(left, len(chunks[0]) // self.adapted.torch_dtype.itemsize)
            if count == 0:
                yield chunks[0]
                continue
            adapted, base, chat = (
                torch.frombuffer(bytearray(chunk), dtype=each.torch_dtype)
                for chunk, each in zip(chunks, (self.adapted, self.base, self.chat), strict=True)
            )
            change = chat[:count].double().sub_(base[:count]).mul_(self.scale)
            adapted[:count] = change.add_(adapted[:count])  # the only rounding
            left -= count
            yield tensor_bytes(adapted)


def _matched(
    ours: CheckpointFolder, other: CheckpointFolder, hollow: PreTrainedModel, names: NameMap
) -> dict[str, StoredTensor]:
    """Map names in our checkpoint to the tensors of another one of the same model. Redundant tensors may be missing."""
    found, absent = match_names(ours.weights.tensors, other.weights, hollow)
    embedding = next((found[name] for name in found if names.group(name) == "embedding"), None)
    extra = other.weights.tensors.keys() - {tensor.name for tensor in found.values()}
    for folder, without, alone in ((ours, other, absent), (other, ours, extra)):
        if alone and not redundant(folder.weights.tensors, alone, type(hollow), folder.config):
            raise EloError(
                f"{folder.folder}: has {min(alone)}, but {without.folder} does not; give an adapted model and a chat "
                "model made from the same base (merge adapters first)"
            )
    tied = {name for name in absent if find_architecture(hollow).tied and names.group(name) == "head"}
    return found | (dict.fromkeys(tied, embedding) if embedding else {})
