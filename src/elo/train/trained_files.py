"""Write a trained model as a copy of its base in which only the trained tensors differ.

transformers' save_pretrained does not preserve the rest. It rounds all tensors to one dtype, omits those that the model
does not load, and distributes the others over new files.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedModel

from elo.checkpoint.folder import CONFIG_FILE, copy_side_files, copy_unlisted_weights
from elo.checkpoint.naming import Link, map_names
from elo.checkpoint.shared_files import copy_shared
from elo.checkpoint.tensor_files import CHUNK_BYTES, INDEX_FILE, StoredTensor, open_checkpoint
from elo.errors import EloError, UnfinishedError
from elo.surgery.matching import tensor_bytes


class TrainedFiles:
    """The weight files of a base, and the tensors in them that training changes.

    Args:
        base: checkpoint folder that `model` was loaded from.
        model: model before a method adds anything to it; it may be on the meta device.

    Raises:
        EloError: the folder's weights cannot be read.
    """

    def __init__(self, base: Path, model: PreTrainedModel) -> None:
        self.weights = open_checkpoint(base)
        self.names = map_names(model, self.weights.meta_state_dict())
        self._shapes = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict().items()}
        self._shared = first_names(model)
        self._trained: list[Link] = []

    def stored_dtypes(self, model: PreTrainedModel) -> dict[int, torch.dtype]:
        """Return each parameter's stored dtype by the parameter's `id`.

        If a parameter is stored as several tensors, this is their widest dtype.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found: dict[int, torch.dtype] = {}
        for link in self.names.links:
            dtypes = [self.weights.tensors[name].torch_dtype for name in link.stored]
            for name in link.loaded:
                if name in parameters:
                    found[id(parameters[name])] = max(dtypes, key=lambda dtype: dtype.itemsize)
        return found

    def set_trained(self, model: PreTrainedModel) -> None:
        """Record which tensors of `model`, prepared by a method, train. `write` copies the others unchanged.

        Raises:
            EloError: a trained tensor is not in the files.
            UnsupportedArchitectureError: a trained tensor cannot be converted back to its stored form.
        """
        training = {name for name, each in model.named_parameters(remove_duplicate=False) if each.requires_grad}
        training |= {self._shared.get(name, name) for name in training}
        self._trained = [
            link for link in self.names.links if any(_may_change(self._shared[n], training) for n in link.loaded)
        ]
        covered = {self._shared[name] for link in self._trained for name in link.loaded}
        for name in sorted(training & self._shapes.keys()):
            if self._shared[name] not in covered:
                raise EloError(
                    f"{self.weights.folder}: its files have no tensor {name}, which would train; save the model again "
                    "with all its tensors"
                )
        for link in self._trained:
            self.names.revert(link, {name: self._shapes[name] for name in link.loaded})

    def write(
        self, folder: Path, model: PreTrainedModel, parts: Iterator[dict[str, torch.Tensor]], *, python: bool = False
    ) -> None:
        """Fill `folder` with copies of the base's files, in which trained tensors have their new values.

        Tensors keep their stored dtypes. Unchanged elements, such as untrained embedding rows, keep their bits.

        Args:
            folder: empty folder.
            model: trained model without additions by the method; only the names of its tensors are used.
            parts: iterator over the model's tensors by name, on the CPU. A tied tensor appears once.
            python: copy the base's Python files too.

        Raises:
            EloError: a tensor has another shape than in the base, or values that exceed its stored dtype.
            UnfinishedError: `parts` lacks a trained tensor, or a written tensor is not at its place.
        """
        base, trained = self.weights.folder, {name for link in self._trained for name in link.stored}
        for file in self.weights.files:
            here = [tensor for tensor in self.weights.tensors.values() if tensor.file.name == file]
            _lay_out(base / file, folder / file, here, trained)
        with ExitStack() as files:
            opened = {
                file: files.enter_context((folder / file).open("r+b"))
                for file in sorted({self.weights.tensors[name].file.name for name in trained})
            }
            for name, tensor in self._values(first_names(model), parts):
                _put(opened[self.weights.tensors[name].file.name], self.weights.tensors[name], tensor)
        for name in (CONFIG_FILE, *([INDEX_FILE] if self.weights.indexed else [])):
            shutil.copyfile(base / name, folder / name)
        copy_unlisted_weights(self.weights, folder)
        copy_side_files(base, folder, python=python)
        self._check(folder)

    def _values(
        self, first: Mapping[str, str], parts: Iterator[dict[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield trained tensors by their names in the files.

        A tensor is held until all tensors that are converted together with it have arrived.

        Args:
            first: result of `first_names`.
        """
        needed = [{first.get(name, name) for name in link.loaded} for link in self._trained]
        users: dict[str, set[int]] = {}
        for index, names in enumerate(needed):
            for name in names:
                users.setdefault(name, set()).add(index)
        held: dict[str, torch.Tensor] = {}
        for part in parts:
            held |= {name: tensor for name, tensor in part.items() if name in users}
            for index in sorted({index for name in part for index in users.get(name, ())}):
                if needed[index] <= held.keys():
                    link = self._trained[index]
                    yield from self.names.revert(link, {n: held[first.get(n, n)] for n in link.loaded}).items()
                    for name in needed[index]:
                        users[name].discard(index)
            held = {name: tensor for name, tensor in held.items() if users[name]}
        if missing := sorted(name for name, left in users.items() if left):
            raise UnfinishedError(f"{self.weights.folder}: {missing[0]} was trained, but is missing when written")

    def _check(self, folder: Path) -> None:
        """Check that the written folder has the same tensors in the same files as the base."""
        written = open_checkpoint(folder).tensors
        for name, tensor in self.weights.tensors.items():
            other = written.get(name)
            if other is None or _place(other) != _place(tensor):
                raise UnfinishedError(f"{folder}: {name} differs in place or type from {tensor.file}; run again")


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Return, for each name in a model's state dict, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def _may_change(name: str, training: Collection[str]) -> bool:
    """Return whether a tensor trains, or an adapter in its module that will be merged into it."""
    owner = name.rpartition(".")[0]
    return name in training or (bool(owner) and any(each.startswith(f"{owner}.") for each in training))


def _place(tensor: StoredTensor) -> tuple[Any, ...]:
    return tensor.file.name, tensor.dtype, tensor.shape, tensor.start, tensor.size


def _lay_out(source: Path, target: Path, tensors: list[StoredTensor], trained: Collection[str]) -> None:
    """Copy a weight file, with gaps in place of the trained tensors' values."""
    if not any(tensor.name in trained for tensor in tensors):
        copy_shared(source, target)
        return
    with source.open("rb") as reading, target.open("wb") as writing:
        writing.write(reading.read(min(tensor.start for tensor in tensors)))
        writing.truncate(source.stat().st_size)
        for tensor in tensors:
            if tensor.name not in trained:
                writing.seek(tensor.start)
                for chunk in tensor.chunks():
                    writing.write(chunk)


def _put(file: BinaryIO, stored: StoredTensor, trained: torch.Tensor) -> None:
    """Write a tensor at its place in the file, in its stored dtype. Elements that did not change keep their bits."""
    if trained.shape != stored.shape:
        raise EloError(
            f"{stored.file}: {stored.name} is {list(stored.shape)}, but {list(trained.shape)} after training; "
            "a method must not change shapes"
        )
    elements = CHUNK_BYTES // 16
    file.seek(stored.start)
    values = trained.reshape(-1).split(elements) if trained.numel() else ()
    for before, value in zip(stored.chunks(elements * stored.torch_dtype.itemsize), values, strict=True):
        base = torch.frombuffer(bytearray(before), dtype=stored.torch_dtype)
        new = value.to(base.dtype)
        if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
            raise EloError(
                f"{stored.file}: {stored.name} has values after training that exceed {base.dtype}; convert the base to "
                "bfloat16 or float32 and run again"
            )
        file.write(tensor_bytes(torch.where(base.to(value.dtype) == value, base, new)))
