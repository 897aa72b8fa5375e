"""Write, find and read training checkpoints.

The manifest is written last, and a checkpoint without a valid manifest is not used. Weights have the model's names, not
those of a wrapper such as DDP, so that another number of processes can resume.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from elo.errors import UnfinishedError
from elo.store.files import fsync_tree, read_json, readable_disk_errors, remove, sha256_file, write_json
from elo.train.trained_files import first_names

MANIFEST = "elo_checkpoint.json"
RECORD = "elo_record.json"


def write_checkpoint(accelerator: Accelerator, folder: Path, step: int, record: dict[str, Any], keep: int) -> None:
    """Write and seal the checkpoint of `step`, then remove all but the `keep` newest. Every process must call this.

    Args:
        record: JSON-compatible state of the training record.
    """
    checkpoint = folder / f"checkpoint-{step}"

    def use_own_names(models: list[Any], weights: list[Any], _: str) -> None:
        for index in range(len(weights)):  # empty if FSDP or DeepSpeed shards the weights
            model = accelerator.unwrap_model(models[index])
            first = first_names(model)
            weights[index] = {name: t.contiguous() for name, t in model.state_dict().items() if first[name] == name}

    hook = accelerator.register_save_state_pre_hook(use_own_names)
    with readable_disk_errors(checkpoint):
        accelerator.save_state(str(checkpoint))
    hook.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with readable_disk_errors(checkpoint):
            write_json(checkpoint / RECORD, record)
            seal_checkpoint(checkpoint)
        rotate_checkpoints(folder, keep)
    accelerator.wait_for_everyone()


def read_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore the weights, the optimizer, the schedule and the random generators. Every process must call this."""

    def unwrap(models: list[Any], _: str) -> None:
        models[:] = map(accelerator.unwrap_model, models)

    hook = accelerator.register_load_state_pre_hook(unwrap)
    accelerator.load_state(str(checkpoint))
    hook.remove()


def seal_checkpoint(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to disk, then write the manifest with sizes and checksums."""
    fsync_tree(checkpoint)
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"files": files})


def check_checkpoint(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        UnfinishedError: the manifest is missing or damaged, or a file is missing, truncated or altered.
    """
    manifest = read_json(checkpoint / MANIFEST)
    try:
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if ".." in path.parts or Path(name).is_absolute():
                raise UnfinishedError(f"{checkpoint / MANIFEST}: lists {name!r}, which is outside its folder")
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                raise UnfinishedError(f"{path}: missing or damaged")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UnfinishedError):
            raise
        raise UnfinishedError(f"{checkpoint / MANIFEST}: is damaged, or not the manifest of a checkpoint") from None


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete checkpoint in `folder` with its record, and remove newer incomplete ones.

    Args:
        warn: function that shows the user a message about a damaged checkpoint.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            check_checkpoint(checkpoint)
            return checkpoint, read_json(checkpoint / RECORD)
        except UnfinishedError as error:
            if (checkpoint / MANIFEST).exists():
                warn(f"{error}; {checkpoint.name} is removed, and an earlier checkpoint is used if there is one")
            remove(checkpoint)
    return None


def rotate_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints. Call this after the newest one is sealed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)[keep:]:
        # If this is killed, a checkpoint without a manifest counts as unfinished rather than damaged.
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name, or -1. File times do not order checkpoints: clocks can jump."""
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1
