"""Distinguish missing local paths from Hugging Face hub ids, and suggest similar names."""

import difflib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from elo.errors import EloError

_CACHED_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")

LOCAL_FOLDERS = {"corpora", "corpus", "data", "dataset", "datasets", "dev", "eval", "heldout", "input", "inputs", "raw"}
LOCAL_FOLDERS |= {"test", "text", "texts", "train"}
"""First parts of paths that are never interpreted as the owner of a Hugging Face dataset."""


def require_path_or_id(name: str | Path, remedy: str, kind: str = "folder") -> None:
    """Raise EloError if `name` is a missing local path rather than a Hugging Face id.

    `owner/name` is a path if `owner` is a local folder and the hub's cache does not have this id.

    Args:
        name: local path or hub id.
        remedy: what to do, for the message.
        kind: what the path should be, for the message.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    hint = ""
    if not (str(name).startswith((".", "/", "~")) or str(name).endswith("/") or len(path.parts) > 2):
        if len(path.parts) < 2 or not Path(path.parts[0]).is_dir() or _is_cached(str(name)):
            return
        hint = f"; for the model of this name on the Hugging Face hub, run `hf download {name}` first"
    raise EloError(f"{name}: no such {kind}{near(path)}; {remedy}{hint}")


def near(path: Path) -> str:
    """Suggest the file or folder with the most similar name to a missing one, as part of a message."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        return f" (there is no folder {path.parent})" if not path.parent.exists() else ""
    close = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def _is_cached(repo_id: str) -> bool:
    try:
        return any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in _CACHED_FILES)
    except HFValidationError:
        return False


def looks_local(path: Path) -> bool:
    """Return whether the first part of `owner/name` is an existing folder, or a common name of one."""
    first = path.parts[0]
    return Path(first).exists() or first.lower() in LOCAL_FOLDERS
