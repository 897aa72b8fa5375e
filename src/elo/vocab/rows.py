"""Add embedding and head rows to a checkpoint on disk, without changing any old row.

Shapes: V old rows, W rows in total afterwards, D hidden width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.folder import (
    TOKENIZER_PATTERNS,
    CheckpointFolder,
    copy_side_files,
    copy_unlisted_weights,
    open_folder,
    refuse_overlap,
    write_config,
)
from elo.checkpoint.naming import load_hollow, map_names
from elo.checkpoint.new_rows import VOCABULARY_KEY, NewRows
from elo.checkpoint.tensor_files import NewTensor, StoredTensor, write_checkpoint
from elo.errors import EloError, UnsupportedArchitectureError, error_line
from elo.store.files import atomic_directory, readable_disk_errors
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.surgery.layer_config import edit_json, read_edited_config
from elo.surgery.matching import tensor_bytes
from elo.surgery.provenance import PROVENANCE_KEY

Initialisation = Literal["pieces", "first", "mean", "noise"]
INITIALISATIONS: tuple[Initialisation, ...] = ("pieces", "first", "mean", "noise")


@dataclass(frozen=True)
class NewTokens:
    """Tokens that are added to a vocabulary, by their ids.

    Attributes:
        first_id: id of the first new token; the others follow. The base may already have rows at these ids that none
            of its tokens used. They become rows of the new tokens.
        origins: for each new token, the old tokens of its text.
    """

    first_id: int
    origins: Sequence[Sequence[int]]

    @property
    def rows(self) -> NewRows:
        """Rows of the new tokens in embedding and head."""
        return NewRows(self.first_id, self.first_id + len(self.origins))


@dataclass(frozen=True)
class RowInit:
    """Initial values of new rows.

    Attributes:
        embedding: `pieces`: mean of the rows of the old tokens of the new token's text; `first`: row of the first of
            these; `mean`: mean of all old rows; `noise`: samples of a normal distribution with the old rows' mean and
            standard deviation in each dimension.
        head: the same for an LM head that is not tied to the embedding.
        given: rows computed elsewhere, used instead: `embedding` and, for an untied head, `head`, each [new tokens, D].
        seed: random seed of `noise`.
    """

    embedding: Initialisation = "pieces"
    head: Initialisation = "pieces"
    given: Mapping[str, torch.Tensor] | None = None
    seed: int = 0


def extend_checkpoint(
    checkpoint: Path,
    output: Path,
    new: NewTokens,
    *,
    save_tokenizer: Callable[[Path], None],
    check: Callable[[Path], None] = lambda folder: None,
    init: RowInit = RowInit(),  # frozen
    pad_to_multiple_of: int = 64,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint with rows for additional tokens.

    All other tensors, and the old rows of embedding and head, are copied byte for byte.

    Args:
        checkpoint: folder with config.json and safetensors weights.
        output: folder to write. It appears only when complete.
        save_tokenizer: writes the extended tokenizer's files into a folder.
        check: called with the complete folder before it is renamed to `output`; raises EloError to reject it.
        pad_to_multiple_of: W is rounded up to a multiple of this, which is faster on tensor cores.
        record: additional keys of the record in config.json.

    Returns:
        The record in config.json: {"rows": {"start", "stop"}, "embedding_init", "head_init" (None if tied), ...}

    Raises:
        EloError: the checkpoint, the rows or the output cannot be used.
        UnsupportedArchitectureError: transformers does not load the model with another vocabulary size.
    """
    base = open_folder(checkpoint, trust_remote_code)
    if PROVENANCE_KEY in base.config_json:
        raise EloError(f"{checkpoint}: is a detached checkpoint; extend the vocabulary of its base and detach again")
    refuse_overlap(output, checkpoint)
    hollow = build_hollow_causal_lm(base.config, trust_remote_code=trust_remote_code)
    resized = _resized(base, hollow)
    tied = "head" not in resized.values()
    _check_given(init.given, base, resized, len(new.origins))
    old_rows = next(base.weights.tensors[name].shape[0] for name in resized)
    rows = max(old_rows, -(-new.rows.stop // pad_to_multiple_of) * pad_to_multiple_of)
    makers = {name: _RowMaker(base.weights.tensors[name], group, new, init, rows) for name, group in resized.items()}
    written = {
        "rows": asdict(new.rows),
        "embedding_init": "given" if init.given else init.embedding,
        "head_init": None if tied else "given" if init.given else init.head,
        **(record or {}),
    }
    # For a wrapper, the record goes into the decoder's part too, because transformers may load only that.
    config_json = edit_json(base.config_json, base.config, {"vocab_size": rows, VOCABULARY_KEY: written})
    config_json[VOCABULARY_KEY] = written
    _require_loadable(base, config_json, rows, makers.keys(), trust_remote_code)
    with readable_disk_errors(output), atomic_directory(output, overwrite=overwrite) as folder:
        write_config(folder, config_json)
        save_tokenizer(folder)  # first, because it may fail and the weights are large
        tensors = [
            makers[name].tensor() if name in makers else NewTensor(name, each.dtype, each.shape, each.size, each.chunks)
            for name, each in base.weights.tensors.items()
        ]
        write_checkpoint(folder, tensors, label)
        copy_unlisted_weights(base.weights, folder)
        copy_side_files(checkpoint, folder, python=trust_remote_code, leave_out=TOKENIZER_PATTERNS)
        check(folder)
    return written


@dataclass(frozen=True)
class _RowMaker:
    """Resizes an embedding or head [V, D], or a head's bias [V], to W rows."""

    old: StoredTensor
    group: str
    new: NewTokens
    init: RowInit
    rows: int

    @property
    def kept(self) -> int:
        """Number of rows that are copied, which belong to old tokens."""
        return min(self.new.first_id, self.old.shape[0])

    @property
    def row_bytes(self) -> int:
        return self.old.size // self.old.shape[0]

    def tensor(self) -> NewTensor:
        """Return the tensor with W rows, whose bytes are computed while they are written."""
        shape = (self.rows, *self.old.shape[1:])
        return NewTensor(self.old.name, self.old.dtype, shape, self.rows * self.row_bytes, self._chunks)

    def _chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the old rows, then of the new ones."""
        left = self.kept * self.row_bytes
        for chunk in self.old.chunks():
            yield chunk[:left]
            left -= len(chunk[:left])
            if not left:
                break
        yield tensor_bytes(self._further_rows())

    def _further_rows(self) -> torch.Tensor:
        """Return the rows after the copied ones, [W - kept, D].

        Rows without an old or new token keep the base's values if it has them, and are the mean otherwise.
        """
        stored = torch.frombuffer(bytearray(self.old.read()), dtype=self.old.torch_dtype)
        every = stored.view(self.old.shape)
        old, start, stop = every[: self.kept], self.new.rows.start, self.new.rows.stop
        mean = _mean(old)
        further = mean.repeat(self.rows - self.kept, *[1] * (old.dim() - 1))
        further[stop - self.kept : len(every) - self.kept] = every[stop:]
        own = further[start - self.kept : stop - self.kept]
        how = self.init.embedding if self.group == "embedding" else self.init.head
        if self.init.given is not None and old.dim() == 2:
            own.copy_(self.init.given[self.group])
        elif how == "noise":
            # With the same seed, the noise of an untied head would equal that of the embedding.
            generator = torch.Generator().manual_seed(self.init.seed + (self.group == "head"))
            own += torch.randn(own.shape, generator=generator) * _deviation(old, mean)
        elif how in ("pieces", "first"):
            for row, origin in zip(own, self.new.origins, strict=True):
                pieces = [index for index in origin if index < self.kept]
                if pieces:
                    row.copy_(old[pieces if how == "pieces" else pieces[:1]].float().mean(0))
        return further.to(old.dtype)


def _mean(old: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows in float32, summed chunk by chunk in float64."""
    total = torch.zeros(old.shape[1:], dtype=torch.float64)
    for piece in old.split(8192):
        total += piece.sum(0, dtype=torch.float64)
    return (total / len(old)).float()


def _deviation(old: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(old.shape[1:], dtype=torch.float64)
    for piece in old.split(8192):
        total += (piece.double() - mean.double()).square().sum(0)
    return (total / len(old)).sqrt().float()


def _resized(base: CheckpointFolder, hollow: PreTrainedModel) -> dict[str, str]:
    """Map the stored names of tensors with a row per token to `embedding` or `head`.

    A stored head that is tied to the embedding counts as `embedding`.
    """
    parts, tensors = find_architecture(hollow), base.weights.meta_state_dict()
    embedding = hollow.get_submodule(parts.embedding_path).weight
    assert isinstance(embedding, torch.Tensor)
    rows = embedding.shape[0]
    names = map_names(hollow, tensors)
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        group = names.group(name)
        if tensor.shape[:1] == (rows,) and group in ("embedding", "head"):
            found[name] = "embedding" if parts.tied else group
    if "embedding" not in found.values():
        raise UnsupportedArchitectureError(
            f"{base.folder}: no embedding with {rows} rows can be identified by name in the weights, so the vocabulary "
            "cannot be extended; choose another base"
        )
    return found


def _check_given(
    given: Mapping[str, torch.Tensor] | None, base: CheckpointFolder, resized: Mapping[str, str], count: int
) -> None:
    if given is None:
        return
    wanted = set(resized.values())
    if set(given) != wanted:
        raise EloError(
            f"rows: the file contains {', '.join(sorted(given)) or 'nothing'}; it must contain "
            f"{' and '.join(sorted(wanted))}, with one row per new token"
        )
    shapes = (base.weights.tensors[name].shape for name, group in resized.items() if group == "embedding")
    width = next(shape[1] for shape in shapes if len(shape) == 2)  # a tied head's bias goes with the embedding
    for name, values in given.items():
        if values.shape != (count, width) or not bool(torch.isfinite(values).all()):
            found = f"is {list(values.shape)}" if values.shape != (count, width) else "has values that are not finite"
            raise EloError(
                f"rows: {name} {found}; it must have shape [new tokens, hidden width] {[count, width]}, and be finite"
            )


def _require_loadable(
    base: CheckpointFolder,
    config_json: dict[str, Any],
    rows: int,
    resized: Collection[str],
    trust_remote_code: bool,
) -> None:
    """Check with transformers that tensors with this many rows fit the model of the new configuration."""
    try:
        config = read_edited_config(config_json, base.config, {"vocab_size": rows})
        hollow = build_hollow_causal_lm(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # configuration and model classes reject sizes with errors of any type
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: cannot have {rows} tokens ({error_line(error)}); "
            "choose another base"
        ) from None
    tensors = base.weights.meta_state_dict()
    for name in resized:
        tensors[name] = torch.empty((rows, *tensors[name].shape[1:]), dtype=tensors[name].dtype, device="meta")
    _, report = load_hollow(type(hollow), config, tensors)
    if problem := report.incomplete():
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: with {rows} tokens {problem}; more than embedding and head "
            "depends on the size of the vocabulary, so it cannot be extended; choose another base"
        )
