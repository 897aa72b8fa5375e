"""The inputs of a run, and the result of its method."""

from dataclasses import dataclass, field
from typing import Any

from elo.config import RunConfig
from elo.store.run_folder import Artifact, RunFolder


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run.

    Attributes:
        base: checkpoint to adapt.
        tokenizer: folder or hub id of the tokenizer.
        layers: decoder layers that the configuration chooses, if the method uses them; for `layers: auto`, an estimate
            until `probe_layers`.
        layers_reason: why a probe chose the layers; empty without a probe.
    """

    config: RunConfig
    folder: RunFolder
    base: Artifact
    tokenizer: str
    layers: tuple[int, ...]
    layers_reason: str = ""

    @property
    def languages(self) -> tuple[str, ...]:
        """Target languages, then source languages."""
        return self.config.data.languages


@dataclass
class Adapted:
    """The result of a method.

    Attributes:
        model: last checkpoint.
        records: records of the stages with a measured cost, in order.
        before_alignment: measurement of the attached model, if layer alignment follows.
    """

    model: Artifact
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    before_alignment: dict[str, Any] | None = None
