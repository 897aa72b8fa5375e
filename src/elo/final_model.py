"""The folders of a run's final models: a stage's checkpoint with a model card and the configuration."""

from pathlib import Path
from typing import Any

import yaml

from elo.checkpoint.folder import put_first
from elo.checkpoint.shared_files import copy_shared
from elo.store.files import atomic_directory, readable_disk_errors

CONFIG_FILE = "elo_run.yaml"


def write_final_model(output: Path, stage: Path, card: str, config: dict[str, Any], config_file: str) -> None:
    """Write a stage's files with README.md and the configuration; files of these names are kept under another name.

    Files are hard links, so the folder takes no disk space if the file system allows links.

    Args:
        output: folder to write; an existing one is replaced.
        stage: folder of the stage.
        card: content of README.md.
        config: resolved configuration.
        config_file: name of its file.
    """
    with readable_disk_errors(output), atomic_directory(output, overwrite=True) as folder:
        for path in sorted(stage.rglob("*")):
            if path.is_file():
                copied = folder / path.relative_to(stage)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copy_shared(path, copied, link=True)
        settings = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        put_first(folder, card)
        put_first(folder, settings, config_file)
