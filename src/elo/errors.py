"""Errors that are the user's to mend: the command line prints their message alone and exits with status 2."""


class EloError(ValueError):
    """A mistake in what the user gave: says what, where, what was got and what to do, in one message."""


class UnsupportedArchitectureError(EloError):
    """Layers of this model cannot be detached without changing what they compute."""


class UnfinishedError(EloError):
    """An artefact on disk is missing, incomplete or damaged."""


class TrainingDivergedError(EloError):
    """The loss is not finite, or it has jumped and stayed up."""
