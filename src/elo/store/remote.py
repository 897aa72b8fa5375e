"""Read and write object storage (s3://, gs://, hf://) through fsspec, with retries and one message per problem.

Credentials come only from the environment and the providers' own files, and never appear in a message.
"""

import glob
import hashlib
import io
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, TypeVar

import fsspec
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import filter_repo_objects

from elo.errors import EloError, error_line
from elo.store.files import TEMPORARY_PREFIX, sha256_json

ADDRESS = re.compile(r"(s3|gs)://|hf://(datasets|buckets)/[^/]+/[^/]+/.")
"""Addresses of objects. Other hf:// names are data sets that the datasets library reads, or models."""
EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""Package and extra that a scheme needs."""
BUFFER = 1 << 20
BLOCK = 1 << 23
"""Bytes requested at once."""
WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before each retry."""
_SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "xet_hash")
_TIMES = ("LastModified", "mtime", "updated", "last_modified")

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """One object in storage, as it was when it was listed."""

    location: str
    size: int
    version: str
    """The store's entity tag or checksum, which changes with the content."""
    mtime: float = 0.0
    """Time of the last change, in seconds since 1970; 0 if the store does not report it."""


def is_remote(path: str | Path) -> bool:
    """Return whether `path` is an address in object storage."""
    return ADDRESS.match(str(path)) is not None


def require_local(
    path: str | Path,
    key: str,
    remedy: str = "outputs are written to a local folder; give one, and upload the finished model with elo push",
) -> None:
    """Raise EloError if `path` is in object storage.

    Outputs are always local, because object storage cannot rename atomically.

    Args:
        path: path or address to check.
        key: setting, option or content that the message names.
        remedy: what to do, for the message.
    """
    if re.match(r"(s3|gs|hf):/", str(path)):  # a Path has lost the second slash
        raise EloError(f"{key}: {path}: is in object storage; {remedy}")


def output_file(output: str | Path | None) -> Path | None:
    """Return the path of a results file and create its folder; return None for no file.

    Call it before the work whose results are written, so that a bad path does not lose them.

    Raises:
        EloError: the path is in object storage or is a folder, or its folder cannot be created.
    """
    if output is None:
        return None
    target = Path(output)
    require_local(output, "--output", "results are written to a local file; give a local file, and upload it later")
    if target.is_dir():
        raise EloError(f"--output {target}: is a folder; name the file to write, for example {target / 'results.json'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EloError(f"--output {target}: cannot be written ({error.strerror}); choose another output") from None
    return target


def list_remote(address: str) -> list[RemoteFile]:
    """List the objects at `address` in a fixed order: one object, all below a prefix, or those that a glob matches.

    Raises:
        EloError: there is no object, or the storage cannot be read.
    """
    system, path = _open_storage(address)

    def find() -> dict[str, Any]:
        try:
            info = system.info(path)
        except FileNotFoundError:
            if not glob.has_magic(path):
                raise
            return dict(system.glob(path, detail=True))
        return {info["name"]: info} if info["type"] == "file" else dict(system.find(path, detail=True))

    scheme = address.partition("://")[0]
    found = [
        RemoteFile(f"{scheme}://{name}", int(info["size"] or 0), _version(info), _time(info))
        for name, info in _retried(find, address).items()
        if info["type"] == "file" and not name.endswith("/")
    ]
    if not found:
        _raise_problem(FileNotFoundError(), address)
    return sorted(found, key=lambda file: PurePosixPath(file.location).parts)


def open_remote(file: RemoteFile) -> BinaryIO:
    """Open an object for reading. An interrupted read resumes at the same byte."""
    return io.BufferedReader(_Object(file), BUFFER)


def fetch_folder(address: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Return a local folder with the objects below `address` whose names match `allow` and not `ignore`.

    Files are kept in the Hugging Face cache, in a folder for this state of the objects. Complete files are not
    downloaded again.

    Args:
        address: prefix of the objects.
        allow: globs of names relative to `address`.
        ignore: globs of names to leave out.

    Raises:
        EloError: no object matches, or the storage cannot be read.
    """
    address = address.rstrip("/")
    files = list_remote(address)
    state = sha256_json([[file.location, file.size, file.version] for file in files])
    folder = Path(HF_HOME) / "elo" / f"{address.rpartition('/')[2]}-{state[:16]}"
    by_name = {file.location.removeprefix(f"{address}/"): file for file in files}
    for name in filter_repo_objects(by_name, allow_patterns=list(allow), ignore_patterns=list(ignore)):
        if not (folder / name).is_file():
            _download(by_name[name], folder / name)
    if not folder.is_dir():
        raise EloError(f"{address}: holds no file named {', '.join(allow[:3])}; check the address")
    return folder


def upload_files(folder: Path, names: Sequence[str], address: str) -> None:
    """Copy these files of `folder` to `address`, in this order.

    Raises:
        EloError: `address` contains other objects, or the storage cannot be written.
    """
    address = address.rstrip("/")
    system, path = _open_storage(address)
    present = _retried(lambda: [name.removeprefix(f"{path}/") for name in system.find(path)], address)
    if others := sorted(set(present) - set(names)):
        raise EloError(
            f"{address}: holds {others[0]}, which does not belong to this model; choose an address without objects"
        )
    for name in names:
        source, target = str(folder / name), f"{path}/{name}"
        _retried(lambda source=source, target=target: system.put_file(source, target), f"{address}/{name}")  # type: ignore[misc]


def _download(file: RemoteFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open_remote(file) as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy, BUFFER)
        os.utime(temporary, (file.mtime, file.mtime))  # so that a second download has the same identity
        temporary.replace(target)
    except OSError as error:
        raise EloError(f"{target}: cannot be written ({error.strerror or error}); free disk space and retry") from None
    finally:
        temporary.unlink(missing_ok=True)


class _Object(io.RawIOBase):
    """An object as a file. It is reopened after an error, and rejected if it has changed since it was listed."""

    def __init__(self, file: RemoteFile) -> None:
        self._listed = file
        self._file: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._listed.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, target: Any) -> int:
        wanted = min(len(target), self._listed.size - self._position)
        if wanted <= 0:
            return 0
        data = _retried(lambda: self._read(wanted), self._listed.location)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                system, path = _open_storage(self._listed.location)
                self._file = system.open(path, "rb", block_size=BLOCK, cache_type="readahead")
                if _version(self._file.details) != self._listed.version:
                    raise EloError(
                        f"{self._listed.location}: changed while it was being read; run the same command again"
                    )
            self._file.seek(self._position)
            data = bytes(self._file.read(size))
            if not data:
                raise OSError("the connection ended early")
            return data
        except Exception:
            self._file = None
            raise


def _open_storage(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    scheme, _, path = address.partition("://")
    if "@" in path.partition("/")[0]:
        raise EloError(
            f"{scheme}://***: the address contains credentials; remove them, and set them in the environment"
        )
    if not path.strip("/"):
        raise EloError(f"{address}: has no bucket; write {scheme}://BUCKET/PATH")
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False), path.rstrip("/")
    except ImportError:
        package, extra = EXTRAS[scheme]
        raise EloError(
            f"{address}: needs {package}, which is not installed; run pip install 'elo-cpt[{extra}]'"
        ) from None


def _retried(action: Callable[[], T], location: str) -> T:
    """Return the result of `action`, retrying after errors that may be temporary."""
    for wait in (*WAITS_S, None):
        try:
            return action()
        except EloError:
            raise
        except Exception as error:  # fsspec, botocore, aiohttp and google.auth have no common type
            if wait is None or isinstance(error, _FINAL) or "Credentials" in type(error).__name__:
                _raise_problem(error, location)
            log.warning("%s: %s; retrying in %g s", location, _without_secrets(error), wait)
            time.sleep(wait)
    raise AssertionError


def _raise_problem(error: Exception, location: str) -> NoReturn:
    reason = _without_secrets(error)
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        raise EloError(f"{location}: no such bucket or object; check the address") from None
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        raise EloError(
            f"{location}: access denied ({reason}); set valid credentials in the environment (they may have expired), "
            "check that they give access to the bucket, then run the same command again, it resumes"
        ) from None
    raise EloError(
        f"{location}: the storage cannot be reached ({type(error).__name__}: {reason}); check the network and the "
        "endpoint, then run the same command again, it resumes"
    ) from None


def _without_secrets(error: Exception) -> str:
    reason = error_line(error)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAMES.search(name):
            reason = reason.replace(value, "***")
    return reason


def _version(info: dict[str, Any]) -> str:
    for key in _VERSIONS:
        if info.get(key):
            return str(info[key]).strip('"')
    return hashlib.sha256(f"{info.get('size')} {_time(info)}".encode()).hexdigest()


def _time(info: dict[str, Any]) -> float:
    times = [info[key] for key in _TIMES if info.get(key) is not None]
    return times[0].timestamp() if times and hasattr(times[0], "timestamp") else 0.0
