"""Write a trained model as its base with what changed: all else stays bit for bit, in the file where it was.

What transformers' save_pretrained gives is not that: it rounds to one dtype, leaves out tensors that the model does not
load, and lays the files out anew.
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
    """The weight files of a base, and which of their tensors a training changes.

    Args:
        base: the checkpoint folder that `model` was loaded from.
        model: before a method adds anything to it; its tensors need no values.

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
        """The dtype in the files of each parameter, by its `id`: the widest where several files' tensors make it."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found: dict[int, torch.dtype] = {}
        for link in self.names.links:
            dtypes = [self.weights.tensors[name].torch_dtype for name in link.stored]
            for name in link.loaded:
                if name in parameters:
                    found[id(parameters[name])] = max(dtypes, key=lambda dtype: dtype.itemsize)
        return found

    def set_trained(self, model: PreTrainedModel) -> None:
        """Note what of `model`, prepared by a method, trains; the rest is going to be written as it is stored.

        Raises:
            EloError: a tensor that trains is not in the files.
            UnsupportedArchitectureError: one cannot be converted back to how it is stored.
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
                    f"{self.weights.folder}: its files hold no {name}, which is to train; save the model again with "
                    "all its tensors"
                )
        for link in self._trained:
            self.names.revert(link, {name: self._shapes[name] for name in link.loaded})

    def write(
        self, folder: Path, model: PreTrainedModel, parts: Iterator[dict[str, torch.Tensor]], *, python: bool = False
    ) -> None:
        """Fill `folder` with the base's files, in which what trained has its new values in the dtype it is stored in.

        Elements that are what they were keep their bits, so that rows of an embedding that did not train do.

        Args:
            folder: an empty folder.
            model: the trained model, with nothing added to it any more; only its names are looked at.
            parts: its tensors by name, on the CPU; those that share memory once.
            python: copy the base's Python files too.

        Raises:
            EloError: a value does not fit into the dtype that its tensor is stored in.
            UnfinishedError: `parts` did not hold all that trained.
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
        """What trained, by names in the files; a part is held for as long as a conversion waits for another."""
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
            raise UnfinishedError(f"{self.weights.folder}: {missing[0]} was trained, but not given to be written")

    def _check(self, folder: Path) -> None:
        """Compare what was written with the base: the same tensors, in the same files."""
        written = open_checkpoint(folder).tensors
        for name, tensor in self.weights.tensors.items():
            other = written.get(name)
            if other is None or _place(other) != _place(tensor):
                raise UnfinishedError(f"{folder}: {name} was not written as it is in {tensor.file}; run again")


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """For each name in a model's state dict the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def _may_change(name: str, training: Collection[str]) -> bool:
    """Whether a tensor trains, or an adapter in its module does, which will be merged into it."""
    owner = name.rpartition(".")[0]
    return name in training or (bool(owner) and any(each.startswith(f"{owner}.") for each in training))


def _place(tensor: StoredTensor) -> tuple[Any, ...]:
    return tensor.file.name, tensor.dtype, tensor.shape, tensor.start, tensor.size


def _lay_out(source: Path, target: Path, tensors: list[StoredTensor], trained: Collection[str]) -> None:
    """Write a file with room for what trained, and everything else as it is in `source`."""
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
    """Write a tensor at its place, in its stored dtype; elements that did not change keep their bits."""
    if trained.shape != stored.shape:
        raise EloError(
            f"{stored.file}: {stored.name} is {list(stored.shape)}, but {list(trained.shape)} after training; "
            "a method must leave the shapes as they are"
        )
    elements = CHUNK_BYTES // 16
    file.seek(stored.start)
    values = trained.reshape(-1).split(elements) if trained.numel() else ()
    for before, value in zip(stored.chunks(elements * stored.torch_dtype.itemsize), values, strict=True):
        base = torch.frombuffer(bytearray(before), dtype=stored.torch_dtype)
        new = value.to(base.dtype)
        if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
            raise EloError(
                f"{stored.file}: {stored.name} has values after training that {base.dtype} cannot hold; store the "
                "base in bfloat16 or float32 and run again"
            )
        file.write(tensor_bytes(torch.where(base.to(value.dtype) == value, base, new)))
