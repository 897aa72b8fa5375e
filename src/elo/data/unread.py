"""Warn about files in a corpus folder that are not read."""

import functools
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)

_ABOUT = re.compile(r"readme|licen[cs]e|copying|notice|_.*|.*\.(md|rst|html|pdf|py|ya?ml|sha\d+|md5)$", re.IGNORECASE)
"""Names of files that usually accompany a corpus, such as its licence. They cause no warning."""


@functools.cache  # a run lists the same folder many times
def warn_of_unread(folder: str, files: tuple[str, ...], suffixes: tuple[str, ...]) -> None:
    """Warn that `files` are not read, except those that usually accompany a corpus.

    Args:
        folder: folder of the corpus.
        files: paths of its files whose names do not end in one of `suffixes`.
        suffixes: endings of the names of files that are read.
    """
    if others := [file for file in files if not _ABOUT.match(Path(file).name)]:
        log.warning(
            "warning: %s: %d files are not read, because their names do not end in %s (%s%s); convert or remove them",
            folder,
            len(others),
            ", ".join(suffixes),
            ", ".join(others[:3]),
            ", ..." if len(others) > 3 else "",
        )
