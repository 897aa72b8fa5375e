"""Merge checkpoints of one architecture tensor by tensor, without holding a model in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.folder import (
    CheckpointFolder,
    copy_unlisted_weights,
    open_folder,
    refuse_overlap,
    write_config,
)
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.naming import NameMap, find_layer_names, map_names
from elo.checkpoint.new_rows import VOCABULARY_KEY, NewRows, read_new_rows, record_of
from elo.checkpoint.tensor_files import (
    CHUNK_BYTES,
    NewTensor,
    StoredTensor,
    stored_dtype,
    write_checkpoint,
)
from elo.errors import EloError
from elo.store.files import atomic_directory, readable_disk_errors
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.surgery.layer_config import edit_json
from elo.surgery.matching import match_names, redundant, tensor_bytes
from elo.surgery.provenance import PROVENANCE_KEY

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEUTRAL_KEYS = {
    *_TOKEN_IDS, "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "vocab_size", VOCABULARY_KEY,
}  # fmt: skip
"""Keys of config.json that do not affect the computation of a layer, so merged models may differ in them."""
_STEP = CHUNK_BYTES // 16  # elements of one chunk


@dataclass(frozen=True)
class Place:
    """A tensor's place in the model.

    Attributes:
        name: name in the first model's files.
        group: "embedding", "norm" or "head"; None for layers and everything else.
        depth: position of its decoder layer, from 0 for the first to 1 for the last; 0 outside the layers.
        tied: whether the model's embedding and head are one parameter.
    """

    name: str
    group: str | None
    depth: float
    tied: bool


Factors = Callable[[Place, Sequence[StoredTensor], int], Sequence[float]]
"""Return the factor of each model's tensor in the sum, given the tensors and the number of elements that all share."""


def merge_weights(
    folders: Sequence[Path],
    output: Path,
    factors: Factors,
    *,
    copy_files: Callable[[Path], None],
    check: Callable[[Path], None] = lambda folder: None,
    token_ids_of: int = 0,
    inner_rows: tuple[int, Callable[[], int]] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Write a sum of models, each tensor multiplied by its model's factor.

    Sums are computed in float64 and rounded once. A tensor in which only the first model's factor is not 0 keeps its
    bits if the factor is 1. Names, dtypes and config.json are the first model's.

    Rows of embedding and head that not all models have are copied from one model: the one with rows of `elo vocab
    extend`, otherwise the one with the most rows.

    Args:
        folders: checkpoint folders of the models.
        output: folder to write. It appears only when complete.
        factors: factors of the models for one tensor.
        copy_files: writes the other files into a folder: tokenizer, generation settings, licence.
        check: called with the complete folder before it is renamed to `output`; raises EloError to reject it.
        token_ids_of: index of the model whose bos, eos and pad token ids are used.
        inner_rows: index of a model, and a function that returns a number of rows. If rows that not all models have
            come from another model, this model's rows below that number are used instead.
        dtype: dtype of the output; None keeps the first model's.

    Returns:
        {"tensors" (number of tensors that are not copies of the first model's), "rows_kept" (rows of the first model's
        embedding and head that are not sums), "rows_added" (rows that the first model does not have), "differs" (keys
        of config.json in which the models differ; the first model's values are kept)}

    Raises:
        EloError: a folder cannot be used, or the models do not match. The message names the first tensor.
    """
    models = [open_folder(folder, trust_remote_code) for folder in folders]
    ours = models[0]
    _require_same_family(models)
    for each in models:
        refuse_overlap(output, each.folder)
    sums = _plan(models, factors, inner_rows, dtype, trust_remote_code)
    added = max((each.rows_added for each in sums), default=0)
    config_json = _config_json(models, added, dtype)
    config_json |= {key: value for key, value in models[token_ids_of].config_json.items() if key in _TOKEN_IDS}
    with readable_disk_errors(output), atomic_directory(output, overwrite=overwrite) as folder:
        write_config(folder, config_json)
        copy_files(folder)  # first, because it may fail and the weights are large
        write_checkpoint(folder, [each.tensor() for each in sums], label)
        copy_unlisted_weights(ours.weights, folder)
        check(folder)
    return {
        "tensors": sum(each.is_sum for each in sums),
        "rows_kept": max((each.rows_kept for each in sums if each.is_sum), default=0),
        "rows_added": added,
        "differs": sorted(
            {
                key
                for each in models[1:]
                for key in ours.config_json.keys() | each.config_json.keys()
                if key not in _NEUTRAL_KEYS and ours.config_json.get(key) != each.config_json.get(key)
            }
        ),
    }


def check_models(folders: Sequence[Path], *, trust_remote_code: bool = False) -> None:
    """Raise EloError if `merge_weights` would refuse these checkpoints, without reading weights."""
    models = [open_folder(folder, trust_remote_code) for folder in folders]
    _require_same_family(models)
    _plan(models, lambda *_: (1.0,) * len(models), None, None, trust_remote_code)


def _require_same_family(models: Sequence[CheckpointFolder]) -> None:
    ours = models[0]
    for each in models:
        if PROVENANCE_KEY in each.config_json:
            raise EloError(f"{each.folder}: is a detached checkpoint; attach its layers first, or give the full model")
        if each.config.model_type != ours.config.model_type:
            raise EloError(
                f"{each.folder}: has model type {each.config.model_type}, but {ours.folder} has "
                f"{ours.config.model_type}; give models of the same architecture"
            )


def shared_chunks(tensors: Sequence[StoredTensor], elements: int) -> Iterator[list[torch.Tensor]]:
    """Yield the first `elements` elements of several tensors as float64, one chunk at a time."""
    for start in range(0, elements, _STEP):
        stop = min(start + _STEP, elements)
        yield [_read(tensor, start, stop).double() for tensor in tensors]


def _read(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    size = tensor.torch_dtype.itemsize
    return torch.frombuffer(bytearray(tensor.read(start * size, (stop - start) * size)), dtype=tensor.torch_dtype)


@dataclass
class _Sum:
    """A tensor to write, in three parts.

    The first `elements` are a sum over all models. Those up to `inner_stop` come from `inner`, the rest from `owner`.
    """

    place: Place
    tensors: Sequence[StoredTensor]
    inner: StoredTensor
    inner_stop: int
    owner: StoredTensor
    elements: int
    factors: Factors
    dtype: torch.dtype
    is_sum: bool = False

    @property
    def rows_added(self) -> int:
        return max(0, self.owner.shape[0] - self.tensors[0].shape[0]) if self.owner.shape else 0

    @property
    def rows_kept(self) -> int:
        shape = self.tensors[0].shape
        start = max(self.elements, self.inner_stop)
        return (math.prod(shape) - start) // math.prod(shape[1:]) if self.elements else 0

    def tensor(self) -> NewTensor:
        """Return the tensor, whose bytes are computed while they are written."""
        size = math.prod(self.owner.shape) * self.dtype.itemsize
        return NewTensor(self.place.name, stored_dtype(self.dtype), self.owner.shape, size, self._chunks)

    def _chunks(self) -> Iterator[bytes]:
        ours = self.tensors[0]
        factors = self.factors(self.place, self.tensors, self.elements) if self.elements else [1.0]
        used = [(tensor, factor) for tensor, factor in zip(self.tensors, factors, strict=False) if factor]
        self.is_sum = used != [(ours, 1.0)]
        copies_ours = self.owner is ours and self.inner_stop <= self.elements
        if not self.is_sum and copies_ours and self.dtype == ours.torch_dtype:
            yield from ours.chunks()
            return
        for chunk in shared_chunks([tensor for tensor, _ in used], self.elements):
            # The first model comes last, so that the difference of two others is exact before it is added.
            total, *rest = [values.mul_(factor) for values, (_, factor) in zip(chunk, used, strict=True)][::-1]
            for values in rest:
                total += values
            yield tensor_bytes(total.to(self.dtype))  # the only rounding
        begin = self.elements
        for source, end in ((self.inner, self.inner_stop), (self.owner, math.prod(self.owner.shape))):
            for start in range(begin, end, _STEP):
                yield tensor_bytes(_read(source, start, min(start + _STEP, end)).to(self.dtype))
            begin = max(begin, end)


def _plan(
    models: Sequence[CheckpointFolder],
    factors: Factors,
    inner_rows: tuple[int, Callable[[], int]] | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> list[_Sum]:
    """Match the models' tensors and choose which elements are summed."""
    ours = models[0]
    hollow = build_hollow_causal_lm(ours.config, trust_remote_code=trust_remote_code)
    names, layers = map_names(hollow, ours.weights.meta_state_dict()), find_layer_names(hollow, ours.weights)
    tied = find_architecture(hollow).tied
    matched = [_matched(ours, each, hollow, names, tied) for each in models[1:]]
    records = [read_new_rows(each.config) for each in models]
    sums = []
    for name, tensor in ours.weights.tensors.items():
        layer = layers.split(name)[0]
        last = layers.num_layers - 1
        depth = 0.0 if layer is None else min(1.0, layer / last) if last else 1.0
        place = Place(name, names.group(name), depth, tied)
        found = [each.get(name) for each in matched]
        tensors = [tensor, *(each for each in found if each is not None)]
        is_floating = tensor.torch_dtype.is_floating_point
        inner, inner_stop, owner, elements = tensor, 0, tensor, 0
        if is_floating and len(tensors) == len(models):  # others may lack a redundant tensor
            owner, elements = _shared(place, tensors, records)
            if inner_rows is not None and place.group in ("embedding", "head"):
                inner = tensors[inner_rows[0]]
                if owner is not inner and math.prod(inner.shape) > elements:
                    inner_stop = min(inner.shape[0], inner_rows[1]()) * math.prod(inner.shape[1:])
        to = dtype if dtype is not None and is_floating else tensor.torch_dtype
        sums.append(_Sum(place, tensors, inner, inner_stop, owner, elements, factors, to))
    return sums


def _shared(
    place: Place, tensors: Sequence[StoredTensor], records: Sequence[NewRows | None]
) -> tuple[StoredTensor, int]:
    """Return the tensor that rows outside the sum come from, and the number of elements in the sum."""
    ours = tensors[0]
    by_row = place.group in ("embedding", "head") and bool(ours.shape)
    for each in tensors:
        if each.shape[by_row:] != ours.shape[by_row:]:
            raise EloError(
                f"{each.file}: {each.name} is {list(each.shape)}, but {list(ours.shape)} in {ours.file.parent}; "
                "give models made from the same base"
            )
    if not by_row:
        return ours, math.prod(ours.shape)
    starts = [record.start for record in records if record is not None]
    rows = min([each.shape[0] for each in tensors] + (starts if len(set(records)) > 1 else []))
    stops = [0 if record is None else record.stop for record in records]
    owner = tensors[max(range(len(tensors)), key=lambda index: (stops[index], tensors[index].shape[0]))]
    for each in tensors:
        if each.shape[0] > owner.shape[0]:
            raise EloError(
                f"{each.file}: {each.name} has {each.shape[0]} rows, more than the {owner.shape[0]} of "
                f"{owner.file.parent}, whose vocabulary was extended; extend the vocabulary of the model with more rows"
            )
    return owner, rows * math.prod(ours.shape[1:])


def _config_json(models: Sequence[CheckpointFolder], added: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the first model's config.json with the output's vocabulary and dtype."""
    ours = models[0]
    config_json = dict(ours.config_json)
    if added:
        config_json = edit_json(
            config_json, ours.config, {"vocab_size": text_config_of(ours.config).vocab_size + added}
        )
    record = max((each.config for each in models), key=lambda config: getattr(read_new_rows(config), "stop", 0))
    if record_of(record) is not None:
        config_json[VOCABULARY_KEY] = record_of(record)
    if dtype is not None:
        config_json = _with_dtype(config_json, str(dtype).removeprefix("torch."))
    return config_json


def _with_dtype(part: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with another dtype, also in its parts."""
    return {
        key: _with_dtype(value, name)
        if isinstance(value, dict)
        else (name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value)
        for key, value in part.items()
    }


def _matched(
    ours: CheckpointFolder, other: CheckpointFolder, hollow: PreTrainedModel, names: NameMap, tied: bool
) -> dict[str, StoredTensor]:
    """Map names in our checkpoint to the tensors of another one of the same model. Redundant tensors may be missing."""
    found, absent = match_names(ours.weights.tensors, other.weights, hollow)
    embedding = next((found[name] for name in found if names.group(name) == "embedding"), None)
    extra = other.weights.tensors.keys() - {tensor.name for tensor in found.values()}
    for folder, without, alone in ((ours, other, absent), (other, ours, extra)):
        if alone and not redundant(folder.weights.tensors, alone, type(hollow), folder.config):
            raise EloError(
                f"{folder.folder}: has {min(alone)}, but {without.folder} does not; give models made from the same "
                "base (merge adapters first)"
            )
    heads = {name for name in absent if tied and names.group(name) == "head"}
    return found | (dict.fromkeys(heads, embedding) if embedding else {})
