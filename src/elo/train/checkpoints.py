"""Write and find training checkpoints. A checkpoint without a valid manifest, which is written last, is ignored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from elo.errors import UnfinishedError
from elo.store.files import fsync_tree, read_json, remove, sha256_file, write_json

MANIFEST = "elo_checkpoint.json"


def seal_checkpoint(checkpoint: Path, state: dict[str, Any]) -> None:
    """Flush every file of a checkpoint, then write its manifest: sizes, checksums and `state`."""
    fsync_tree(checkpoint)
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"files": files, "state": state})


def check_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return the state stored with a checkpoint.

    Raises:
        UnfinishedError: it has no manifest, or a file is missing, truncated or altered.
    """
    manifest = read_json(checkpoint / MANIFEST)
    try:
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if ".." in path.parts or Path(name).is_absolute():
                raise UnfinishedError(f"{checkpoint / MANIFEST}: lists {name!r}, which is outside its folder")
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                raise UnfinishedError(f"{path}: missing or damaged")
        return {key: float(manifest["state"][key]) for key in ("seconds", "cpu_seconds")}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UnfinishedError):
            raise
        raise UnfinishedError(f"{checkpoint / MANIFEST}: is damaged, or not the manifest of a checkpoint") from None


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete checkpoint in `folder` with its state, and remove newer incomplete ones."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            return checkpoint, check_checkpoint(checkpoint)
        except UnfinishedError as error:
            if (checkpoint / MANIFEST).exists():
                warn(f"{error}; checkpoint {checkpoint.name} is removed, and the previous one is used")
            remove(checkpoint)
    return None


def rotate_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints. Call it after the newest is sealed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)[keep:]:
        # Without its manifest a half-removed checkpoint counts as unfinished, not as damaged.
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name. It identifies the newest checkpoint, since clocks can jump."""
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1
