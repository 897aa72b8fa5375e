"""Scale the change that training made to a checkpoint on disk: base + scale x (trained - base)."""

from pathlib import Path

from elo.checkpoint.folder import copy_side_files, open_folder, refuse_overlap
from elo.checkpoint.naming import map_names
from elo.checkpoint.new_rows import first_new_row_of
from elo.checkpoint.shared_files import copy_shared
from elo.errors import EloError
from elo.store.files import atomic_directory, readable_disk_errors
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.surgery.on_disk import patch_tensor


def scale_change(
    base: Path, trained: Path, output: Path, scale: float, *, overwrite: bool = False, trust_remote_code: bool = False
) -> int:
    """Write a checkpoint whose weights are base + scale x (trained - base).

    Each sum is computed in float32 and rounded once, to the stored dtype. Other files are those of `trained`. Rows of
    embedding and head that `elo vocab extend` added are always taken as trained, since the base has no trained values
    for them.

    Args:
        base: checkpoint folder.
        trained: checkpoint folder with the same tensors.
        output: folder to write. If writing fails, no output is left.
        scale: factor of the change: 0 is the base, 1 the trained model.
        overwrite: replace an existing output.
        trust_remote_code: run code that ships with the checkpoint, and copy it.

    Returns:
        Number of floating-point tensors. Only these are scaled; other tensors are those of `trained`.

    Raises:
        EloError: a folder cannot be used, or the two folders do not hold the same tensors.
    """
    before, after = open_folder(base, trust_remote_code), open_folder(trained, trust_remote_code)
    for folder in (base, trained):
        refuse_overlap(output, folder)
    for name, tensor in after.weights.tensors.items():
        other = before.weights.tensors.get(name)
        if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            found = "is missing" if other is None else f"is {other.dtype} {list(other.shape)}"
            raise EloError(
                f"{base}: {name} {found}, but {tensor.dtype} {list(tensor.shape)} in {trained}; "
                "give the base of the trained checkpoint"
            )
    hollow = build_hollow_causal_lm(after.config, trust_remote_code=trust_remote_code)
    names = map_names(hollow, after.weights.meta_state_dict())
    with readable_disk_errors(output), atomic_directory(output, overwrite=overwrite) as folder:
        for path in sorted(trained.iterdir()):
            if path.is_file():
                copy_shared(path, folder / path.name, link=False)
        copy_side_files(trained, folder, python=trust_remote_code)  # those in folders
        patched = [tensor for tensor in after.weights.tensors.values() if tensor.torch_dtype.is_floating_point]
        for tensor in patched:
            whole_from = first_new_row_of(after.config, names.group(tensor.name))
            patch_tensor(
                folder / tensor.file.name,
                tensor,
                base=before.weights.tensors[tensor.name],
                trained=tensor,
                scale=scale,
                whole_from=whole_from,
            )
    return len(patched)
