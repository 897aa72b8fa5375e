"""Read and write safetensors checkpoints as bytes, with at most one chunk of a tensor in memory.

The format (https://huggingface.co/docs/safetensors) is 8 bytes with the header's length (little endian), the header as
JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elo.errors import EloError, UnfinishedError
from elo.log import Progress
from elo.store.files import read_json, read_record

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Size of the tensors in one file, in bytes, unless a single tensor is larger."""
CHUNK_BYTES = 16 << 20  # a multiple of every dtype's size
READ_BYTES = 1 << 30  # macOS refuses to read 2 GiB at once
ADAPTER_CONFIG = "adapter_config.json"
_WRAPPERS = {
    "base_model.model.": "peft",
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_forward_module.": "Lightning",
    "_fsdp_wrapped_module.": "FSDP",
}
"""Prefixes that training wrappers add to every tensor's name, with the wrapper's name."""
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors library

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def stored_dtype(dtype: torch.dtype) -> str:
    """Return the name of a PyTorch dtype in safetensors files."""
    return next(name for name, each in _DTYPES.items() if each == dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's location in a file: `size` bytes from offset `start` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The tensor's PyTorch dtype."""
        try:
            return _DTYPES[self.dtype]
        except KeyError:
            raise EloError(
                f"{self.file}: {self.name}: is stored as {self.dtype}, a quantised format; give a checkpoint with "
                "float32, float16 or bfloat16 weights"
            ) from None

    def meta(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype without data."""
        return torch.empty(self.shape, dtype=self.torch_dtype, device="meta")

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Read bytes `offset` to `offset + size` of the tensor."""
        with self.file.open("rb", buffering=0) as file:
            return self._read_from(file.fileno(), offset, self.size - offset if size is None else size)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the tensor's bytes in order, at most `chunk_bytes` at a time."""
        with self.file.open("rb", buffering=0) as file:
            for offset in range(0, self.size, chunk_bytes):
                yield self._read_from(file.fileno(), offset, min(chunk_bytes, self.size - offset))

    def _read_from(self, descriptor: int, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = os.pread(descriptor, min(size - len(data), READ_BYTES), self.start + offset + len(data))
            if not more:
                raise UnfinishedError(
                    f"{self.file}: ends within {self.name}; the file changed during reading, try again"
                )
            data += more
        return data


@dataclass
class Checkpoint:
    """The weights of a checkpoint folder: tensors by their names in the files, in file order."""

    folder: Path
    files: list[str]
    indexed: bool
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def main_dtype(self) -> torch.dtype:
        """Return the floating-point dtype with the most stored bytes, or float32 if there is none."""
        sizes: dict[torch.dtype, int] = {torch.float32: 0}
        for tensor in self.tensors.values():
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is not None and dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + tensor.size
        return max(sizes, key=sizes.__getitem__)

    def meta_state_dict(self) -> dict[str, torch.Tensor]:
        """Return every tensor without its data."""
        return {name: tensor.meta() for name, tensor in self.tensors.items()}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's weights.

    A single file takes precedence over an index, as in transformers.

    Raises:
        UnfinishedError: a file is missing, truncated or damaged.
        EloError: the weights are in an unsupported format, a path leads out of the folder, an adapter is beside the
            weights, or every tensor's name has a training wrapper's prefix.
    """
    other = (read_record(folder / "config.json") or {}).get("transformers_weights")
    if other not in (None, SINGLE_FILE):
        raise EloError(
            f"{folder / 'config.json'}: transformers_weights is {other!r}, so transformers reads that file and no "
            f"{SINGLE_FILE}; load the model with transformers and save it again, or remove the key"
        )
    if (folder / SINGLE_FILE).exists():
        checkpoint = Checkpoint(folder, [SINGLE_FILE], indexed=False)
        if (folder / INDEX_FILE).exists():
            _warn_of_index(folder)
    elif (folder / INDEX_FILE).exists():
        checkpoint = Checkpoint(folder, _indexed_files(folder), indexed=True)
    else:
        raise EloError(_no_weights(folder))
    if (folder / ADAPTER_CONFIG).exists():
        raise EloError(
            f"{folder}: holds both a whole model and an adapter ({ADAPTER_CONFIG}), which transformers adds to "
            "the model if peft is installed; if the adapter is already merged into the weights, remove "
            "adapter_config.json and adapter_model.*, otherwise merge it first "
            "(peft: model.merge_and_unload().save_pretrained(NEW_FOLDER))"
        )
    for name in checkpoint.files:
        for tensor in read_header(folder / name):
            if tensor.name in checkpoint.tensors:
                other = checkpoint.tensors[tensor.name].file.name
                raise UnfinishedError(
                    f"{folder}: {tensor.name} is stored twice, in {other} and in {name}; download the checkpoint again"
                )
            checkpoint.tensors[tensor.name] = tensor
    if checkpoint.indexed:
        weight_map = read_json(folder / INDEX_FILE)["weight_map"]
        for tensor_name, file_name in weight_map.items():
            if tensor_name not in checkpoint.tensors or checkpoint.tensors[tensor_name].file.name != file_name:
                raise UnfinishedError(
                    f"{folder / INDEX_FILE}: lists {tensor_name} in {file_name}, but it is not there; "
                    "download the checkpoint again"
                )
    _require_plain_names(checkpoint)
    return checkpoint


@functools.cache  # a run opens the same folder many times
def _warn_of_index(folder: Path) -> None:
    """Warn if the index beside a single file lists other files."""
    weight_map = (read_record(folder / INDEX_FILE) or {}).get("weight_map")
    named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if named != {SINGLE_FILE}:
        log.warning(
            "warning: %s: holds %s and an index of other files (%s); the weights are read from %s, as in "
            "transformers; remove the index and the files that it lists if they are outdated",
            folder,
            SINGLE_FILE,
            ", ".join(sorted(named)[:2]) or "unreadable",
            SINGLE_FILE,
        )


def _require_plain_names(checkpoint: Checkpoint) -> None:
    """Raise EloError if every name has a training wrapper's prefix, since transformers would match none of them."""
    names = list(checkpoint.tensors)
    prefix = ""
    while found := next((each for each in _WRAPPERS if all(n.startswith(prefix + each) for n in names)), None):
        if not names:
            return
        prefix += found
    if prefix:
        outer = next(each for each in _WRAPPERS if prefix.startswith(each))
        raise EloError(
            f"{checkpoint.folder}: every tensor's name begins with {prefix!r}, which {_WRAPPERS[outer]} adds, so "
            f"transformers would match none of them (first {names[0]}); save the unwrapped model "
            "(unwrapped_model.save_pretrained(NEW_FOLDER)), or rename the tensors: "
            f"save_file({{k.removeprefix({prefix!r}): v for k, v in load_file(FILE).items()}}, FILE, "
            "{'format': 'pt'})"
        )


def _indexed_files(folder: Path) -> list[str]:
    index_path = folder / INDEX_FILE
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UnfinishedError(f"{index_path}: has no weight_map of tensor names to file names; download it again")
    files = sorted(set(weight_map.values()))
    for name in files:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise EloError(
                f"{index_path}: lists {name!r}, which is not in the folder and is not read for safety; "
                "give a checkpoint whose files are all in one folder"
            )
        if not name.endswith(".safetensors"):
            raise EloError(
                f"{index_path}: lists {name!r}, which is not a safetensors file; give a safetensors checkpoint"
            )
        if not (folder / name).is_file():
            raise UnfinishedError(
                f"{folder / name}: is missing, but {INDEX_FILE} lists it; download the checkpoint again"
            )
    return files


def _no_weights(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if ADAPTER_CONFIG in names:
        return (
            f"{folder}: holds an adapter (adapter_config.json), not a whole model; merge it into its base first "
            "(peft: model.merge_and_unload().save_pretrained(...))"
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".msgpack", ".h5")) and "model" in name for name in names):
        return (
            f"{folder}: the weights are pickled (.bin) or in another format than safetensors, and unpickling can run "
            "arbitrary code; if you trust them, convert them once: "
            'AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(new_folder)'
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{folder}: holds GGUF weights; give the safetensors checkpoint that they were made from"
    other = sorted(name for name in names if name.endswith(".safetensors"))
    found = f"found {', '.join(other[:3])}" if other else "found no .safetensors file"
    return f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE} ({found}); give a Hugging Face checkpoint folder"


def read_header(path: Path) -> list[StoredTensor]:
    """Read a file's tensors in byte order, and check the header against the file's length.

    Raises:
        UnfinishedError: the file is not safetensors, is truncated, or its offsets do not match its shapes.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        size_bytes = file.read(8)
        header_size = int.from_bytes(size_bytes, "little")
        if len(size_bytes) < 8 or header_size > min(_MAX_HEADER_BYTES, length - 8):
            raise UnfinishedError(f"{path}: not a safetensors file, or truncated ({length} bytes); download it again")
        try:
            header = json.loads(file.read(header_size).decode("utf-8"))
            tensors = [
                _parse_entry(path, name, entry, 8 + header_size)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UnfinishedError(f"{path}: its safetensors header is damaged ({error}); download it again") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + header_size
    for tensor in tensors:
        if tensor.start != end:
            raise UnfinishedError(
                f"{path}: its safetensors header is damaged ({tensor.name} is out of place); download it again"
            )
        end += tensor.size
    if end != length:
        raise UnfinishedError(
            f"{path}: has {length} bytes, but its header asks for {end}; the file is "
            f"{'truncated' if length < end else 'damaged'}, download it again"
        )
    return tensors


def _parse_entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    if begin < 0 or end < begin or any(size < 0 for size in shape):
        raise ValueError(f"{name} has invalid offsets or an invalid shape")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes, which does not match {dtype} {list(shape)}")
    return StoredTensor(name, dtype, shape, path, data_start + begin, end - begin)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `chunks` is called once, when the tensor is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[bytes]]


def write_checkpoint(folder: Path, tensors: list[NewTensor], label: str | None = None) -> None:
    """Write tensors as one safetensors file, or as several files of at most `MAX_SHARD_BYTES` with an index.

    Args:
        folder: existing folder.
        tensors: tensors in the order in which they are divided among files.
        label: name of the work on the terminal; None prints no progress.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    total = sum(tensor.size for tensor in tensors)
    with Progress(total, label, "B") as progress:
        if len(shards) == 1:
            _write_file(folder / SINGLE_FILE, shards[0], progress)
            return
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / name, shard, progress)
            weight_map.update({tensor.name: name for tensor in shard})
    _write_index(folder, weight_map, total)


def _write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: list[NewTensor], progress: Progress) -> None:
    # Wide dtypes come first, as in the safetensors library, so that every tensor is aligned to its item size.
    tensors = sorted(tensors, key=lambda tensor: -_DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(chunk)
                progress.advance(len(chunk))
            if written != tensor.size:
                raise UnfinishedError(
                    f"{path}: {tensor.name}: wrote {written} bytes instead of {tensor.size}; run the command again"
                )
