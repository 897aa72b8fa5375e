"""Read and write results.json."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elo.errors import EloError, UnfinishedError
from elo.report.schema import FILE_NAME, SCHEMA_VERSION, Results
from elo.report.verdict import judge
from elo.store.files import read_json, write_text

_NUMBERS = re.compile(r"\[\n[\s\d.,eE+-]+\]")


def judged(results: Results) -> Results:
    """Return the results with their verdict."""
    return results.model_copy(update={"verdict": judge(results)})


def write_results(path: Path, results: Results) -> None:
    """Replace `path` with the results as indented JSON; lists of numbers take one line."""
    text = json.dumps(results.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, _NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n")


def read_results(source: dict[str, Any] | str | Path) -> Results:
    """Read and validate results.

    Args:
        source: content of a results file, the file, or the folder of a run or comparison.

    Raises:
        UnfinishedError: there is no such file, or it is not JSON.
        EloError: the content is not results of this version; the message names the key and its value.
    """
    name, value = FILE_NAME.removesuffix(".json"), source
    if not isinstance(source, dict):
        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
            if not path.exists():
                raise UnfinishedError(
                    f"{path}: no such file; give a finished run or comparison folder, or a {FILE_NAME}"
                )
        name, value = str(path), read_json(path)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "evaluation":
        raise EloError(f"{name}: is an evaluation of one model; give the {FILE_NAME} of `elo run` or `elo compare`")
    version = (value.get("schema_version") or value.get("schema")) if isinstance(value, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise EloError(f"{name}: schema version {version} is newer than this version of elo supports; update elo")
    if isinstance(version, int) and 0 < version < SCHEMA_VERSION:
        raise EloError(
            f"{name}: schema version {version} was written by an earlier version of elo; run `elo run` or "
            "`elo compare` again"
        )
    try:
        return Results.model_validate(value)
    except ValidationError as error:
        raise EloError(f"{name}: not results of a run or comparison: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first, more = error.errors()[0], error.error_count() - 1
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        message = f"{where}: {message}" if where else message
    else:
        got = "" if first["type"] == "missing" else f", got {_short(first['input'])}"
        message = f"{where or 'the file'}: {message}{got}"
    return message + (f" (and {more} more)" if more else "")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
