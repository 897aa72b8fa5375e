"""Scores of every decoder layer by several criteria (docs/probe.md)."""

TOKENS = 256
"""Default tokens per language. With them, a model of 135M parameters takes less than 5 minutes on one CPU core."""
SEQUENCE_LENGTH = 64
"""Default length of a sequence, in tokens."""
