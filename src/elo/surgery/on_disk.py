"""Detach decoder layers from a checkpoint on disk, and attach them again, without loading the model into memory."""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.folder import (
    CONFIG_FILE,
    CheckpointFolder,
    copy_side_files,
    copy_unlisted_weights,
    open_folder,
    refuse_overlap,
    write_config,
)
from elo.checkpoint.layers import parse_layers
from elo.checkpoint.model_config import num_layers_of, text_config_of
from elo.checkpoint.naming import LayerNames, NameMap, find_layer_names, load_hollow, map_names, refuse_more_layers
from elo.checkpoint.new_rows import first_new_row_of
from elo.checkpoint.refusals import require_detachable
from elo.checkpoint.shared_files import copy_shared
from elo.checkpoint.tensor_files import (
    INDEX_FILE,
    Checkpoint,
    NewTensor,
    StoredTensor,
    write_checkpoint,
)
from elo.errors import EloError, UnfinishedError
from elo.log import Progress
from elo.store.files import atomic_directory, fsync_tree, readable_disk_errors
from elo.surgery.equivalence import build_hollow, build_hollow_causal_lm, require_same_layers
from elo.surgery.in_memory import blend, check_include
from elo.surgery.layer_config import edit_json, layer_edits, read_edited_config
from elo.surgery.matching import match_tensors, paired_chunks, same_bytes, tensor_bytes
from elo.surgery.provenance import FORMAT, PROVENANCE_KEY, full_sha256, layer_sha256, read_provenance


def detach_checkpoint(
    checkpoint: Path,
    layers: str | int | Sequence[int],
    output: Path,
    *,
    base_name: str | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
    trust_remote_code: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint with the embedding, the selected decoder layers, the final norm and the head.

    Args:
        checkpoint: folder with config.json and safetensors weights.
        layers: selection such as `first:1,last:1` or `[0, -1]`.
        output: folder to write. If writing fails, no output is left.
        base_name: name of the base in the record, such as a hub id; None records the folder's path.
        overwrite: replace an existing output.
        check: function called with the complete folder before it is renamed to `output`. It raises EloError to reject
            the folder.
        trust_remote_code: run code that ships with the checkpoint, and copy it.
        label: label of the progress bar; None shows no progress.

    Returns:
        The provenance record, as written to config.json.

    Raises:
        EloError: the checkpoint, the selection or the output cannot be used.
        UnsupportedArchitectureError: a kept layer would compute something different than in the base.
    """
    base = open_folder(Path(checkpoint), trust_remote_code)
    if PROVENANCE_KEY in base.config_json:
        raise EloError(f"{checkpoint}: is already a detached checkpoint; give the whole model it was detached from")
    require_detachable(base.config)
    refuse_overlap(Path(output), base.folder)
    kept = parse_layers(layers, num_layers_of(base.config))
    hollow = build_hollow_causal_lm(base.config, trust_remote_code=trust_remote_code)
    names = find_layer_names(hollow, base.weights)
    refuse_more_layers(base.weights, names)
    edits = layer_edits(text_config_of(base.config), kept)
    config_json = edit_json(base.config_json, base.config, edits)
    small_config = read_edited_config(config_json, base.config, edits)
    require_same_layers(hollow, build_hollow(type(hollow), small_config), kept)
    renamed = _small_tensors(base.weights, names, kept, type(hollow), small_config)

    with (
        readable_disk_errors(Path(output)),
        atomic_directory(Path(output), overwrite=overwrite) as folder,
        ThreadPoolExecutor(1) as executor,
    ):
        # Computing digests takes about as long as writing and flushing. All three release the GIL, so they overlap.
        base_name = base_name or str(base.folder.resolve())
        provenance = executor.submit(_provenance, base, names, kept, renamed, base_name)
        tensors = [NewTensor(name, t.dtype, t.shape, t.size, t.chunks) for name, t in renamed.items()]
        write_checkpoint(folder, tensors, label)
        fsync_tree(folder)
        record = config_json[PROVENANCE_KEY] = provenance.result()
        write_config(folder, config_json)
        copy_side_files(base.folder, folder, python=trust_remote_code)
        check(folder)
    return record


def attach_checkpoint(
    detached: Path,
    base: Path,
    output: Path,
    *,
    scale: float = 1.0,
    include: Sequence[str] = (),
    link: bool = False,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
    trust_remote_code: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Write the base with a detached checkpoint's layers in their original positions.

    The base's files are copied (as clones that share blocks on disk if the file system supports them), and the layers
    are written into the copies. config.json is the base's.

    Args:
        detached: output of `detach_checkpoint`, or a checkpoint that any tool trained from it and saved as safetensors.
        base: folder that it was detached from.
        output: folder to write. If writing fails, no output is left.
        scale: weights become theta0 + scale * (theta - theta0), computed in float32; 1 restores theta exactly.
            Vocabulary rows that `elo vocab` added are always taken as trained.
        include: parts to attach besides the layers: "embedding", "norm", "head".
        link: hard-link weight files that do not change, if the file system allows it.
        overwrite: replace an existing output.
        check: function called with the complete folder before it is renamed to `output`. It raises EloError to reject
            the folder.
        trust_remote_code: run code that ships with the checkpoint, and copy it.
        label: label of the progress bar; None shows no progress.

    Returns:
        {"base", "detached", "layers", "num_base_layers", "scale", "include", "tensors" (number of attached tensors),
        "files" (numbers of linked, cloned and copied weight files)}

    Raises:
        EloError: the layers come from another base, or the detached checkpoint was changed outside its layers and
            `include`. The message names the first tensor that differs.
    """
    check_include(include)
    small = open_folder(Path(detached), trust_remote_code)
    record = read_provenance(small.config_json.get(PROVENANCE_KEY), str(detached))
    whole = open_folder(Path(base), trust_remote_code)
    if PROVENANCE_KEY in whole.config_json:
        raise EloError(f"{base}: is a detached checkpoint, not a base; give the whole model {record.get('base')}")
    require_detachable(whole.config)
    kept: list[int] = record["layers"]
    _check_counts(small, whole, record)
    refuse_overlap(Path(output), whole.folder)
    refuse_overlap(Path(output), small.folder)
    hollow = build_hollow_causal_lm(whole.config, trust_remote_code=trust_remote_code)
    names = find_layer_names(hollow, whole.weights)
    mapped = map_names(hollow, whole.weights.meta_state_dict())
    _check_base(whole, names, record)

    wanted = _small_tensors(whole.weights, names, kept, type(hollow), small.config)
    with tempfile.TemporaryDirectory(prefix="elo-attach-") as scratch:
        matched = match_tensors(wanted, small.weights, type(hollow), small.config, Path(scratch))
        updates = _updates(wanted, matched, names, mapped, find_architecture(hollow).tied, include)
        with readable_disk_errors(Path(output)), atomic_directory(Path(output), overwrite=overwrite) as folder:
            written = {tensor.file.name for tensor, _ in updates}
            sizes = {name: (whole.folder / name).stat().st_size for name in whole.weights.files}
            sharing: Counter[str] = Counter()
            with Progress(sum(sizes.values()), label, "B") as progress:
                for name, size in sizes.items():
                    sharing[copy_shared(whole.folder / name, folder / name, link=link and name not in written)] += 1
                    progress.advance(size)
            if whole.weights.indexed:
                shutil.copyfile(whole.folder / INDEX_FILE, folder / INDEX_FILE)
            for tensor, trained in updates:
                whole_from = first_new_row_of(whole.config, mapped.group(tensor.name))
                path = folder / tensor.file.name
                patch_tensor(path, tensor, base=tensor, trained=trained, scale=scale, whole_from=whole_from)
            shutil.copyfile(whole.folder / CONFIG_FILE, folder / CONFIG_FILE)
            copy_unlisted_weights(whole.weights, folder)
            copy_side_files(whole.folder, folder, python=trust_remote_code)
            check(folder)
    return {
        "base": str(base),
        "detached": str(detached),
        "layers": kept,
        "num_base_layers": record["num_base_layers"],
        "scale": scale,
        "include": list(include),
        "tensors": len(updates),
        "files": dict(sharing),
    }


def _small_tensors(
    weights: Checkpoint,
    names: LayerNames,
    kept: Sequence[int],
    model_class: type[PreTrainedModel],
    small_config: PretrainedConfig,
) -> dict[str, StoredTensor]:
    """Return the base's tensors that belong in the detached checkpoint, by their names there.

    Tensors that the detached model does not load, such as multi-token-prediction layers or other heads, are left out.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in weights.tensors.items():
        layer, rest = names.split(name)
        if layer is None:
            tensors[name] = tensor
        elif layer in kept:
            tensors[names.join(kept.index(layer), rest)] = tensor
    hollow, report = load_hollow(model_class, small_config, {n: t.meta() for n, t in tensors.items()})
    if report.unexpected:
        unknown = map_names(hollow, {n: t.meta() for n, t in tensors.items()}).unknown
        tensors = {name: t for name, t in tensors.items() if unknown.get(name) not in report.unexpected}
        _, report = load_hollow(model_class, small_config, {n: t.meta() for n, t in tensors.items()})
    if problem := report.problem():
        raise UnfinishedError(
            f"{weights.folder}: the tensors do not match the model in {CONFIG_FILE}: {problem}; "
            "download the checkpoint again"
        )
    return tensors


def _provenance(
    base: CheckpointFolder,
    names: LayerNames,
    kept: Sequence[int],
    small: dict[str, StoredTensor],
    base_name: str,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "base": base_name,
        "layers": list(kept),
        "num_base_layers": names.num_layers,
        "frozen": {name: full_sha256(t) for name, t in sorted(small.items()) if names.split(name)[0] is None},
        "base_layers": _layer_digests(base.weights, names, kept),
    }


def _layer_digests(weights: Checkpoint, names: LayerNames, kept: Sequence[int]) -> list[str]:
    """Compute one SHA-256 digest per base layer: over all bytes of a kept layer, over samples of any other layer."""
    layers: list[list[tuple[str, StoredTensor]]] = [[] for _ in range(names.num_layers)]
    for name, tensor in sorted(weights.tensors.items()):
        layer, rest = names.split(name)
        if layer is not None and layer < names.num_layers:
            layers[layer].append((rest, tensor))
    return [layer_sha256(tensors, sample=index not in kept) for index, tensors in enumerate(layers)]


def _check_counts(small: CheckpointFolder, whole: CheckpointFolder, record: dict[str, Any]) -> None:
    if small.config.model_type != whole.config.model_type:
        raise EloError(
            f"{whole.folder}: is a {whole.config.model_type} model, but {small.folder} was detached from a "
            f"{small.config.model_type} model; give the base {record.get('base')}"
        )
    found = num_layers_of(whole.config)
    if found != record["num_base_layers"]:
        raise EloError(
            f"{whole.folder}: has {found} decoder layers, but {small.folder} was detached from a model with "
            f"{record['num_base_layers']}; give the base {record.get('base')}"
        )
    if small.config.tie_word_embeddings != whole.config.tie_word_embeddings:
        raise EloError(
            f"{small.folder}: tie_word_embeddings is {small.config.tie_word_embeddings}, but "
            f"{whole.config.tie_word_embeddings} in {whole.folder}; set it as in the base"
        )
    if num_layers_of(small.config) != len(record["layers"]):
        raise EloError(
            f"{small.folder}: has {num_layers_of(small.config)} decoder layers, but its record lists "
            f"{len(record['layers'])}; restore the configuration or detach again"
        )


def _check_base(whole: CheckpointFolder, names: LayerNames, record: dict[str, Any]) -> None:
    """Raise EloError if this is not the recorded base. The message names the first tensor or layer that differs."""

    def refuse(what: str) -> EloError:
        return EloError(f"{whole.folder}: is not the base of these layers: {what}; give the base {record.get('base')}")

    for name, digest in record.get("frozen", {}).items():
        tensor = whole.weights.tensors.get(name)
        if tensor is None:
            raise refuse(f"it has no {name}")
        if full_sha256(tensor) != digest:
            raise refuse(f"{name} differs")
    recorded = record.get("base_layers")
    if recorded is not None:
        for index, digest in enumerate(_layer_digests(whole.weights, names, record["layers"])):
            if recorded[index : index + 1] != [digest]:
                raise refuse(f"layer {index} ({names.join(index, '*')}) differs")


def _updates(
    wanted: dict[str, StoredTensor],
    matched: dict[str, StoredTensor],
    names: LayerNames,
    mapped: NameMap,
    tied: bool,
    include: Sequence[str],
) -> list[tuple[StoredTensor, StoredTensor]]:
    """Return (base tensor, trained tensor) for all tensors to attach.

    Raises:
        EloError: a shape differs, or a tensor that is not to be attached differs from the base's.
    """
    updates = []
    for name, tensor in wanted.items():
        trained = matched.get(name)
        if trained is None:
            continue  # not needed in the file, such as a tied head or a buffer that the model computes
        if trained.shape != tensor.shape:
            raise EloError(
                f"{trained.file}: {trained.name} is {list(trained.shape)}, but {list(tensor.shape)} in the base; "
                "train without changing shapes"
            )
        group = mapped.group(tensor.name)
        if names.split(name)[0] is not None or group in include:
            updates.append((tensor, trained))
        elif not same_bytes(tensor, trained):
            raise EloError(
                f"{trained.file}: {trained.name} is not in a detached layer, but was changed in training; "
                + (f"attach it too (include: {group})" if group else "attach only layers, embedding, norm and head")
                + ", or freeze everything except the layers in training"
            )
    tied_updates = [pair for pair in updates if tied and mapped.group(pair[0].name) == "embedding"]
    for name, tensor in wanted.items():
        if tied_updates and name not in matched and mapped.group(tensor.name) == "head":
            updates.append((tensor, tied_updates[0][1]))
    return updates


def patch_tensor(
    path: Path,
    place: StoredTensor,
    *,
    base: StoredTensor,
    trained: StoredTensor,
    scale: float = 1.0,
    whole_from: int | None = None,
) -> None:
    """Overwrite a tensor in the file at `path` with base + scale x (trained - base).

    Args:
        place: location of the tensor in the file.
        base: tensor of the base.
        trained: trained tensor, in any dtype.
        scale: factor of the change.
        whole_from: first row that is taken as trained at any scale; None if there is none.
    """
    whole = None if whole_from is None else whole_from * math.prod(place.shape[1:])
    with path.open("r+b", buffering=0) as file:
        file.seek(place.start)
        for base_chunk, trained_chunk in paired_chunks(base, trained):
            file.write(tensor_bytes(blend(base_chunk, trained_chunk, scale, whole)))
            if whole is not None:
                whole = max(0, whole - base_chunk.numel())
