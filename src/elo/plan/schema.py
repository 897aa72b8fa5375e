"""The plan's schema: `elo plan` writes it as JSON and `elo.plan.table` renders it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from elo.checkpoint.footprint import Middle

SCHEMA_VERSION = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Memory(_Record):
    """Peak memory of one device."""

    peak_bytes: int
    moment: str
    """Moment of an update at which the peak is reached."""
    parts: dict[str, int]
    """Bytes by part at that moment; they add up to the peak."""


class FlopsPerToken(_Record):
    """Matrix-product FLOPs of one trained token."""

    forward: float
    backward: float
    recompute: float
    """Forward computed again by activation checkpointing."""
    head: float
    """Part of forward and backward that is the LM head's."""
    total: float


class PhasePlan(_Record):
    """One phase of a method."""

    name: str
    middle: Middle
    """What becomes of the layers that are not chosen to train."""
    tokens: int
    trainable_parameters: int
    """Parameters that have gradients and optimizer states at one time."""
    flops_per_token: FlopsPerToken
    flops: float
    seconds: float
    tokens_per_second: float
    optimizer_share: float
    """Share of the time that the optimizer takes."""
    device_hours: float
    cost: float | None
    """Device hours times the price of one; null without a price."""
    memory: Memory
    fits: bool
    """Whether the peak is within the share of the device's memory that is planned for."""
    suggestion: list[str]
    """Settings with which a phase that does not fit would fit; empty where the plan knows none."""


class MethodPlan(_Record):
    """A method as a whole."""

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
        """Of the phase that needs most."""
        return max(phase.memory.peak_bytes for phase in self.phases)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)


class SpeedUp(_Record):
    """How many times the baseline costs what the run costs, for the same token budget."""

    over: str
    """Name of the baseline."""
    flops: float
    seconds: float


class PlannedModel(_Record):
    """The base model, as its config describes it."""

    name: str
    model_type: str
    layers: list[int]
    """Decoder layers that the configuration chooses, 0-based."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    vocabulary_rows: int
    """Rows of embedding and LM head that training computes with."""
    tied: bool
    """Whether the LM head is the embedding."""
    total_parameters: int
    active_parameters: int
    """Parameters that one token uses; fewer than the total in a mixture of experts."""
    embedding_parameters: int
    head_parameters: int
    """0 where the head is tied."""
    layer_parameters: list[int]


class PlannedDevice(_Record):
    """What the run is planned for."""

    name: str
    count: int
    matmul_flops: float
    """FLOP/s of matrix products, of one device."""
    measured: bool
    """Measured here, rather than taken from the data sheet."""
    precision: str
    memory_bytes: int
    bandwidth: float
    """Bytes per second to and from memory."""
    utilisation: float
    """Share of `matmul_flops` that training reaches."""
    price_per_hour: float | None


class Plan(_Record):
    """Parameters, FLOPs, memory, time and cost of a run, and of the same run by other methods."""

    schema_version: int = SCHEMA_VERSION
    model: PlannedModel
    device: PlannedDevice
    run: MethodPlan
    baselines: list[MethodPlan]
    speed_ups: list[SpeedUp]
    """Of the run over each baseline."""
    notes: list[str]
    """What the numbers assume."""
    config: dict[str, Any]
    """The run's configuration."""

    @property
    def methods(self) -> list[MethodPlan]:
        """The run's method and the baselines."""
        return [self.run, *self.baselines]
