"""Choose which files of a checkpoint to download from the Hugging Face hub, and download it from object storage."""

from pathlib import Path

from elo.store.remote import fetch_folder

_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
OTHER_WEIGHTS = ["original/*", "consolidated*", "[!a]*/*", "a[!d]*/*"]  # all folders except additional_chat_templates


def file_patterns(trust_remote_code: bool) -> list[str]:
    """Return globs of the files to download. Python files are included only with `trust_remote_code`."""
    return [*_PATTERNS, *(["*.py"] if trust_remote_code else [])]


def fetch_checkpoint(address: str, trust_remote_code: bool, *, weights: bool = True) -> Path:
    """Download a checkpoint from object storage, if it is not in the cache yet, and return its local folder.

    Args:
        address: address of the checkpoint's folder.
        trust_remote_code: also download Python files.
        weights: also download the weights.

    Raises:
        EloError: `address` has no file of a checkpoint, or the storage cannot be read.
    """
    return fetch_folder(
        address, file_patterns(trust_remote_code), [*OTHER_WEIGHTS, *([] if weights else ["*.safetensors"])]
    )
