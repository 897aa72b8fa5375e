"""The run folder: stages that are done once, skipped while nothing they depend on has changed, and redone otherwise."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from elo.errors import EloError, UnfinishedError
from elo.store.files import TEMPORARY_PREFIX, read_json, remove, sha256_file, sha256_json, write_json
from elo.store.processes import from_main, is_main, wait_until

Paths = tuple[Path, ...]
# Raise when a stage's meaning changes, so that results of older code are not taken for today's.
_STAGE_VERSION = 2
_CHECKED = (".safetensors", "config.json")


@dataclass(frozen=True)
class Artifact:
    """What a stage left, or a checkpoint that was there before.

    Attributes:
        path: file or folder.
        fingerprint: decides whether what is made from it has to be made again.
        record: what the stage recorded; empty for what no stage made.
    """

    path: Path
    fingerprint: Any
    record: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """A folder in which stages are done once, skipped while nothing they depend on has changed, and redone otherwise.

    `stages/<name>.json` is written last, so its existence means the stage is complete. It holds the stage's inputs,
    their fingerprint, its output files with sizes, and its record.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self.root = root
        self.say = say if is_main() else lambda _: None
        self._skipped: dict[str, dict[str, Any]] = {}

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the run folder for this run: its main process does; `shared`, with others that hold it so.

        Raises:
            EloError: another run holds it, or it cannot be written.
        """
        if not is_main():
            yield
            return
        made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
            # A link put in its place must not have the file that it names emptied.
            lock = os.fdopen(os.open(self.root / "run.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            raise EloError(f"{self.root}: cannot be written ({error.strerror}); choose another output") from None
        with lock:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise EloError(
                    f"{self.root}: another run (process {lock.read().strip() or 'unknown'}) works in this folder; "
                    "wait for it, or choose another output"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                yield
            except EloError:
                if made and not shared and self._nothing_done():
                    remove(self.root)
                    for folder in made[1:]:
                        folder.rmdir()
                raise

    def _nothing_done(self) -> bool:
        """Whether the run folder holds nothing but what every start writes."""
        begun = all(path.name.endswith(".begun.json") for path in (self.root / "stages").iterdir())
        return begun and {path.name for path in self.root.iterdir()} <= {"stages", "run.lock", "config.json"}

    def path(self, *parts: str) -> Path:
        """A path inside the run folder."""
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
        """Call `function(folder / name, **arguments, **execution)` unless it was done with these arguments already.

        The arguments are the stage's fingerprint, so that none can be forgotten: numbers, texts, lists, artifacts of
        earlier stages, whatever has a `fingerprint`, and settings and objects with `decisive()` or `identity()`.

        Args:
            name: of the stage, unique in the folder, and path of its output there.
            function: makes its output at the path it is given and returns a JSON record. After a kill it is called
                again with the same arguments and may find what the earlier call left; otherwise it finds nothing.
            execution: further arguments, which say how the work is done and do not count.
            keep: the output stays; otherwise it is scratch, such as a model that is measured and dropped.
            collective: every process of the launch does the work; otherwise the main one does and the others wait.

        Raises:
            TypeError: an argument has no identity.
        """
        output = self.path(name)
        outputs: Paths = (output,) if keep else ()
        scratch: Paths = (self.path(f"{name}-checkpoints"), *(() if keep else (output,)))
        inputs = {key: identity(value) for key, value in arguments.items()}

        def work() -> dict[str, Any]:
            output.parent.mkdir(parents=True, exist_ok=True)
            return function(output, **arguments, **(execution or {}))

        fingerprint = self._stage(name, inputs, work, outputs=outputs, scratch=scratch, collective=collective)
        return Artifact(output, fingerprint, read_json(self._stage_file(name))["record"])

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[], dict[str, Any]],
        *,
        outputs: Paths,
        scratch: Paths,
        collective: bool,
    ) -> str:
        """Do `work` unless it is done with these inputs already, and return the fingerprint."""
        fingerprint = _fingerprint(name, inputs)
        if collective:
            if not from_main(lambda: self._is_done(name, fingerprint, inputs, outputs, scratch)):
                record = self._timed(work)
                from_main(lambda: None)  # everybody is through before the stage counts as done
                if is_main():
                    self._finish(name, fingerprint, inputs, outputs, scratch, record)
        elif is_main() and not self._is_done(name, fingerprint, inputs, outputs, scratch):
            self._finish(name, fingerprint, inputs, outputs, scratch, self._timed(work))
        wait_until(lambda: self._has_record(name, fingerprint))
        return fingerprint

    def begin(self, name: str, **arguments: Any) -> None:
        """Mark a stage as begun with these arguments, so that `once` later resumes what was made of it.

        Raises:
            EloError: it was begun or done with others.
        """
        inputs = {key: identity(value) for key, value in arguments.items()}
        fingerprint = _fingerprint(name, inputs)
        for path in (self._stage_file(name), self._stage_file(name, begun=True)):
            found = _read_record(path, ("fingerprint",))
            if found is not None and found["fingerprint"] != fingerprint:
                changed = _difference(found.get("inputs", {}), inputs)
                raise EloError(
                    f"{self.root}: {name} was begun there with other inputs (changed: {changed}); give all processes "
                    "the same configuration, or choose another output"
                )
        self._mark_begun(name, fingerprint, inputs)

    def _mark_begun(self, name: str, fingerprint: str, inputs: Mapping[str, Any]) -> None:
        write_json(self._stage_file(name, begun=True), {"fingerprint": fingerprint, "inputs": dict(inputs)})

    def _is_done(self, name: str, fingerprint: str, inputs: Mapping[str, Any], outputs: Paths, scratch: Paths) -> bool:
        """Whether the stage is done with these inputs; if not, what an earlier one with others left is cleared away."""
        done_path, begun_path = self._stage_file(name), self._stage_file(name, begun=True)
        done = _read_record(done_path, ("fingerprint", "inputs", "outputs", "record"))
        if done is not None:
            changed = done["fingerprint"] != fingerprint
            if not changed and _intact(self.root, done["outputs"]):
                self.say(f"{name}: done already")
                for path in (begun_path, *scratch):  # killed between the record and this
                    remove(path)
                self._skipped[fingerprint] = done
                return True
            reason = (
                f"changed: {_difference(done['inputs'], inputs)}" if changed else "its output is missing or damaged"
            )
            self.say(f"{name}: {reason}; doing it again")
        done_path.unlink(missing_ok=True)  # also one that cannot be read
        self._check_what_is_used(inputs)
        begun = _read_record(begun_path, ("fingerprint",))
        if begun is None or begun["fingerprint"] != fingerprint:
            for path in (*outputs, *scratch):
                remove(path)
            self._mark_begun(name, fingerprint, inputs)
        return False

    def _check_what_is_used(self, inputs: Mapping[str, Any]) -> None:
        """Before work begins, compare what skipped stages left for it with its checksums; once a start.

        Raises:
            UnfinishedError: a file was altered; its stage counts as not done from now on.
        """
        for value in inputs.values():
            stage = self._skipped.pop(value, None) if isinstance(value, str) else None
            for name, expected in (stage or {}).get("sha256", {}).items():
                if sha256_file(self.root / name) != expected:
                    self._stage_file(stage["stage"]).unlink(missing_ok=True)  # type: ignore[index]
                    raise UnfinishedError(
                        f"{self.root / name}: does not have the checksum it was written with, so it was altered or the "
                        "disk is failing; the same command makes it again"
                    )

    def _timed(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        record = work()
        record.setdefault("seconds", time.perf_counter() - started)
        return record

    def _finish(
        self,
        name: str,
        fingerprint: str,
        inputs: Mapping[str, Any],
        outputs: Paths,
        scratch: Paths,
        record: dict[str, Any],
    ) -> None:
        value = {
            "stage": name,
            "fingerprint": fingerprint,
            "inputs": dict(inputs),
            "outputs": (sizes := _sizes(self.root, outputs)),
            # Token shards have checksums of their own, in their manifest.
            "sha256": {name: sha256_file(self.root / name) for name in sizes if name.endswith(_CHECKED)},
            "record": record,
        }
        write_json(self._stage_file(name), value)
        self._stage_file(name, begun=True).unlink(missing_ok=True)
        for path in scratch:
            remove(path)

    def _has_record(self, name: str, fingerprint: str) -> bool:
        record = _read_record(self._stage_file(name), ("fingerprint",))
        return record is not None and record["fingerprint"] == fingerprint

    def sweep(self) -> None:
        """Remove temporary files that killed processes left."""
        for leftover in self.root.rglob(f"{TEMPORARY_PREFIX}*"):
            remove(leftover)

    def _stage_file(self, name: str, *, begun: bool = False) -> Path:
        flat = name.replace("/", "-")
        return self.root / "stages" / (f"{flat}.begun.json" if begun else f"{flat}.json")


def identity(value: Any) -> Any:
    """What decides whether `value` is the same as before, as JSON.

    Raises:
        TypeError: it is nothing that could be compared.
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
    raise TypeError(f"{type(value).__name__} has no identity that a stage could depend on")


def file_identity(path: Path) -> dict[str, Any]:
    """What tells that a file or folder of files is still the one it was: sizes and modification times, not content.

    Raises:
        UnfinishedError: there is nothing at `path`.
    """
    if not path.exists():
        raise UnfinishedError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {
        str(file.relative_to(path) if path.is_dir() else file.name): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    }


def _read_record(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """A stage's record; None where there is none, or one so damaged that the stage has to be done again."""
    try:
        value = read_json(path)
    except UnfinishedError:
        return None
    return value if isinstance(value, dict) and all(key in value for key in keys) else None


def _sizes(root: Path, outputs: tuple[Path, ...]) -> dict[str, int]:
    files = [f for path in outputs for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    return {str(file.relative_to(root)): file.stat().st_size for file in files}


def _intact(root: Path, sizes: dict[str, int]) -> bool:
    return all((root / name).is_file() and (root / name).stat().st_size == size for name, size in sizes.items())


def _fingerprint(name: str, inputs: Mapping[str, Any]) -> str:
    return sha256_json({"stage": name, "version": _STAGE_VERSION, "inputs": dict(inputs)})


def _difference(before: Any, now: Any, path: str = "") -> str:
    """First few paths at which two JSON values differ, with both values."""
    found: list[str] = []

    def walk(a: Any, b: Any, at: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in [*a, *(k for k in b if k not in a)]:
                walk(a.get(key), b.get(key), f"{at}.{key}" if at else str(key))
        elif _jsonable(a) != _jsonable(b):
            found.append(at if len(str(a)) + len(str(b)) > 80 else f"{at} {a} -> {b}")

    walk(before, now, path)
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") if found else "the code that makes it"


def _jsonable(value: Any) -> Any:
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
