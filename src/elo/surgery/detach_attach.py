"""`elo detach` and `elo attach`: on a checkpoint folder or a hub id, with no configuration file and no tokenizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from elo.checkpoint.layers import DEFAULT_LAYERS
from elo.errors import EloError
from elo.store.files import disk_problem
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint

WEIGHT_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
_OTHER_WEIGHTS = ["original/*", "consolidated*", "[!a]*/*", "a[!d]*/*"]  # all folders but additional_chat_templates


def detach(
    checkpoint: str | Path,
    layers: str | int | Sequence[int] = DEFAULT_LAYERS,
    *,
    output: str | Path,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of the embedding, the chosen decoder layers, the final norm and the head.

    Args:
        checkpoint: a Hugging Face checkpoint folder or hub id.
        layers: which decoder layers to keep, such as `first:1,last:1`, `0,1,-1` or `0-3`.
        output: folder to write; it appears whole or not at all.
        revision: branch, tag or commit of a hub id.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        The record of where the detached checkpoint comes from, as written to its config.json.
    """

    check_replaceable(Path(output), overwrite)
    folder = resolve_checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    name = str(checkpoint) if not Path(checkpoint).is_dir() else None
    with readable_errors():
        return detach_checkpoint(
            folder,
            layers,
            Path(output),
            base_name=name,
            revision=revision,
            overwrite=overwrite,
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
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the base with a detached checkpoint's layers back at their places.

    Args:
        detached: the detached checkpoint, trained or not: a folder or hub id.
        base: the checkpoint that it was detached from: a folder or hub id.
        output: folder to write; it appears whole or not at all.
        scale: what is put back is theta0 + scale * (theta - theta0); 1 puts the trained weights back exactly.
        include: of "embedding", "norm" and "head", what is put back besides the layers.
        link: weight files that hold nothing of what is put back become hard links to the base's, where that can be:
            nothing is written for them, but whoever changes one in place changes both.
        revision: branch, tag or commit of the base when it is a hub id.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        What was put back: {"base", "detached", "layers", "num_base_layers", "scale", "include", "tensors", "files"}.
    """

    check_replaceable(Path(output), overwrite)
    if not (isfinite(scale) and abs(scale) <= 100):
        raise EloError(
            f"scale: {scale} is not a number within 100 of 0; 1 puts the trained weights back, 0.5 half of the change"
        )

    with readable_errors():
        return attach_checkpoint(
            resolve_checkpoint(detached, trust_remote_code=trust_remote_code),
            resolve_checkpoint(base, revision=revision, trust_remote_code=trust_remote_code),
            Path(output),
            scale=scale,
            include=include,
            link=link,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            label="attach",
        )


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what the file system raises into one message."""
    try:
        yield
    except OSError as error:  # a full disk, a file without read permission
        raise EloError(disk_problem(error)) from None


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Raise EloError where overwriting would remove something else than a checkpoint."""
    if not overwrite or not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise EloError(f"{output}: is not a checkpoint, so --overwrite does not remove it; choose another output")


def resolve_checkpoint(checkpoint: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint; a hub id's files are downloaded to the Hugging Face cache, Python only if trusted.

    Raises:
        EloError: there is no such folder, and no such model can be had from the hub.
    """
    folder = Path(checkpoint).expanduser()
    if folder.exists() or len(folder.parts) > 2 or str(checkpoint).startswith((".", "/", "~")):
        if folder.is_dir():
            return folder
        raise EloError(
            f"{checkpoint}: {'is not a folder' if folder.exists() else 'no such folder'}; give a checkpoint folder"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*WEIGHT_PATTERNS, *(["*.py"] if trust_remote_code else [])]
        return Path(
            snapshot_download(
                str(checkpoint), revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_WEIGHTS
            )
        )
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        lines = str(error).strip().splitlines()
        raise EloError(
            f"{checkpoint}: is not a folder here, and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {lines[0][:200] if lines else ''}); check the name, the network and your token"
        ) from None
