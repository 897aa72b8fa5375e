"""Give a checkpoint more embedding and head rows, on disk, with every old row as it was.

Shapes: V old rows, W new ones in all, D hidden width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from elo.errors import EloError, UnsupportedArchitectureError
from elo.model.architecture import Architecture, find_architecture, group_of
from elo.model.checkpoint_folder import (
    CheckpointFolder,
    copy_side_files,
    open_folder,
    read_edited_config,
    refuse_overlap,
    write_config,
)
from elo.model.config_surgery import edit_json, error_line
from elo.model.matching import tensor_bytes
from elo.model.naming import load_hollow
from elo.model.new_rows import VOCABULARY_KEY, NewRows
from elo.model.provenance import PROVENANCE_KEY
from elo.model.safeguard import build_hollow_causal_lm
from elo.model.tensor_files import MAX_SHARD_BYTES, NewTensor, StoredTensor, write_checkpoint
from elo.records import atomic_directory, disk_errors_told

Initialisation = Literal["pieces", "first", "mean", "noise"]
INITIALISATIONS: tuple[Initialisation, ...] = ("pieces", "first", "mean", "noise")
_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip


def extend_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    origins: Sequence[Sequence[int]],
    first_id: int,
    save_tokenizer: Callable[[Path], None],
    embedding_rows: Initialisation = "pieces",
    head_rows: Initialisation = "pieces",
    given: Mapping[str, torch.Tensor] | None = None,
    pad_to_multiple_of: int = 64,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a checkpoint with rows for `len(origins)` more tokens.

    Every tensor but the embedding and the head is copied byte for byte, and so are their old rows.

    Args:
        checkpoint: folder with config.json and safetensors weights.
        output: folder to write; it appears whole or not at all.
        origins: for each new token, the old tokens that its text was cut into.
        first_id: id of the first new token. The base may have rows from here on that no token of its used; they are
            taken for the new ones.
        save_tokenizer: writes the extended tokenizer's files into a folder.
        embedding_rows: what a new row begins as. `pieces`: the mean of the rows of the tokens that its text was cut
            into; `first`: the row of the first of these; `mean`: the mean of all old rows; `noise`: drawn from a normal
            distribution with the old rows' mean and deviation in each dimension.
        head_rows: the same for the LM head, where it is not tied to the embedding.
        given: `embedding` and, for an untied head, `head`, of [new tokens, D]: computed elsewhere, instead of these.
        pad_to_multiple_of: W is a multiple of this, as tensor cores like it.
        seed: of `noise`.
        record: further keys of the record in config.json.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.
        max_shard_bytes: size above which the weights are written as several files.

    Returns:
        The record in config.json: {"rows": {"start", "stop"}, "base_rows": V, "embedding_rows", "head_rows", ...}

    Raises:
        EloError: the checkpoint, the rows or the output is not usable.
        UnsupportedArchitectureError: transformers does not take the model with another vocabulary size.
    """
    base = open_folder(checkpoint, trust_remote_code)
    if PROVENANCE_KEY in base.config_json:
        raise EloError(f"{checkpoint}: is a detached checkpoint; extend the vocabulary of its base, then detach")
    refuse_overlap(output, checkpoint)
    hollow = build_hollow_causal_lm(base.config, trust_remote_code=trust_remote_code)
    parts = find_architecture(hollow)
    old_rows = _rows_of(hollow, parts)
    stop = first_id + len(origins)
    new_rows = max(old_rows, -(-stop // pad_to_multiple_of) * pad_to_multiple_of)
    edits = {"vocab_size": new_rows}
    config_json = edit_json(base.config_json, base.config, edits)
    written = {
        "rows": asdict(NewRows(first_id, stop)),
        "base_rows": old_rows,
        "embedding_rows": "given" if given else embedding_rows,
        "head_rows": None if parts.tied else "given" if given else head_rows,
        **(record or {}),
    }
    config_json[VOCABULARY_KEY] = written
    tensors = []
    resized = _resized(base, hollow, old_rows)
    _check_given(given, resized, (len(origins), _width(base, resized)), parts.tied)
    for name, tensor in base.weights.tensors.items():
        group = resized.get(name)
        if group is None:
            tensors.append(NewTensor(name, tensor.dtype, tensor.shape, tensor.size, tensor.chunks))
            continue
        how: Initialisation = embedding_rows if group == "embedding" or parts.tied else head_rows
        own_seed = seed + (group == "head")  # else noise would make an untied head's rows those of the embedding
        make = _Rows(tensor, origins, first_id, min(first_id, old_rows), new_rows, how, own_seed)
        values = (given or {}).get("embedding" if parts.tied else group)
        if values is not None and len(tensor.shape) == 2:
            make = make.with_values(values)
        tensors.append(NewTensor(name, tensor.dtype, (new_rows, *tensor.shape[1:]), make.size, make.chunks))
    _require_loadable(base, config_json, edits, tensors, trust_remote_code)
    with disk_errors_told(output), atomic_directory(output, overwrite=overwrite) as folder:
        write_config(folder, config_json)
        save_tokenizer(folder)  # which may refuse, so before gigabytes are written
        write_checkpoint(folder, tensors, max_shard_bytes)
        copy_side_files(checkpoint, folder, python=trust_remote_code, leave_out=_TOKENIZER_FILES)
    return written


def _width(base: CheckpointFolder, resized: Mapping[str, str]) -> int:
    return next(base.weights.tensors[name].shape[1] for name, group in resized.items() if group == "embedding")


def _rows_of(model: PreTrainedModel, parts: Architecture) -> int:
    weight = model.get_submodule(parts.embedding_path).weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


@dataclass(frozen=True)
class _Rows:
    """Makes the bytes of an embedding or head, of [V, D], or of a head's bias, of [V], with more rows."""

    tensor: StoredTensor
    origins: Sequence[Sequence[int]]
    first_id: int
    kept: int
    """Rows that are copied."""
    rows: int
    how: Initialisation
    seed: int
    values: torch.Tensor | None = None

    def with_values(self, values: torch.Tensor) -> "_Rows":
        return _Rows(self.tensor, self.origins, self.first_id, self.kept, self.rows, self.how, self.seed, values)

    @property
    def row_bytes(self) -> int:
        return self.tensor.size // self.tensor.shape[0]

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes

    def chunks(self) -> Iterator[bytes]:
        """The old rows' bytes, then the new ones'."""
        left = self.kept * self.row_bytes
        for chunk in self.tensor.chunks():
            yield chunk[:left]
            left -= len(chunk[:left])
            if not left:
                break
        yield tensor_bytes(self._new())

    def _new(self) -> torch.Tensor:
        """[W - kept, D]; rows of no token, old or new, stay as they are where the base has them, or are the mean."""
        stored = torch.frombuffer(bytearray(self.tensor.read()), dtype=self.tensor.torch_dtype)
        every = stored.view(self.tensor.shape)
        old = every[: self.kept]
        mean = _mean(old)
        new = mean.repeat(self.rows - self.kept, *[1] * (old.dim() - 1))
        stop = self.first_id + len(self.origins)
        new[stop - self.kept : len(every) - self.kept] = every[stop:]
        own = new[self.first_id - self.kept : stop - self.kept]
        if self.values is not None:
            own.copy_(self.values)
        elif self.how == "noise":
            generator = torch.Generator().manual_seed(self.seed)
            own += torch.randn(own.shape, generator=generator) * _deviation(old, mean)
        elif self.how in ("pieces", "first"):
            for row, origin in zip(own, self.origins, strict=True):
                pieces = [index for index in origin if index < self.kept]
                if pieces:
                    row.copy_(old[pieces if self.how == "pieces" else pieces[:1]].float().mean(0))
        return new.to(old.dtype)


def _mean(old: torch.Tensor) -> torch.Tensor:
    """Mean over rows in float64 sums, a piece at a time, in float32."""
    total = torch.zeros(old.shape[1:], dtype=torch.float64)
    for piece in old.split(8192):
        total += piece.sum(0, dtype=torch.float64)
    return (total / len(old)).float()


def _deviation(old: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(old.shape[1:], dtype=torch.float64)
    for piece in old.split(8192):
        total += (piece.double() - mean.double()).square().sum(0)
    return (total / len(old)).sqrt().float()


def _resized(base: CheckpointFolder, hollow: PreTrainedModel, old_rows: int) -> dict[str, str]:
    """Names of the tensors that have a row for each token, and what they are."""
    parts, tensors = find_architecture(hollow), base.weights.meta_state_dict()
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.shape[:1] != (old_rows,):
            continue
        groups = [group_of(name, parts)]
        if groups == [None]:  # the file may call it otherwise than the model: see which module another shape offends
            longer = torch.empty((old_rows + 1, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
            _, report = load_hollow(type(hollow), base.config, tensors | {name: longer})
            groups = [group_of(module, parts) for module in report.mismatched]
        found.update((name, group) for group in groups if group in ("embedding", "head"))
    if "embedding" not in found.values():
        raise UnsupportedArchitectureError(
            f"{base.folder}: its weights hold no embedding of {old_rows} rows that could be told from their names, so "
            "it cannot be given more"
        )
    return found


def _check_given(
    given: Mapping[str, torch.Tensor] | None, resized: Mapping[str, str], shape: tuple[int, int], tied: bool
) -> None:
    if given is None:
        return
    wanted = {"embedding"} if tied else set(resized.values())
    if set(given) != wanted:
        raise EloError(
            f"rows: the file must hold {' and '.join(sorted(wanted))}, one row for each new token; it holds "
            f"{', '.join(sorted(given)) or 'nothing'}"
        )
    for name, values in given.items():
        if values.shape != shape or not bool(torch.isfinite(values).all()):
            found = f"is {list(values.shape)}" if values.shape != shape else "has values that are not finite"
            raise EloError(
                f"rows: {name} {found}; it must be finite numbers of [new tokens, hidden width] {list(shape)}"
            )


def _require_loadable(
    base: CheckpointFolder,
    config_json: dict[str, Any],
    edits: dict[str, Any],
    tensors: Sequence[NewTensor],
    trust_remote_code: bool,
) -> None:
    """Ask transformers whether these tensors make the model that the new configuration describes."""
    try:
        config = read_edited_config(config_json, base.config, edits)
        hollow = build_hollow_causal_lm(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration or model class that does not take this size, in its own way
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: cannot have {edits['vocab_size']} tokens ({error_line(error)})"
        ) from None
    meta = {
        each.name: torch.empty(each.shape, dtype=StoredTensor(*_as_stored(each)).torch_dtype, device="meta")
        for each in tensors
    }
    _, report = load_hollow(type(hollow), config, meta)
    if problem := report.incomplete():
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: with {edits['vocab_size']} tokens {problem}; something else than "
            "embedding and head depends on the vocabulary's size, so it cannot be extended"
        )


def _as_stored(tensor: NewTensor) -> tuple[str, str, tuple[int, ...], Path, int, int]:
    return tensor.name, tensor.dtype, tensor.shape, Path(), 0, tensor.size
