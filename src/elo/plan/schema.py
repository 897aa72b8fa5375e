"""Schema of a plan, which `elo plan` writes as JSON and `elo.plan.table` renders."""

from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from elo.checkpoint.footprint import Middle

SCHEMA_VERSION = 3


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Memory(_Record):
    """Peak memory of one device."""

    peak_bytes: int
    moment: str
    """Moment of an update at which the peak occurs."""
    parts: dict[str, int]
    """Bytes by part at that moment; the sum is the peak."""


class FlopsPerToken(_Record):
    """FLOPs per trained token, in matrix products and attention scores."""

    forward: float
    backward: float
    recompute: float
    """Forward FLOPs repeated by activation checkpointing."""
    head: float
    """The LM head's part of `forward` and `backward`."""
    total: float


class PhasePlan(_Record):
    """One phase of a method."""

    name: str
    middle: Middle
    """Treatment of the layers that are not selected for training."""
    tokens: int
    trainable_parameters: int
    """Number of parameters that have gradients and optimizer states at one time."""
    flops_per_token: FlopsPerToken
    flops: float
    seconds: float
    measured: bool
    """Whether the time was measured on this machine rather than estimated from FLOPs."""
    tokens_per_second: float
    device_hours: float
    cost: float | None
    """Device hours times the price per hour; null without a price."""
    memory: Memory
    fits: bool
    """Whether the peak is within the usable share of the device's memory."""
    suggestion: list[str]
    """Settings with which a phase that does not fit would fit; empty if the plan finds none."""


class MethodPlan(_Record):
    """All phases of a method, with totals."""

    name: str
    label: str
    phases: list[PhasePlan]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device_hours(self) -> float:
        return sum(phase.device_hours for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cost(self) -> float | None:
        costs = [phase.cost for phase in self.phases if phase.cost is not None]
        return sum(costs) if costs else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int:
        """Largest peak memory of any phase, in bytes."""
        return max(phase.memory.peak_bytes for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)


class SpeedUp(_Record):
    """Ratio of the baseline's cost to the run's, for the same token budget."""

    over: str
    """Name of the baseline."""
    flops: float
    seconds: float


class PlannedModel(_Record):
    """The base model, as described by its config."""

    name: str
    model_type: str
    layers: list[int]
    """0-based indices of the decoder layers that the configuration selects."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    vocabulary_rows: int
    """Number of rows of embedding and LM head that training computes with."""
    tied: bool
    """Whether the LM head is tied to the embedding."""
    total_parameters: int
    active_parameters: int
    """Number of parameters that one token uses; below the total in a mixture of experts."""
    embedding_parameters: int
    head_parameters: int
    """Number of parameters of the LM head; 0 if it is tied."""
    layer_parameters: list[int]


class PlannedDevice(_Record):
    """The devices that the run is planned for."""

    name: str
    count: int
    training_flops: float
    """Rate that training reaches on one device, in FLOP/s: a share of the data sheet's, or measured."""
    measured: bool
    """Whether training was measured on this machine."""
    precision: str
    memory_bytes: int
    price_per_hour: float | None


class Plan(_Record):
    """Parameters, FLOPs, memory, time and cost of a run, and of the same run with other methods."""

    schema_version: int = SCHEMA_VERSION
    model: PlannedModel
    device: PlannedDevice
    run: MethodPlan
    baselines: list[MethodPlan]
    speed_ups: list[SpeedUp]
    """Speed-ups of the run over each baseline."""
    notes: list[str]
    """Assumptions behind the numbers."""
    config: dict[str, Any]
    """The run's configuration."""

    @property
    def methods(self) -> list[MethodPlan]:
        """The run's method and the baselines."""
        return [self.run, *self.baselines]
