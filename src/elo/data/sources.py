"""Read documents from JSON lines, parquet and plain text files, folders and globs of them, and Hugging Face datasets.

Files are on disk or in object storage.

A problem with an input becomes a `Record` whose `problem` names the file and line. The reader needs memory for the
largest single document, and for the window of a Zstandard file.
"""

import glob
import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from elo.checkpoint.local_names import looks_local, near
from elo.data.compressed import LINE_LIMIT, decompressed, file_problem, wrong_kind
from elo.data.unread import warn_of_unread
from elo.errors import EloError, error_line
from elo.store.remote import RemoteFile, is_remote, list_remote, open_remote

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".txt.zst")
HUB_PREFIX = "hf://"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TEXT_PIECE = 1 << 18
"""Bytes after which a plain-text document ends at the next blank line. A smaller file is one document."""
TEXT_LIMIT = 1 << 20
"""Bytes at which a plain-text document ends even inside a line."""
PARQUET_BATCH = 1 << 24
"""Approximate bytes of text converted from parquet at once."""
THRIFT_LIMIT = 1 << 30
"""Largest accepted parquet metadata, in bytes. pyarrow's default is too low for files with many row groups."""
HUB_TIMEOUT_S = 5.0

# Python refuses to convert integers of more than 4300 digits. Only the text is used, so a float will do.
_JSON_OF_LONG_INTEGERS = json.JSONDecoder(parse_int=lambda digits: float(digits) if len(digits) > 4000 else int(digits))

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """One document, or the problem found in its place.

    `number` counts the records of a file from 0 and serves to resume; `line` counts from 1 and is for messages.
    """

    number: int
    line: int
    text: bytes
    """Text of the document in UTF-8."""
    problem: str | None = None
    """Complete message, beginning with file and line."""
    ends_file: bool = False
    """Whether the problem affects the file, so that nothing after it can be read."""
    translation: bytes = b""
    """Text of the second column, if two are read."""

    @property
    def loses_file(self) -> bool:
        """Whether no document of the file could be read, so that skipping it would lose all of it."""
        return self.ends_file and self.number == 0


@dataclass(frozen=True)
class InputFile:
    """One file, or one Hugging Face dataset (`hf://...`), as found when the inputs were listed."""

    location: str
    size: int = 0
    """Bytes on disk; 0 for a dataset."""
    mtime_ns: int = 0
    version: str = ""
    """Entity tag of an object in object storage; empty for files on disk."""

    @property
    def is_hub(self) -> bool:
        """Whether this is a Hugging Face dataset rather than a file."""
        return self.location.startswith(HUB_PREFIX) and not self.version

    def fingerprint(self) -> list[Any]:
        """Return what must not change before a killed run is resumed: name, size, and modification time or version."""
        return [self.location, self.size, self.version or self.mtime_ns]

    def open(self) -> BinaryIO:
        """Open the file for reading."""
        if self.version:
            return open_remote(RemoteFile(self.location, self.size, self.version))
        return Path(self.location).open("rb")


def list_inputs(path: str) -> list[InputFile]:
    """List the files that `path` refers to, in a fixed order.

    Args:
        path: a file, folder or glob, also in object storage, or a Hugging Face dataset id.

    Raises:
        EloError: `path` does not exist, or has no file that can be read.
    """
    found = Path(path)
    if is_remote(path):
        return _list_objects(path)
    if path.startswith(HUB_PREFIX):
        return [InputFile(path)]
    if found.is_dir():
        visible = [file for file in sorted(found.rglob("*")) if file.is_file() and _is_visible(file, found)]
        files = [file for file in visible if file.name.endswith(SUFFIXES)]
        if not files:
            raise EloError(f"{path}: the folder has no readable file; add files named {', '.join(SUFFIXES)}")
        warn_of_unread(path, tuple(str(file) for file in visible if not file.name.endswith(SUFFIXES)), SUFFIXES)
        return [_input_file(file) for file in files]
    if found.exists():
        return [_input_file(found)]
    if glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(path, recursive=True))  # noqa: PTH207  # absolute patterns too
        if not matches:
            raise EloError(f"{path}: the pattern matches no file; check the pattern and the current folder")
        files = [match for match in matches if match.is_file()]
        if not files:
            raise EloError(f"{path}: the pattern matches only folders; end it with /* or give the folder itself")
        return [_input_file(file) for file in files]
    if HUB_ID.fullmatch(path) and not path.endswith(SUFFIXES) and not looks_local(found):
        return [InputFile(HUB_PREFIX + path)]
    hint = f"; for a Hugging Face dataset write {HUB_PREFIX}{path}" if HUB_ID.fullmatch(path) else ""
    raise EloError(f"{path}: no such file or folder{near(found)}; check the path{hint}")


def _list_objects(address: str) -> list[InputFile]:
    files = list_remote(address)
    if [file.location for file in files] != [address]:  # the user named a single object, so it must be readable
        start = len(address.rstrip("/")) if not glob.has_magic(address) else 0
        files = [file for file in files if "/." not in file.location[start:] and file.location.endswith(SUFFIXES)]
    if not files:
        raise EloError(f"{address}: there is no readable object; add objects named {', '.join(SUFFIXES)}")
    for file in files:
        _check_suffix(Path(file.location))
    return [InputFile(file.location, file.size, version=file.version) for file in files]


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        hint = "; name it .jsonl if it holds one JSON object per line" if ".json" in path.suffixes else ""
        kind = "".join(path.suffixes[-2:])
        raise EloError(f"{path}: unknown file type {kind!r}; use {', '.join(SUFFIXES)}{hint}")


def _input_file(path: Path) -> InputFile:
    _check_suffix(path)
    try:
        with path.open("rb"):
            status = path.stat()
    except OSError as error:
        raise EloError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return InputFile(str(path), status.st_size, status.st_mtime_ns)


class FileReader:
    """Reads the documents of one input, and counts the bytes read from disk.

    Args:
        file: input to read.
        columns: column with the text, and a second one if each row holds a sentence and its translation.
    """

    def __init__(self, file: InputFile, *columns: str) -> None:
        self.file = file
        self.columns = columns or ("text",)
        self._raw: BinaryIO | None = None
        self._done = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file on disk so far."""
        return self._done if self._raw is None or self._raw.closed else self._raw.tell()

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield the records, beginning at number `start`. A problem with the file itself is the last record.

        Raises:
            EloError: a Hugging Face dataset cannot be read.
        """
        name, line, number = self.file.location, 0, start - 1
        first_problem, judged = "", start > 0
        try:
            if self.file.size == 0 and not self.file.is_hub:
                yield Record(0, 1, b"", f"{name}:1: the file is empty; remove it from the corpus")
                return
            for record in self._read(start):
                number, line = record.number, record.line
                judged = judged or record.problem is None or record.ends_file
                first_problem = first_problem or record.problem or ""
                yield record
            if first_problem and not judged:
                problem = f"{first_problem}; no document of this file can be read"
                yield Record(0, line, b"", problem, ends_file=True)
            elif start == 0 and number < 0:
                yield Record(0, 1, b"", f"{name}:1: the file has no document; remove it from the corpus")
        except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, MemoryError) as error:
            problem = f"{name}:{line + 1}: {file_problem(error)}"
            yield Record(number + 1, line + 1, b"", problem, ends_file=True)
        finally:
            self._raw, self._done = None, self.file.size

    def _read(self, start: int) -> Iterator[Record]:
        name = self.file.location
        if self.file.is_hub:
            yield from _hub_records(name, self.columns, start)
            return
        with self.file.open() as raw:
            self._raw = raw
            beginning = raw.read(64)
            raw.seek(0)
            if (kind := wrong_kind(beginning, name)) is not None:
                yield Record(0, 1, b"", f"{name}:1: {kind}", ends_file=True)
                return
            if name.endswith(".parquet"):
                yield from _parquet_records(raw, name, self.columns, start)
                return
            with decompressed(raw, name) as lines:
                plain = name.removesuffix(".gz").removesuffix(".zst")
                if plain != name and (kind := wrong_kind(lines.peek(64)[:64], plain)) is not None:
                    problem = f"once decompressed, {kind.split(';')[0]}; unpack it completely"
                    yield Record(0, 1, b"", f"{name}:1: {problem}", ends_file=True)
                    return
                if plain.endswith(".txt"):
                    yield from _text_records(lines, name, start)
                else:
                    yield from _json_records(lines, name, self.columns, start)


def _json_records(lines: BinaryIO, name: str, columns: tuple[str, ...], start: int) -> Iterator[Record]:
    for number, line in enumerate(iter(lambda: lines.readline(LINE_LIMIT), b"")):
        if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            if number >= start:
                problem = f"the line is longer than {LINE_LIMIT >> 20} MiB; write one document per line"
                yield Record(number, number + 1, b"", f"{name}:{number + 1}: {problem}")
            while (rest := lines.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                pass
            continue
        if number < start or line.isspace():
            continue
        line = line.removeprefix(b"\xef\xbb\xbf")  # at the start, and where files were joined
        try:
            row = _json_value(line)
            yield _whole_record(number, [row[column].encode() for column in columns])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = _json_problem(line, columns, error)
            yield Record(number, number + 1, b"", f"{name}:{number + 1}: {problem}")


def _whole_record(number: int, texts: list[bytes]) -> Record:
    return Record(number, number + 1, texts[0], translation=texts[1] if len(texts) > 1 else b"")


def _json_value(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return _JSON_OF_LONG_INTEGERS.decode(line.decode())


def _json_problem(line: bytes, columns: tuple[str, ...], error: Exception) -> str:
    """Explain why a line could not be read, what was found, and what to do."""
    if b"\0" in line and isinstance(error, ValueError):
        return (
            f"not valid JSON: NUL bytes, got {_shown(line)!r}; the file is incomplete, a tar archive or UTF-16: "
            "fetch it again, unpack it or convert it to UTF-8"
        )
    if _is_cut(line, error):
        return (
            f"not valid JSON: the last line is cut off after {len(line):,} bytes, got {_shown(line)!r}; "
            "the file is incomplete, fetch it again or remove the line"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({_bad_byte(error)}); convert the file to UTF-8"
    if isinstance(error, RecursionError):
        return f"not valid JSON: it is nested too deeply, got {_shown(line)!r}; flatten or remove the line"
    if isinstance(error, json.JSONDecodeError) and (layout := _layout(line)):
        return f"not valid JSON lines: {layout}, got {_shown(line)!r}; write one JSON object per line"
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return f'not valid JSON ({error}), got {_shown(line)!r}; each line must be an object such as {{"text": "..."}}'
    value = _json_value(line)
    if not isinstance(value, dict):
        return f'a JSON {_kind(value)}, not an object: {_shown(line)!r}; write an object such as {{"text": "..."}}'
    return _column_problem(value, columns)


def _layout(line: bytes) -> str | None:
    """Return the layout of a JSON file if `line` shows that it does not have one document per line, otherwise None."""
    line = line.strip()
    if line.startswith(b"["):
        return "the file is a JSON array (jq -c '.[]' FILE converts it)"
    if line == b"{":
        return "an object is spread over several lines (jq -c . FILE converts it)"
    if b"}\r{" in line:
        return "the lines end in CR alone (tr '\\r' '\\n' <FILE converts it)"
    return None


def _shown(line: bytes) -> str:
    return line[:60].decode(errors="replace").strip() + ("..." if len(line) > 60 else "")


def _is_cut(line: bytes, error: Exception) -> bool:
    """Return whether `line` is a file's last and ends inside an object, as after an interrupted download."""
    if line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
        return False
    if isinstance(error, UnicodeDecodeError):
        return error.end == len(line) and _broken_character(line) != b""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].rstrip()
    if error.msg.startswith("Unterminated string"):  # `error.pos` is where the string begins
        return not rest.endswith("}")
    if error.msg.startswith("Invalid \\u"):
        return len(rest) < len("\\uffff")
    return any(value.startswith(rest) for value in ("true", "false", "null", "-"))


def _column_problem(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    key = "text_column" if len(columns) == 1 else "columns"
    if missing := [column for column in columns if column not in row]:
        names = ", ".join(map(repr, row)) or "none"
        for outer, value in row.items():
            if isinstance(value, dict) and missing[0] in value:
                return f"no column {missing[0]!r}, but column {outer!r} has one inside; make it a top-level column"
        return f"no column {missing[0]!r}; the columns are {names[:300]}; set {key} to the one with the text"
    for column in columns:
        value = row[column]
        if not isinstance(value, str | bytes):
            return f"column {column!r} is {_kind(value)}, not text: {str(value)[:60]!r}; fix the line or set {key}"
        if isinstance(value, str) and not _is_encodable(value):
            break
    return f"column {column!r} holds half of a surrogate pair (such as the escape \\ud800); fix the line"


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _bad_byte(error: UnicodeDecodeError, of: str = "line") -> str:
    return f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the {of}"


def _text_records(lines: BinaryIO, name: str, start: int) -> Iterator[Record]:
    number, first, line = 0, 1, 1
    held: list[bytes] = []
    size = 0
    while True:
        piece = lines.readline(TEXT_LIMIT)
        if not held and number == 0:
            piece = piece.removeprefix(b"\xef\xbb\xbf")
        held.append(piece)
        size += len(piece)
        line += piece.endswith(b"\n")
        if piece and not (size >= TEXT_PIECE and piece.isspace()) and size < TEXT_LIMIT:
            continue
        data = b"".join(held)
        rest = b"" if not piece or piece.endswith(b"\n") else _broken_character(data)
        data = data[: len(data) - len(rest)]
        if number >= start and not data.isspace() and data:
            yield _text_record(number, first, data.strip(b"\r\n"), name)
        if not piece:
            return
        held, size, first, number = [rest], len(rest), line, number + 1


def _text_record(number: int, line: int, data: bytes, name: str) -> Record:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        begin = data.rfind(b"\n", 0, error.start) + 1
        where = line + data.count(b"\n", 0, error.start)
        bad = f"byte 0x{data[error.start]:02x} at byte {error.start - begin + 1} of the line"
        return Record(number, line, b"", f"{name}:{where}: not UTF-8 ({bad}); convert the file to UTF-8")
    return Record(number, line, data)


def _broken_character(data: bytes) -> bytes:
    """Return the incomplete UTF-8 character at the end of `data`, or nothing."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return data[-back:] if back < length else b""
        if byte < 0x80:
            break
    return b""


def _parquet_records(raw: BinaryIO, name: str, columns: tuple[str, ...], start: int) -> Iterator[Record]:
    file = pyarrow.parquet.ParquetFile(
        raw, thrift_string_size_limit=THRIFT_LIMIT, thrift_container_size_limit=THRIFT_LIMIT
    )
    fields = list(file.schema_arrow)
    if not set(columns) <= set(file.schema_arrow.names):
        inner = {each.name: {f.name: None for f in each.type} for each in fields if pyarrow.types.is_struct(each.type)}
        problem = f"{name}:1: {_column_problem({each.name: None for each in fields} | inner, columns)}"
        yield Record(0, 1, b"", problem, ends_file=True)
        return
    number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start:
            number += rows
            continue
        size = max(file.metadata.row_group(group).total_byte_size // max(rows, 1), 1)
        batch_size = min(max(PARQUET_BATCH // size, 1), 512)
        for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=list(columns)):
            for row in batch.to_pylist():
                if number >= start:
                    yield _value_record(number, row, columns, name)
                number += 1


def _value_record(number: int, row: dict[str, Any], columns: tuple[str, ...], name: str) -> Record:
    texts: list[bytes] = []
    try:
        for column in columns:
            value = row.get(column)
            if isinstance(value, bytes):  # a binary column may hold UTF-8 text
                value.decode()
                texts.append(value)
            else:
                texts.append(row[column].encode())
        return _whole_record(number, texts)
    except UnicodeDecodeError as error:
        bad = columns[len(texts)]
        problem = f"column {bad!r} is binary and not UTF-8 ({_bad_byte(error, 'value')}); convert it to text"
    except (KeyError, AttributeError, UnicodeEncodeError):
        problem = _column_problem(row, columns)
    return Record(number, number + 1, b"", f"{name}:{number + 1}: {problem}")


def _hub_records(location: str, columns: tuple[str, ...], start: int) -> Iterator[Record]:
    """Stream the rows of a Hugging Face dataset, `hf://name[:config][:split]`."""
    import datasets
    import huggingface_hub

    name, *rest = location.removeprefix(HUB_PREFIX).split(":")
    config = rest[0] if len(rest) > 1 and rest[0] else None
    split = rest[-1] if rest and rest[-1] else "train"
    if not name or len(rest) > 2:
        raise EloError(f"{location}: not a dataset id; write hf://owner/name, ...:split or ...:config:split")
    number = start
    try:
        if not Path(name).exists() and not huggingface_hub.constants.HF_HUB_OFFLINE:
            # Without a network load_dataset retries for 24 s.
            huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows.skip(start) if start else rows:
            yield _value_record(number, row, columns, location)
            number += 1
    except EloError:
        raise
    except Exception as error:  # datasets, fsspec and the hub client raise many types
        raise EloError(
            f"{location}: the Hugging Face dataset cannot be read at row {number + 1} "
            f"({type(error).__name__}: {error_line(error)}); "
            "check its name (there is no such local file or folder), config and split, and the network, then run the "
            "same command again, it resumes"
        ) from None


def read_documents(path: str | Path, text_column: str = "text", on_error: str = "stop") -> Iterator[str]:
    """Yield the text of every document of `path` that is not empty.

    Raises:
        EloError: nothing to read, or a document cannot be read. `on_error="skip"` logs and skips such documents.
    """
    for file in list_inputs(str(path)):
        for record in FileReader(file, text_column).records():
            if record.problem and (on_error != "skip" or record.loses_file):
                raise EloError(record.problem)
            if record.problem:
                log.warning("%s%s", "" if record.ends_file else "skipped: ", record.problem)
            elif not record.text.isspace() and record.text:
                yield record.text.decode()
