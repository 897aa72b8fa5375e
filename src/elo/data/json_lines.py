"""Read small local files of JSON lines whole: conversations, cloze items, labelled examples."""

import json
from pathlib import Path
from typing import Any

from elo.data.compressed import LINE_LIMIT, decompressed, file_problem, wrong_kind
from elo.errors import EloError
from elo.store.remote import require_local


def read_json_lines(path: str | Path, what: str) -> list[tuple[str, Any]]:
    """Return the values of a file (.jsonl, also .gz or .zst) with their places, `file:line`. Blank lines are skipped.

    Args:
        path: local file.
        what: what the lines are, in the plural, for messages.

    Raises:
        EloError: the file is in object storage, cannot be read or holds no value, or a line is not JSON in UTF-8.
    """
    require_local(path, what, "download it, and give the local file")
    lines: list[tuple[str, bytes]] = []
    try:
        with Path(path).open("rb") as raw:
            problem = wrong_kind(raw.read(64), str(path))
            raw.seek(0)
            source, number = decompressed(raw, str(path)), 0
            while not problem and (line := source.readline(LINE_LIMIT)):
                number += 1
                if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                    problem = f"line {number} is longer than {LINE_LIMIT >> 20} MiB; write one JSON value per line"
                if line.strip():
                    lines.append((f"{path}:{number}", line))
    except (FileNotFoundError, IsADirectoryError):
        problem = f"no such file; give JSON lines of {what}"
    except Exception as error:  # each compression has its own errors
        problem = file_problem(error)
    if problem:
        raise EloError(f"{path}: {problem}")
    if not lines:
        raise EloError(f"{path}: holds no {what}; give JSON lines of {what}")
    return [(where, _value(line, where)) for where, line in lines]


def _value(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise EloError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise EloError(f"{where}: not JSON ({error}); write one JSON value per line") from None
