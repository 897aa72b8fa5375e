"""Child processes forked from one that has everything imported already: a launch that does not cost seconds."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def forked(work: Callable[[], Any], log: Path) -> int:
    """Start `work` in a child process of its own group; its output goes to `log`. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # The pool of threads did not come along: it is made anew before several threads ask for it at once.
        torch.set_num_threads(1)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
        status = 71
    finally:
        os._exit(status)


def finish(process: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ended(process: int) -> bool:
    """Whether a child has ended; its exit status can still be asked for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def launched(work: Callable[[], Any], log: Path, processes: int = 2, seconds: float = 300) -> list[int]:
    """Call `work` in several processes as torchrun launches them: one that fails ends all, and so does the time-out.

    Returns:
        Exit statuses, negative for a signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranked(rank: int) -> Callable[[], Any]:
        def call() -> Any:
            from accelerate.state import AcceleratorState, GradientState

            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            AcceleratorState._reset_state(reset_partial_state=True)  # that of the one process this was forked from
            GradientState._reset_state()
            return work()

        return call

    children = [forked(ranked(rank), log) for rank in range(processes)]
    running, statuses = set(children), dict.fromkeys(children, 0)
    deadline = time.monotonic() + seconds
    try:
        while running and time.monotonic() < deadline and not any(statuses.values()):
            for child in [each for each in running if ended(each)]:
                running.remove(child)
                statuses[child] = finish(child)
            time.sleep(0.02)
    finally:
        for child in running:
            for kill in (os.killpg, os.kill):  # before it had a group of its own
                with contextlib.suppress(ProcessLookupError):
                    kill(child, signal.SIGKILL)
            statuses[child] = finish(child)
    return list(statuses.values())
