"""The run folder: each stage runs once, is skipped while its inputs are unchanged, and is repeated otherwise."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from elo.errors import EloError, UnfinishedError
from elo.store.files import TEMPORARY_PREFIX, read_json, read_record, remove, sha256_file, sha256_json, write_json
from elo.store.live import live_file
from elo.store.processes import from_main, is_main, wait_until
from elo.store.remote import require_local

Paths = tuple[Path, ...]
# Increase when the meaning of a stage changes, so that results of older code are not reused.
_STAGE_VERSION = 2
_CHECKED = (".safetensors", "config.json")


@dataclass(frozen=True)
class Artifact:
    """The output of a stage, or a checkpoint that existed before the run.

    Attributes:
        path: file or folder.
        fingerprint: identity of the content; if it changes, everything made from it is made again.
        record: record of the stage; empty if no stage made the artifact.
    """

    path: Path
    fingerprint: Any
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stage:
    """A requested stage.

    Attributes:
        inputs: identity of each argument.
        outputs: paths that are kept.
        scratch: paths that are removed when the stage is complete.
    """

    name: str
    inputs: dict[str, Any]
    outputs: Paths
    scratch: Paths

    @cached_property
    def fingerprint(self) -> str:
        return sha256_json({"stage": self.name, "version": _STAGE_VERSION, "inputs": self.inputs})


class RunFolder:
    """A folder in which each stage runs once, is skipped while its inputs are unchanged, and is repeated otherwise.

    `stages/<name>.json` is written last, so if it exists the stage is complete. It holds the stage's inputs, their
    fingerprint, the output files with sizes, and the stage's record.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self.root = root
        self.say = say if is_main() else lambda _: None
        self._skipped: dict[str, dict[str, Any]] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run folder in the main process.

        Raises:
            EloError: another run holds the lock, or the folder is in object storage or cannot be written.
        """
        require_local(self.root, "output")
        if not is_main():
            yield
            return
        made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: if the lock file was replaced by a link, its target must not be truncated.
            lock = os.fdopen(os.open(self.root / "run.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise EloError(f"{self.root}: cannot be written ({error.strerror}); choose another output") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise EloError(
                    f"{self.root}: another run (process {lock.read().strip() or 'unknown'}) is using this folder; "
                    "wait for it, or choose another output"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                yield
            except EloError:
                if made and self._nothing_done():
                    remove(self.root)
                    with suppress(OSError):  # another run may have started beside this one
                        for folder in made[1:]:
                            folder.rmdir()
                raise

    def _nothing_done(self) -> bool:
        """Return whether the run folder holds only files that every start writes."""
        begun = all(path.name.endswith((".begun.json", ".live.json")) for path in (self.root / "stages").iterdir())
        return begun and {path.name for path in self.root.iterdir()} <= {"stages", "run.lock", "config.json"}

    def path(self, *parts: str) -> Path:
        """Return a path inside the run folder."""
        return self.root.joinpath(*parts)

    def once(
        self,
        name: str,
        function: Callable[..., dict[str, Any]],
        *,
        execution: Mapping[str, Any] | None = None,
        keep: bool = True,
        collective: bool = False,
        **arguments: Any,
    ) -> Artifact:
        """Call `function(folder / name, **arguments, **execution)` unless the stage is complete with these arguments.

        The arguments determine the stage's fingerprint, so none can be forgotten. They may be numbers, strings, lists,
        artifacts of earlier stages, anything with a `fingerprint`, and objects with `decisive()` or `identity()`.

        Args:
            name: name of the stage, unique in the folder, and path of its output there.
            function: writes its output to the given path and returns a JSON record. After a kill it is called again
                with the same arguments and finds what the killed call left; otherwise the path does not exist.
            execution: further arguments that affect how the work is done, but not its result.
            keep: keep the output; otherwise it is removed, such as a model that is only evaluated.
            collective: run the function in every process of the launch, not only in the main one.

        Raises:
            TypeError: an argument has no identity.
        """
        output = self.path(name)
        stage = _Stage(
            name,
            {key: identity(value) for key, value in arguments.items()},
            outputs=(output,) if keep else (),
            scratch=(self.path(f"{name}-checkpoints"), *(() if keep else (output,))),
        )

        def work() -> dict[str, Any]:
            started = time.perf_counter()
            output.parent.mkdir(parents=True, exist_ok=True)
            with live_file(self.stage_file(name, "live")) if is_main() else nullcontext():
                record = function(output, **arguments, **(execution or {}))
            record.setdefault("seconds", time.perf_counter() - started)
            return record

        if collective:
            if not from_main(lambda: self._is_done(stage)):
                record = work()
                from_main(lambda: None)  # all processes must finish before the stage counts as complete
                if is_main():
                    self._finish(stage, record)
        elif is_main() and not self._is_done(stage):
            self._finish(stage, work())
        wait_until(lambda: self._is_complete(stage))
        return Artifact(output, stage.fingerprint, read_json(self.stage_file(name))["record"])

    def _is_done(self, stage: _Stage) -> bool:
        """Return whether the stage is complete with these inputs; if not, remove the output of other inputs."""
        done_path, begun_path = self.stage_file(stage.name), self.stage_file(stage.name, "begun")
        done = read_record(done_path, "fingerprint", "inputs", "outputs", "record")
        if done is not None:
            changed = done["fingerprint"] != stage.fingerprint
            if not changed and _intact(self.root, done["outputs"]):
                self.say(f"{stage.name}: already done")
                for path in (begun_path, *stage.scratch):  # left by a kill right after the record was written
                    remove(path)
                self._skipped[stage.fingerprint] = done
                return True
            difference = _difference(done["inputs"], stage.inputs)
            reason = f"changed: {difference}" if changed else "its output is missing or damaged"
            self.say(f"{stage.name}: {reason}; repeating the stage")
        done_path.unlink(missing_ok=True)  # even if unreadable
        self._check_what_is_used(stage.inputs)
        begun = read_record(begun_path, "fingerprint")
        if begun is None or begun["fingerprint"] != stage.fingerprint:
            for path in (*stage.outputs, *stage.scratch):
                remove(path)
            write_json(begun_path, {"fingerprint": stage.fingerprint, "inputs": stage.inputs})
        return False

    def _check_what_is_used(self, inputs: Mapping[str, Any]) -> None:
        """Verify the checksums of the outputs of skipped stages that this stage uses, once per start.

        Raises:
            UnfinishedError: a file was altered. Its stage no longer counts as complete.
        """
        for value in inputs.values():
            stage = self._skipped.pop(value, None) if isinstance(value, str) else None
            for name, expected in (stage or {}).get("sha256", {}).items():
                if sha256_file(self.root / name) != expected:
                    self.stage_file(stage["stage"]).unlink(missing_ok=True)  # type: ignore[index]
                    raise UnfinishedError(
                        f"{self.root / name}: its checksum is not the recorded one, so it was altered or the disk is "
                        "failing; run the same command again to recreate it"
                    )

    def _finish(self, stage: _Stage, record: dict[str, Any]) -> None:
        value = {
            "stage": stage.name,
            "fingerprint": stage.fingerprint,
            "inputs": stage.inputs,
            "outputs": (sizes := _sizes(self.root, stage.outputs)),
            # Checksums of token shards are in their manifest.
            "sha256": {name: sha256_file(self.root / name) for name in sizes if name.endswith(_CHECKED)},
            "record": record,
        }
        write_json(self.stage_file(stage.name), value)
        states: tuple[Literal["begun", "live"], ...] = ("begun", "live")
        for state in states:
            self.stage_file(stage.name, state).unlink(missing_ok=True)
        for path in stage.scratch:
            remove(path)

    def _is_complete(self, stage: _Stage) -> bool:
        """Return whether the stage has a record and intact outputs; the main process may be replacing damaged ones."""
        done = read_record(self.stage_file(stage.name), "fingerprint", "outputs")
        return done is not None and done["fingerprint"] == stage.fingerprint and _intact(self.root, done["outputs"])

    def sweep(self) -> None:
        """Remove temporary files that killed processes left."""
        for leftover in self.root.rglob(f"{TEMPORARY_PREFIX}*"):
            remove(leftover)

    def stage_file(self, name: str, state: Literal["", "begun", "live"] = "") -> Path:
        """Return the path of a stage's record, or of the file that marks it as begun or shows how far it is."""
        flat = name.replace("/", "-")
        return self.root / "stages" / (f"{flat}.{state}.json" if state else f"{flat}.json")


def identity(value: Any) -> Any:
    """Return what identifies `value` between runs, as JSON.

    Raises:
        TypeError: `value` is of a type that has no identity.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "fingerprint"):  # artifacts, prepared data and its corpora
        return value.fingerprint
    for way in ("identity", "decisive"):
        if hasattr(value, way):
            return getattr(value, way)()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [identity(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no identity, so no stage can depend on it")


def file_identity(path: Path) -> dict[str, Any]:
    """Return what identifies a file or a folder of files between runs: sizes and modification times, not content.

    Raises:
        UnfinishedError: `path` does not exist.
    """
    if not path.exists():
        raise UnfinishedError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {
        str(file.relative_to(path) if path.is_dir() else file.name): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    }


def _sizes(root: Path, outputs: tuple[Path, ...]) -> dict[str, int]:
    files = [f for path in outputs for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    return {str(file.relative_to(root)): file.stat().st_size for file in files}


def _intact(root: Path, sizes: dict[str, int]) -> bool:
    return all((root / name).is_file() and (root / name).stat().st_size == size for name, size in sizes.items())


def _difference(before: Any, now: Any) -> str:
    """Describe the first paths at which two JSON values differ, with both values."""
    found: list[str] = []

    def walk(a: Any, b: Any, at: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in [*a, *(k for k in b if k not in a)]:
                walk(a.get(key), b.get(key), f"{at}.{key}" if at else str(key))
        elif _jsonable(a) != _jsonable(b):
            found.append(at if len(str(a)) + len(str(b)) > 80 else f"{at} {a} -> {b}")

    walk(before, now, "")
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") if found else "the code that makes it"


def _jsonable(value: Any) -> Any:
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
