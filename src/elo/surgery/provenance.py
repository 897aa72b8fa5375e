"""Record in config.json which base a detached checkpoint comes from. Other tools' save_pretrained keeps the record."""

import hashlib
from collections.abc import Iterable
from typing import Any

from elo.checkpoint.tensor_files import StoredTensor
from elo.errors import EloError

PROVENANCE_KEY = "elo_detached"
FORMAT = 1
_SAMPLE_BYTES = 4096


def read_provenance(value: Any, where: str) -> dict[str, Any]:
    """Check and return a provenance record.

    Args:
        value: value of PROVENANCE_KEY in a configuration; None if it is absent.
        where: file or model that the error message names.

    Raises:
        EloError: the record is missing, damaged or from another version.
    """
    if value is None:
        raise EloError(
            f"{where}: was not detached by elo (no {PROVENANCE_KEY!r} in its configuration); "
            "give the output of elo detach, or a checkpoint trained from it"
        )
    layers = value.get("layers") if isinstance(value, dict) else None
    count = value.get("num_base_layers") if isinstance(value, dict) else None
    if (
        not isinstance(layers, list)
        or type(count) is not int
        or not layers
        or not all(type(index) is int and 0 <= index < count for index in layers)
        or layers != sorted(set(layers))
        or not isinstance(value.get("frozen", {}), dict)
        or not isinstance(value.get("base_layers", []), list)
        or value.get("format", FORMAT) != FORMAT
    ):
        raise EloError(
            f"{where}: its {PROVENANCE_KEY!r} record is damaged or from another version of elo; detach again"
        )
    return value


def full_sha256(tensor: StoredTensor) -> str:
    """Compute the SHA-256 digest of a tensor's dtype, shape and bytes."""
    digest = _header_digest(tensor)
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def layer_sha256(tensors: Iterable[tuple[str, StoredTensor]], *, sample: bool) -> str:
    """Compute the SHA-256 digest of the names, dtypes, shapes and bytes of a layer's tensors.

    With `sample`, only 4 KiB at the start, middle and end of each tensor are read.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + b"\0")
        if not sample:
            digest.update(full_sha256(tensor).encode())
            continue
        digest.update(_header_digest(tensor).digest())
        last = max(0, tensor.size - _SAMPLE_BYTES)
        for offset in sorted({0, last // 2, last}):
            digest.update(tensor.read(offset, min(_SAMPLE_BYTES, tensor.size - offset)))
    return digest.hexdigest()


def _header_digest(tensor: StoredTensor) -> "hashlib._Hash":
    return hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
