"""Identify the files and tokenizers that a stage's result depends on, for the stage's fingerprint."""

from pathlib import Path
from typing import Any

from elo.checkpoint.folder import TOKENIZER_PATTERNS
from elo.data.prepare import CorpusSource
from elo.data.sources import list_inputs
from elo.store.run_folder import file_identity


def checkpoint_identity(base: Path) -> dict[str, Any]:
    """Identify a checkpoint by its configuration and weights."""
    files = [base / "config.json", *sorted(base.glob("*.safetensors"))]
    return {name: value for file in files if file.is_file() for name, value in file_identity(file).items()}


def tokenizer_identity(tokenizer: str) -> Any:
    """Identify a tokenizer by its files, or by its name if it is not a local folder."""
    folder = Path(tokenizer)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    if not (folder / names[0]).is_file():  # transformers then converts the vocabulary from other files
        names += sorted({path.name for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)} - {*names})
    files = [folder / name for name in names if (folder / name).is_file()]
    return [file_identity(file) for file in files] or tokenizer


def corpus_identity(source: CorpusSource) -> dict[str, Any]:
    """Identify a corpus by its path, columns and files."""
    return {
        "path": source.path,
        "text_column": source.text_column,
        **({"parallel": source.parallel.identity()} if source.parallel else {}),
        "files": [
            {Path(file.location).name: file.fingerprint()[1:]} for file in list_inputs(source.path) if not file.is_hub
        ],
    }
