"""Give a checkpoint more embedding and head rows, on disk, with every old row as it was.

Shapes: V old rows, W new ones in all, D hidden width.
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
from elo.checkpoint.tensor_files import MAX_SHARD_BYTES, NewTensor, StoredTensor, write_checkpoint
from elo.errors import EloError, UnsupportedArchitectureError, error_line
from elo.store.files import atomic_directory, disk_errors_told
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
        first_id: id of the first; the others follow it. The base may have rows from here on that no token of its used;
            they are taken for the new ones.
        origins: for each, the old tokens that its text was tokenised into.
    """

    first_id: int
    origins: Sequence[Sequence[int]]

    @property
    def rows(self) -> NewRows:
        """Their rows of embedding and head."""
        return NewRows(self.first_id, self.first_id + len(self.origins))


@dataclass(frozen=True)
class RowInit:
    """What new rows begin as.

    Attributes:
        embedding: `pieces`: the mean of the rows of the tokens that its text was tokenised into; `first`: the row of
            the first of these; `mean`: the mean of all old rows; `noise`: drawn from a normal distribution with the old
            rows' mean and standard deviation in each dimension.
        head: the same for the LM head, where it is not tied to the embedding.
        given: instead of these, `embedding` and, for an untied head, `head`, of [new tokens, D], computed elsewhere.
        seed: of `noise`.
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
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint with rows for more tokens.

    Every tensor but the embedding and the head is copied byte for byte, and so are their old rows.

    Args:
        checkpoint: folder with config.json and safetensors weights.
        output: folder to write; it appears whole or not at all.
        save_tokenizer: writes the extended tokenizer's files into a folder.
        check: called with the whole folder before it appears as `output`; refuses it by raising EloError.
        pad_to_multiple_of: W is a multiple of this, as tensor cores like it.
        record: further keys of the record in config.json.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.
        max_shard_bytes: size above which the weights are written as several files.
        label: shown with the progress; None is silent.

    Returns:
        The record in config.json: {"rows": {"start", "stop"}, "embedding_init", "head_init" (None if tied), ...}

    Raises:
        EloError: the checkpoint, the rows or the output is not usable.
        UnsupportedArchitectureError: transformers does not take the model with another vocabulary size.
    """
    base = open_folder(checkpoint, trust_remote_code)
    if PROVENANCE_KEY in base.config_json:
        raise EloError(f"{checkpoint}: is a detached checkpoint; extend the vocabulary of its base, then detach")
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
    # Of a wrapper in the decoder's part too: transformers may load that alone.
    config_json = edit_json(base.config_json, base.config, {"vocab_size": rows, VOCABULARY_KEY: written})
    config_json[VOCABULARY_KEY] = written
    _require_loadable(base, config_json, rows, makers.keys(), trust_remote_code)
    with disk_errors_told(output), atomic_directory(output, overwrite=overwrite) as folder:
        write_config(folder, config_json)
        save_tokenizer(folder)  # which may refuse, so before gigabytes are written
        tensors = [
            makers[name].tensor() if name in makers else NewTensor(name, each.dtype, each.shape, each.size, each.chunks)
            for name, each in base.weights.tensors.items()
        ]
        write_checkpoint(folder, tensors, max_shard_bytes, label)
        copy_unlisted_weights(base.weights, folder)
        copy_side_files(checkpoint, folder, python=trust_remote_code, leave_out=TOKENIZER_PATTERNS)
        check(folder)
    return written


@dataclass(frozen=True)
class _RowMaker:
    """Makes an embedding or head, of [V, D], or a head's bias, of [V], with W rows."""

    old: StoredTensor
    group: str
    new: NewTokens
    init: RowInit
    rows: int

    @property
    def kept(self) -> int:
        """Rows that are copied: those of old tokens."""
        return min(self.new.first_id, self.old.shape[0])

    @property
    def row_bytes(self) -> int:
        return self.old.size // self.old.shape[0]

    def tensor(self) -> NewTensor:
        """The tensor with W rows, whose bytes are made when they are written."""
        shape = (self.rows, *self.old.shape[1:])
        return NewTensor(self.old.name, self.old.dtype, shape, self.rows * self.row_bytes, self._chunks)

    def _chunks(self) -> Iterator[bytes]:
        """The old rows' bytes, then the new ones'."""
        left = self.kept * self.row_bytes
        for chunk in self.old.chunks():
            yield chunk[:left]
            left -= len(chunk[:left])
            if not left:
                break
        yield tensor_bytes(self._further_rows())

    def _further_rows(self) -> torch.Tensor:
        """[W - kept, D]; rows of no token, old or new, stay as they are where the base has them, or are the mean."""
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
            # Another seed for the head: the same one would make an untied head's rows those of the embedding.
            generator = torch.Generator().manual_seed(self.init.seed + (self.group == "head"))
            own += torch.randn(own.shape, generator=generator) * _deviation(old, mean)
        elif how in ("pieces", "first"):
            for row, origin in zip(own, self.new.origins, strict=True):
                pieces = [index for index in origin if index < self.kept]
                if pieces:
                    row.copy_(old[pieces if how == "pieces" else pieces[:1]].float().mean(0))
        return further.to(old.dtype)


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


def _resized(base: CheckpointFolder, hollow: PreTrainedModel) -> dict[str, str]:
    """Names in the files of the tensors that have a row for each token, and which they are: `embedding` or `head`.

    A head that is tied to the embedding, and stored beside it all the same, is an embedding.
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
            f"{base.folder}: its weights hold no embedding of {rows} rows that could be told from their names, so it "
            "cannot be given more"
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
            f"rows: the file must hold {' and '.join(sorted(wanted))}, one row for each new token; it holds "
            f"{', '.join(sorted(given)) or 'nothing'}"
        )
    shapes = (base.weights.tensors[name].shape for name, group in resized.items() if group == "embedding")
    width = next(shape[1] for shape in shapes if len(shape) == 2)  # a tied head's bias goes with the embedding
    for name, values in given.items():
        if values.shape != (count, width) or not bool(torch.isfinite(values).all()):
            found = f"is {list(values.shape)}" if values.shape != (count, width) else "has values that are not finite"
            raise EloError(
                f"rows: {name} {found}; it must be finite numbers of [new tokens, hidden width] {[count, width]}"
            )


def _require_loadable(
    base: CheckpointFolder,
    config_json: dict[str, Any],
    rows: int,
    resized: Collection[str],
    trust_remote_code: bool,
) -> None:
    """Ask transformers whether tensors with this many rows make the model that the new configuration describes."""
    try:
        config = read_edited_config(config_json, base.config, {"vocab_size": rows})
        hollow = build_hollow_causal_lm(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration or model class that does not take this size, in its own way
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: cannot have {rows} tokens ({error_line(error)})"
        ) from None
    tensors = base.weights.meta_state_dict()
    for name in resized:
        tensors[name] = torch.empty((rows, *tensors[name].shape[1:]), dtype=tensors[name].dtype, device="meta")
    _, report = load_hollow(type(hollow), config, tensors)
    if problem := report.incomplete():
        raise UnsupportedArchitectureError(
            f"model type {base.config.model_type!r}: with {rows} tokens {problem}; something else than embedding and "
            "head depends on the vocabulary's size, so it cannot be extended"
        )
