"""Tokenise the units of a preparation as tasks of a Ray cluster (extra `ray`).

Input files, shards and records are on a file system that all nodes share. A task returns only counts and messages, so
one that Ray repeats on another node resumes after the last finished shard.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

import elo
from elo.data.corpora import Preparation, Unit
from elo.data.sources import InputFile
from elo.errors import EloError
from elo.log import Progress, short

RETRIES = 3
"""Number of times that a unit is repeated after its node or process was lost."""
CONNECT_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 10.0
"""Time between checks that the cluster still has suitable nodes, and limit for cancelled tasks to end."""
VISIBLE_TIMEOUT_S = 90.0
"""Time after which the records of other nodes must be visible. NFS clients cache folders for up to 60 s."""

Common = tuple[str, str, InputFile]
"""What every node must share with the driver: versions, the working folder, and a file in the output."""
Outcome = tuple[int, list[str], str | None]
"""Result of a unit: tokens written, messages, and the reason if it failed."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at `host:port`; `auto` means the one at `RAY_ADDRESS`, or this machine's.

    Raises:
        EloError: Ray is not installed, or no cluster answers at the address.
    """
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # attempts to connect, of 40 s each
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # unlimited by default
    try:
        import ray
    except ImportError:
        raise EloError("--ray: Ray is not installed; run: pip install 'elo-cpt[ray]'") from None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # Ray and sockets raise many types
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise EloError(
            f"--ray {address}: cannot connect to a Ray cluster ({reason}); run this command on one of its nodes and "
            "give auto, or HOST:PORT as printed by ray start --head"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def tokenize_on_ray(job: Preparation, pending: list[Unit], marker: Path, cpus: int, progress: Progress) -> None:
    """Tokenise each unit as a task that takes `cpus` CPUs of a node.

    A unit that fails does not stop the others. A node with other versions or files stops the whole work.

    Args:
        marker: a file in the output, which every node must see.

    Raises:
        EloError: a unit failed, or a node has another version or does not see the files.
    """
    import ray

    common = (_versions(), str(Path.cwd()), _seen(marker))
    _check_nodes(common, [file for unit in pending for file in unit.files], cpus)
    given = ray.put((replace(job, tell=print), pending, common, cpus))
    run = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_run_unit)
    largest_first = sorted(range(len(pending)), key=lambda number: -pending[number].size)
    waiting = {run.remote(given, number): pending[number] for number in largest_first}
    failures: list[str] = []
    total, warned = 0, False
    try:
        while waiting:
            finished, _ = ray.wait(list(waiting), timeout=LOOK_TIMEOUT_S)
            if not finished and not warned and not _nodes(cpus):
                warned = True
                job.tell(f"no node of the Ray cluster has {cpus} CPUs; waiting for one to join")
            for reference in finished:
                unit = waiting.pop(reference)
                tokens, messages, failure = _outcome(reference, unit)
                total += tokens
                for line in messages:
                    job.tell(line)
                if failure is not None:
                    failures.append(failure)
                    job.tell(f"failed: {failure}; continuing with the other files")
                count = f"{len(pending) - len(waiting)} of {len(pending)} groups of files"
                progress.update(progress.done + unit.size, f"{short(total)} tokens, {count}, {unit.name}")
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=LOOK_TIMEOUT_S)
    if failures:
        more = f" ({len(failures) - 1} more groups of files failed, see above)" if len(failures) > 1 else ""
        raise EloError(failures[0] + more)
    _wait_for_records(job, pending)


def _outcome(reference: Any, unit: Unit) -> Outcome:
    """Return the outcome of a task, or raise the EloError that a node raised."""
    import ray

    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, EloError) else error from None
    except ray.exceptions.RayError as error:
        reason = f"its node or process was lost {RETRIES + 1} times ({type(error).__name__})"
        remedy = "check the memory of the nodes and run the same command again, it resumes"
        return 0, [], f"{unit.name}: {reason}; {remedy}"


def _run_unit(given: tuple[Preparation, list[Unit], Common, int], number: int) -> Outcome:
    job, pending, common, cpus = given
    _check_here(common, pending[number].files)  # the node may have joined after the others were checked
    if cpus == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    messages: list[str] = []
    tokens = 0
    try:
        with job.pool(cpus) as pool:
            for _, new in replace(job, tell=messages.append).run_unit(pending[number], pool):
                tokens += new
    except EloError as error:
        return tokens, messages, str(error)
    return tokens, messages, None


def _check_nodes(common: Common, files: list[InputFile], cpus: int) -> None:
    """Raise EloError if a node of the cluster has another version or does not see the files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check, given, checks = ray.remote(num_cpus=0, max_retries=0)(_check_here), ray.put(files), {}
    for node in _nodes(cpus):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        checks[check.options(scheduling_strategy=there).remote(common, given)] = node["NodeManagerHostname"]
    for reference, host in checks.items():
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EloError):
                raise error.cause from None
            reason = str(error.cause).strip().split("\n")[-1]
            raise EloError(
                f"--ray: node {host}: cannot run {common[0]} ({reason}); install the same versions on all nodes"
            ) from None
        except ray.exceptions.RayError:
            continue  # the node is gone


def _check_here(common: Common, files: list[InputFile]) -> None:
    versions, folder, marker = common
    node = f"--ray: node {socket.gethostname()}"
    if (found := _versions()) != versions:
        raise EloError(f"{node}: has {found}, not {versions}; install the same versions on all nodes")
    with suppress(OSError):  # paths may all be absolute
        os.chdir(folder)
    for file in (marker, *files):
        if file.is_hub or file.version:
            continue
        try:
            reason = None if _seen(Path(file.location)) == file else "another size or modification time"
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise EloError(
                f"{node}: {file.location}: is not the file that the driver sees there ({reason}); "
                "put input and output on a file system that all nodes share"
            )


def _versions() -> str:
    return f"ELO {elo.__version__} with tokenizers {tokenizers.__version__}"


def _seen(path: Path) -> InputFile:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
    return InputFile(str(path), status.st_size, status.st_mtime_ns)


def _nodes(cpus: int) -> list[dict]:
    """Return the live nodes that have at least `cpus` CPUs."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus]


def _wait_for_records(job: Preparation, pending: list[Unit]) -> None:
    """Wait until the records of all units are visible here."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while hidden := [unit.name for unit in pending if not job.state(unit, look=True).finished]:
        if time.monotonic() > deadline:
            raise EloError(
                f"{job.root}: does not show the shards of {hidden[0]}, which a node has written; give an output on a "
                "file system that all nodes share"
            )
        time.sleep(1)
