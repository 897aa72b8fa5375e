"""Scores of every decoder layer by several criteria (docs/probe.md)."""
