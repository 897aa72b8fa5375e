"""Errors that the user can fix: the command line prints only their message and exits with status 2."""

import signal


class EloError(ValueError):
    """An error in the user's input; the message has the form `what: where: what was found; what to do`."""


class UnsupportedArchitectureError(EloError):
    """The layers of this model cannot be detached without changing what they compute."""


class UnfinishedError(EloError):
    """A file or folder that should be complete is missing, incomplete or damaged."""


class MethodFailedError(EloError):
    """The method cannot train this model on this text, although the configuration is valid.

    Raise it in every process of a launch: a comparison records it as the result of the contestant and continues.
    """


class TrainingDivergedError(MethodFailedError):
    """The loss is not finite, or it jumped and did not recover."""


class StoppedBySignalError(Exception):
    """Training wrote a checkpoint and stopped after a signal."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}; a checkpoint was written")
        self.number = number


def error_line(error: Exception) -> str:
    """Return the message of another library's exception on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__
