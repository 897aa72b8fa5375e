"""Run a small comparison on the base model and bilingual corpus that ship with ELO: offline, minutes on a CPU."""

import json
from pathlib import Path
from typing import Any

import yaml
import zstandard

from elo.compare import compare
from elo.config import load_comparison
from elo.errors import EloError
from elo.store.files import TEMPORARY_PREFIX, atomic_directory, write_text

# Contains config.yaml, base/ (a checkpoint made by examples/tavuni/train_quickstart_base.py) and data/ (the corpus).
WORLD = Path(__file__).parent


def quickstart(output: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Write the corpus, run the comparison that quickstart/config.yaml describes, and return its results.

    Args:
        output: folder of the comparison. If it holds an interrupted quickstart, that is resumed.
        overrides: `key.path=value`, as for `elo compare`.

    Raises:
        EloError: `output` is not empty and is not a quickstart, or cannot be written.
    """
    output = Path(output)
    corpus = output / "corpus"
    others = (
        [path for path in output.iterdir() if not path.name.startswith(TEMPORARY_PREFIX)] if output.is_dir() else []
    )
    if others and not corpus.is_dir():
        raise EloError(f"{output}: the folder is not empty and is not a quickstart; choose another with --output")
    text = (WORLD / "config.yaml").read_text(encoding="utf-8")
    for name, path in (("base", WORLD / "base"), ("corpus", corpus), ("output", output)):
        text = text.replace(f"{{{name}}}", json.dumps(str(path), ensure_ascii=False)[1:-1])
    config = yaml.safe_load(text)
    load_comparison(config, overrides)  # report mistakes in overrides before writing anything
    if not corpus.is_dir():
        print("quickstart: unpacking a small bilingual corpus", flush=True)
        unpack_corpus(corpus)
    (output / "stages").mkdir(exist_ok=True)  # marks the folder as a run
    config["run"]["evaluation"]["prompts"] = json.loads((corpus / "prompts.json").read_text(encoding="utf-8"))
    # An ordinary configuration that users can read, change and run with `elo compare`.
    write_text(output / "config.yaml", yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    return compare(load_comparison(config, overrides))


def unpack_corpus(output: Path) -> None:
    """Write the corpus that ships with ELO to the folder `output`: JSON lines and prompts.json.

    Raises:
        EloError: `output` exists and is not empty, or cannot be written.
    """
    with atomic_directory(output) as folder:
        for path in sorted((WORLD / "data").iterdir()):
            data = path.read_bytes()
            if path.suffix == ".zst":
                data = zstandard.ZstdDecompressor().decompress(data)
            (folder / path.name.removesuffix(".zst")).write_bytes(data)
