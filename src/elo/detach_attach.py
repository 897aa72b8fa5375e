"""Detach and attach layers of a checkpoint folder or hub id, and check the output, without a configuration file."""

from collections.abc import Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from elo.check_output import check_output
from elo.checkpoint.download import OTHER_WEIGHTS, fetch_checkpoint, file_patterns
from elo.checkpoint.layers import DEFAULT_LAYERS
from elo.checkpoint.local_names import require_path_or_id
from elo.errors import EloError
from elo.store.files import readable_disk_errors
from elo.store.remote import is_remote, require_local
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint

_REMEDY = "report this with the model's name; nothing was written"


def detach(
    checkpoint: str | Path,
    layers: str | int | Sequence[int] = DEFAULT_LAYERS,
    *,
    output: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint with the embedding, the selected decoder layers, the final norm and the head.

    Args:
        checkpoint: Hugging Face checkpoint folder or hub id.
        layers: decoder layers to keep, such as `first:1,last:1`, `0,1,-1` or `0-3`.
        output: folder to write. If writing fails, no output is left.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        The provenance record, as written to the output's config.json.

    Raises:
        EloError: the checkpoint or the layers cannot be used, or the output exists or cannot be written.
        UnsupportedArchitectureError: a kept layer would compute something different than in the base.
    """
    check_replaceable(Path(output), overwrite)
    folder = resolve_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    name = str(checkpoint) if not Path(checkpoint).is_dir() else None
    with readable_disk_errors(Path(output)):
        return detach_checkpoint(
            folder,
            layers,
            Path(output),
            base_name=name,
            overwrite=overwrite,
            check=partial(check_output, inputs=(folder,), remedy=_REMEDY, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
            label="detach",
        )


def attach(
    detached: str | Path,
    base: str | Path,
    *,
    output: str | Path,
    scale: float = 1.0,
    include: Sequence[str] = (),
    link: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the base with a detached checkpoint's layers in their original positions.

    Args:
        detached: detached checkpoint, trained or not: a folder or hub id.
        base: checkpoint that it was detached from: a folder or hub id.
        output: folder to write. If writing fails, no output is left.
        scale: weights become theta0 + scale * (theta - theta0); 1 restores the trained weights exactly.
        include: parts to attach besides the layers: "embedding", "norm", "head".
        link: hard-link weight files that do not change, if the file system allows it. This writes no data, but
            changing such a file in place also changes the base's.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        A record of what was attached: {"base", "detached", "layers", "num_base_layers", "scale", "include", "tensors",
        "files"}.

    Raises:
        EloError: an argument is invalid, `detached` was not made from `base`, or the output exists or cannot be
            written.
    """
    check_replaceable(Path(output), overwrite)
    if not (isfinite(scale) and abs(scale) <= 100):
        raise EloError(
            f"scale: got {scale}; write a number from -100 to 100 (1 keeps the trained weights, 0.5 half of the change)"
        )

    small = resolve_checkpoint(detached, trust_remote_code=trust_remote_code)
    whole = resolve_checkpoint(base, trust_remote_code=trust_remote_code)
    with readable_disk_errors(Path(output)):
        return attach_checkpoint(
            small,
            whole,
            Path(output),
            scale=scale,
            include=include,
            link=link,
            overwrite=overwrite,
            check=partial(check_output, inputs=(whole,), remedy=_REMEDY, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
            label="attach",
        )


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Raise EloError if the output is not local, or overwriting would remove anything other than a checkpoint."""
    require_local(output, "output")
    if not overwrite or not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise EloError(f"{output}: is not a checkpoint, so --overwrite does not replace it; choose another output")


def resolve_checkpoint(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Return the folder of a checkpoint.

    Files of a hub id (owner/name or hf://owner/name) or of an address in object storage are downloaded to the Hugging
    Face cache if necessary, Python files only with `trust_remote_code`.

    Raises:
        EloError: there is no such folder, and the hub does not provide such a model.
    """
    if is_remote(checkpoint):
        return fetch_checkpoint(str(checkpoint), trust_remote_code)
    checkpoint = str(checkpoint).removeprefix("hf://")
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise EloError(f"{checkpoint}: is not a folder; give a checkpoint folder")
    require_path_or_id(checkpoint, "give a checkpoint folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                checkpoint,
                allow_patterns=file_patterns(trust_remote_code),
                ignore_patterns=OTHER_WEIGHTS,
            )
        )
    except Exception as error:  # the hub client raises its own errors, httpx's and OSError
        lines = str(error).strip().splitlines()
        raise EloError(
            f"{checkpoint}: is not a local folder and cannot be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {lines[0][:200] if lines else ''}); check the name, the network and your token"
        ) from None
