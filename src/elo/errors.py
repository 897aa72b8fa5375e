"""Errors that are the user's to mend: the command line prints their message alone and exits with status 2."""

import signal


class EloError(ValueError):
    """A mistake in what the user gave: says what, where, what was got and what to do, in one message."""


class UnsupportedArchitectureError(EloError):
    """Layers of this model cannot be detached without changing what they compute."""


class UnfinishedError(EloError):
    """An artefact on disk is missing, incomplete or damaged."""


class TrainingDivergedError(EloError):
    """The loss is not finite, or it has jumped and stayed up."""


class StoppedBySignalError(Exception):
    """Training wrote a checkpoint and stopped because a signal asked for it."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}; a checkpoint is written")
        self.number = number


def error_line(error: Exception) -> str:
    """What another library's exception says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__
