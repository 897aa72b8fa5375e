"""Read a checkpoint folder's configuration and headers, and copy the files beside its weights."""

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from elo.checkpoint.reading import require_pad_row
from elo.checkpoint.refusals import refuse_quantised
from elo.checkpoint.shared_files import copy_shared
from elo.checkpoint.tensor_files import Checkpoint, open_checkpoint, read_header
from elo.errors import EloError, UnfinishedError, UnsupportedArchitectureError, error_line
from elo.store.files import read_json

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
"""Globs of a tokenizer's files, without its chat templates."""
TEMPLATE_PATTERNS = ("chat_template*", "additional_chat_templates")
"""Globs of a tokenizer's chat templates; the second matches a folder."""
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".npz", ".pkl", ".distcp",
}  # fmt: skip
_NOT_SIDE = {"config.json", "adapter_config.json", "trainer_state.json", "quantize_config.json"}
_OTHER_FORMATS = ("consolidated*", "adapter*")  # the same weights in another format, and adapters for them


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint folder's configuration and tensor headers, without tensor data."""

    folder: Path
    config_json: dict[str, Any]
    config: PretrainedConfig
    weights: Checkpoint


def open_folder(folder: Path, trust_remote_code: bool) -> CheckpointFolder:
    """Read a folder's configuration and headers.

    Raises:
        EloError: the folder is not a checkpoint, or its format is not supported.
    """
    if not folder.is_dir():
        raise EloError(f"{folder}: no such folder; give a Hugging Face checkpoint folder")
    if not (folder / CONFIG_FILE).is_file():
        if (folder / "adapter_config.json").is_file():
            open_checkpoint(folder)  # raises the error about adapters
        raise EloError(f"{folder}: has no {CONFIG_FILE}; give a Hugging Face checkpoint folder")
    config_json = read_json(folder / CONFIG_FILE)
    if not isinstance(config_json, dict):
        raise UnfinishedError(f"{folder / CONFIG_FILE}: is not a JSON object; download the file again")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for an invalid configuration
        raise UnsupportedArchitectureError(
            f"{folder / CONFIG_FILE}: transformers cannot read it ({error_line(error)})"
            + ("" if trust_remote_code else "; if the model ships its own code, set trust_remote_code")
        ) from None
    require_pad_row(config, str(folder / CONFIG_FILE))
    refuse_quantised(config)
    return CheckpointFolder(folder, config_json, config, open_checkpoint(folder))


def refuse_overlap(output: Path, folder: Path) -> None:
    """Raise EloError if writing `output` would change the input `folder`."""
    output, folder = output.resolve(), folder.resolve()
    if output == folder or output in folder.parents or folder in output.parents:
        raise EloError(f"{output}: overlaps the input {folder}; choose an output folder outside it")


def write_config(folder: Path, config_json: dict[str, Any]) -> None:
    """Write a folder's config.json."""
    # Escape to ASCII, as transformers does: JSON can hold an unpaired surrogate, UTF-8 cannot.
    (folder / CONFIG_FILE).write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")


def put_first(folder: Path, text: str, name: str = CARD_FILE) -> None:
    """Write a file; an existing one is renamed, README.md to README_base.md, and that one to README_base_base.md.

    Args:
        name: name of the file in `folder`; by default that of the model card.
    """

    def set_aside(existing: Path) -> None:
        if existing.exists():
            kept = existing.with_stem(f"{existing.stem}_base")
            set_aside(kept)
            existing.rename(kept)

    set_aside(folder / name)
    (folder / name).write_text(text, encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files and its chat templates."""
    for pattern in (*TOKENIZER_PATTERNS, *TEMPLATE_PATTERNS):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def copy_side_files(source: Path, target: Path, *, python: bool, leave_out: Collection[str] = ()) -> None:
    """Copy the files beside the weights: tokenizer, processors, generation settings, licence, template folders.

    Hidden entries of `source`, weights in any format, folders that contain weights, and files that `target` already
    has are skipped.

    Args:
        python: also copy Python code.
        leave_out: globs of further entries to skip.
    """
    for path in sorted(source.iterdir()):
        if (
            path.name.startswith(".")
            or path.name in _NOT_SIDE
            or path.name.endswith(".index.json")
            or any(path.match(pattern) for pattern in leave_out)
            or target.resolve().is_relative_to(path.resolve())
        ):
            continue
        files = [path]
        if path.is_dir():
            files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
            if any(file.suffix in _WEIGHT_SUFFIXES for file in files):  # the folder is another checkpoint
                continue
        for file in files:
            copied = target / file.relative_to(source)
            wanted = file.suffix not in _WEIGHT_SUFFIXES and (python or file.suffix != ".py")
            if wanted and file.is_file() and not copied.exists():
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)


def copy_unlisted_weights(weights: Checkpoint, target: Path) -> None:
    """Copy safetensors files that the index does not list, if they share no tensor with the checkpoint."""
    for path in sorted(weights.folder.glob("*.safetensors")):
        if path.name in weights.files or any(path.match(pattern) for pattern in _OTHER_FORMATS):
            continue
        try:
            names = {tensor.name for tensor in read_header(path)}
        except UnfinishedError:  # transformers does not open this file either
            continue
        if not names & weights.tensors.keys() and not (target / path.name).exists():
            copy_shared(path, target / path.name)
