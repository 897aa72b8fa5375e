"""The folder of a run's final model: the last stage's checkpoint with a model card and the configuration."""

from pathlib import Path

import yaml

from elo.checkpoint.shared_files import copy_shared
from elo.config import RunConfig
from elo.report.card import model_card
from elo.report.schema import Results
from elo.store.files import atomic_directory, readable_disk_errors

CONFIG_FILE = "elo_run.yaml"


def write_final_model(output: Path, stage: Path, base: Path, config: RunConfig, results: Results) -> None:
    """Write a stage's files with README.md and elo_run.yaml; files of these names are kept under another name.

    Files are hard links, so the folder takes no disk space if the file system allows links.

    Args:
        output: folder to write; an existing one is replaced.
        stage: folder of the last stage.
        base: folder of the base model.
    """
    with readable_disk_errors(output), atomic_directory(output, overwrite=True) as folder:
        for path in sorted(stage.rglob("*")):
            if path.is_file():
                copied = folder / path.relative_to(stage)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copy_shared(path, copied, link=True)
        settings = yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        for name, text in (("README.md", model_card(results, base, CONFIG_FILE)), (CONFIG_FILE, settings)):
            _set_aside(folder / name)
            (folder / name).write_text(text, encoding="utf-8")


def _set_aside(path: Path) -> None:
    """Rename the base's file, for example to README_base.md; that of the base's base becomes README_base_base.md."""
    if path.exists():
        kept = path.with_stem(f"{path.stem}_base")
        _set_aside(kept)
        path.rename(kept)
