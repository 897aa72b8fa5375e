"""Write files atomically: under a temporary name, fsynced, then renamed."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from elo.errors import EloError, UnfinishedError

TEMPORARY_PREFIX = ".tmp-"
_NOT_LOCKABLE = {
    *(errno.ENOENT, errno.ELOOP, errno.ENXIO),  # nothing there, a symbolic link, a socket
    *(errno.EACCES, errno.EPERM),  # a file that may be replaced and not read
    *(errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),  # file systems without locks
}


def fsync_path(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush `root` and every file and directory below it to disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


def disk_problem(error: OSError, place: Path | None = None) -> str:
    """Describe a file system error: the file, the problem, and, if the disk is full, what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = f"{error.filename or place or 'output'}: {error.strerror or error}"
    return what + ("; free disk space and run the same command again, it resumes" if full else "")


@contextmanager
def readable_disk_errors(place: Path) -> Iterator[None]:
    """Convert the errors that libraries raise for a full or failing disk into one message that names `place`.

    Raises:
        EloError: writing failed. safetensors and torch report some failures with error types of their own.
    """
    try:
        yield
    except OSError as error:
        raise EloError(disk_problem(error, place)) from None
    except EloError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if not re.search(r"os error \d+|PytorchStreamWriter|unexpected pos \d+|file write failed", reason):
            raise
        raise EloError(
            f"{place}: cannot be written ({reason[:200]}); free disk space and run the same command again, it resumes "
            "from the last complete checkpoint"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` with `text` (UTF-8) atomically."""
    temporary = _temporary_path(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # errors on open files lack the file name
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` with `value` as indented JSON atomically.

    Raises:
        ValueError: `value` contains NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UnfinishedError: the file is missing, or is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnfinishedError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UnfinishedError(f"{path}: damaged, not JSON ({error}); remove the file and run again") from None


def read_record(path: Path, *keys: str) -> dict[str, Any] | None:
    """Read a JSON object with these keys; return None if the file is missing or damaged, for example by a crash."""
    try:
        value = read_json(path)
    except UnfinishedError:
        return None
    return value if isinstance(value, dict) and all(key in value for key in keys) else None


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory next to `target`; on success fsync it and rename it to `target`.

    A failure leaves nothing behind. With `overwrite` an existing `target` is replaced once the new one is complete.

    Raises:
        EloError: `target` exists and is not empty (without `overwrite`), another process is writing it, or it cannot be
            written.
    """
    target = target.absolute()
    _check_free(target, overwrite)
    with scratch_directory(target) as temporary:
        yield temporary
        fsync_tree(temporary)
        _check_free(target, overwrite)  # another program may have written it since
        replaced = _temporary_path(target)
        try:
            if target.is_symlink() or target.exists():
                target.rename(replaced)  # renaming is fast; the slow removal follows once the new one is in place
            temporary.rename(target)
            fsync_path(target.parent)
        finally:
            if replaced.is_symlink() or replaced.exists():
                remove(replaced) if target.exists() else replaced.rename(target)


def _check_free(target: Path, overwrite: bool) -> None:
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise EloError(f"{target}: already exists; choose another output, remove it, or pass --overwrite")


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory next to `target`, and remove it at the end.

    It is locked, so that only one process at a time works on `target`. What killed processes left there is removed.

    Raises:
        EloError: another process is writing `target`, or it cannot be written.
    """
    scratch = _temporary_path(target)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir()
            _lock(scratch, target, stack)
            temporary = re.compile(re.escape(f"{TEMPORARY_PREFIX}{target.name}-") + "[0-9a-f]{8}")
            leftovers = [path for path in target.parent.iterdir() if temporary.fullmatch(path.name) and path != scratch]
            for path in (target, *leftovers):
                _lock(path, target, stack)
            for path in leftovers:
                remove(path)
        except OSError as error:
            raise EloError(f"{target}: cannot be written ({error.strerror}); choose another output folder") from None
        yield scratch


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")


def _lock(path: Path, target: Path, stack: ExitStack) -> None:
    """Lock `path` until `stack` ends, if something is there that can be locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EloError(f"{target}: another process is writing it; wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in _NOT_LOCKABLE:
            raise


def remove(path: Path) -> None:
    """Remove a file, a link or a directory tree if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys), in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
