"""Estimate FLOPs, time and memory of one phase of a method, and suggest settings with which it fits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from transformers import PretrainedConfig

from elo.checkpoint.footprint import Footprint
from elo.methods import Method, Phase
from elo.methods.base import check_supervision
from elo.plan.activations import saved_activations
from elo.plan.devices import Device, Kind, Precision
from elo.plan.memory import SavedActivations, phase_memory
from elo.plan.schema import FlopsPerToken, Memory, PhasePlan
from elo.train.settings import TrainingSettings

USABLE_MEMORY = 0.95
"""Share of a device's memory that a plan may use; the rest is left for fragmentation."""

_OPTIMIZER_TRAFFIC = {"adamw_bnb_8bit": 28.0, "adafactor": 28.0}
_ADAMW_TRAFFIC = 40.0
"""Bytes read and written per trained parameter and update: weight, clipped gradient and states."""


@dataclass
class Model:
    """A model to plan for: counted without weights, and traced once for each way of training it."""

    config: PretrainedConfig
    whole: Footprint
    vocabulary_rows: int
    """Number of rows of embedding and head in training if `training.vocabulary` is `corpus`."""
    _traced: dict[Any, SavedActivations] = field(default_factory=dict)

    def counted(self, settings: TrainingSettings) -> Footprint:
        """Return the footprint with the vocabulary rows that training computes with."""
        return self.whole if settings.vocabulary == "all" else self.whole.with_vocabulary(self.vocabulary_rows)

    def saved(
        self, method: Method, phase: Phase, layers: Sequence[int], precision: Precision, kind: Kind
    ) -> SavedActivations:
        """Measure what a phase saves for the backward pass if `layers` train at one time."""
        key = (method, phase, tuple(layers), precision, kind)
        if key not in self._traced:
            self._traced[key] = saved_activations(
                self.config, self.whole, method, phase, layers, precision=precision, kind=kind
            )
        return self._traced[key]

    @property
    def is_traced(self) -> bool:
        """Whether all activations are measured rather than estimated by a rule of thumb."""
        return all(saved.traced for saved in self._traced.values())


@dataclass(frozen=True)
class Timing:
    """Measured times of one phase on one device, in seconds."""

    micro_step: float
    """Time of forward and backward of one micro-batch."""
    last_micro_step: float
    """Time of an update's last micro-step, including the optimizer's step."""


@dataclass(frozen=True)
class Machine:
    """The devices to plan for."""

    device: Device
    devices: int
    price_per_hour: float | None
    training_flops: float
    """Rate that training reaches on one device, in FLOP/s."""
    timings: Mapping[Any, Timing] = field(default_factory=dict)
    """Measured times by phase (see `timing_key`)."""

    def precision(self, settings: TrainingSettings) -> Precision:
        """Return the precision of training with these settings."""
        if settings.bf16 == "auto":
            return self.device.precision
        return "bf16" if settings.bf16 else "fp32"

    def holds(self, memory: Memory) -> bool:
        """Return whether one device has enough usable memory for this peak."""
        return memory.peak_bytes <= USABLE_MEMORY * self.device.memory_bytes


def plan_phase(
    model: Model,
    machine: Machine,
    method: Method,
    phase: Phase,
    layers: Sequence[int],
    settings: TrainingSettings,
    *,
    tokens: int,
    sequence_length: int,
) -> PhasePlan:
    """Estimate one phase.

    Args:
        model: model to train.
        machine: devices to plan for.
        method: method of the run.
        phase: phase to estimate.
        layers: decoder layers that the configuration selects.
        settings: settings of the phase.
        tokens: number of tokens that the phase trains on.
        sequence_length: number of tokens in a sequence.

    Raises:
        EloError: `deep_supervision` names layers that the phase cannot supervise.
    """
    counted = model.counted(settings)
    check_supervision(phase, settings, layers, counted.num_layers)
    flops = method.flops_per_token(
        phase,
        counted,
        layers,
        sequence_length,
        activation_checkpointing=settings.activation_checkpointing,
        num_losses=settings.num_losses,
    )
    training = method.layers_at_once(phase, layers, counted.num_layers)
    trainable = counted.trainable(
        phase.middle,
        training,
        lora_rank=method.lora_ranks(phase, counted.num_layers),
        also_train=phase.also_train,
        module=method.module,
    )
    timing = machine.timings.get(timing_key(method, phase, settings))
    if timing is not None:
        micro_batch = settings.per_device_train_batch_size * sequence_length * machine.devices
        earlier = max(0, settings.tokens_per_step // micro_batch - 1)
        seconds_per_token = (earlier * timing.micro_step + timing.last_micro_step) / settings.tokens_per_step
    else:
        seconds_per_token = flops.total / machine.training_flops / machine.devices
        if machine.device.bandwidth is not None:
            updated = trainable / (machine.devices if settings.divides_model else 1)
            traffic = _OPTIMIZER_TRAFFIC.get(settings.optimizer_name, _ADAMW_TRAFFIC)
            seconds_per_token += traffic * updated / machine.device.bandwidth / settings.tokens_per_step
    device_hours = seconds_per_token * tokens * machine.devices / 3600

    def memory(settings: TrainingSettings) -> Memory:
        return _memory(model, machine, method, phase, training, settings, sequence_length)

    needed = memory(settings)
    fits = machine.holds(needed)
    suggestion: list[str] = []
    if not fits:
        for changes in _changes(machine, method, phase, settings):
            if machine.holds(memory(settings.model_copy(update=changes))):
                suggestion = [_setting_text(key, value) for key, value in changes.items()]
                break
    return PhasePlan(
        name=phase.name,
        middle=phase.middle,
        tokens=tokens,
        trainable_parameters=trainable,
        flops_per_token=FlopsPerToken(
            forward=flops.forward,
            backward=flops.backward,
            recompute=flops.recompute,
            head=flops.head,
            total=flops.total,
        ),
        flops=flops.total * tokens,
        seconds=seconds_per_token * tokens,
        measured=timing is not None,
        tokens_per_second=1 / seconds_per_token,
        device_hours=device_hours,
        cost=None if machine.price_per_hour is None else device_hours * machine.price_per_hour,
        memory=needed,
        fits=fits,
        suggestion=suggestion,
    )


def timing_key(method: Method, phase: Phase, settings: TrainingSettings) -> tuple[str, str, bool]:
    """Return the key of a phase in `Machine.timings`."""
    return method.name, phase.name, settings.activation_checkpointing


def _memory(
    model: Model,
    machine: Machine,
    method: Method,
    phase: Phase,
    training: Sequence[int],
    settings: TrainingSettings,
    sequence_length: int,
) -> Memory:
    kind, precision = machine.device.kind, machine.precision(settings)
    saved = model.saved(method, phase, training, precision, kind)
    return phase_memory(
        model.counted(settings),
        saved,
        method,
        phase,
        training,
        settings,
        sequence_length=sequence_length,
        precision=precision,
        kind=kind,
        devices=machine.devices,
        whole=model.whole if settings.vocabulary == "corpus" else None,
    )


def _changes(machine: Machine, method: Method, phase: Phase, settings: TrainingSettings) -> Iterator[dict[str, Any]]:
    """Yield changes that reduce memory: first of one setting, then of two, in order of their cost in speed."""
    single: dict[str, Any] = {}
    if settings.per_device_train_batch_size > 1:
        single["per_device_train_batch_size"] = 1
    if machine.devices > 1 and not settings.divides_model and phase.middle in ("removed", "bridged", "trained"):
        single["training_arguments"] = settings.training_arguments | {"fsdp": True}
    if not settings.activation_checkpointing:
        single["activation_checkpointing"] = True
    if settings.optimizer_name.startswith("adamw_torch") and machine.device.kind == "gpu":
        single["optim"] = "adamw_8bit"
    for number in (1, 2):
        for keys in combinations(single, number):
            divided = settings.divides_model or "training_arguments" in keys
            if not (divided and "optim" in keys):  # the configuration rejects the combination
                yield {key: single[key] for key in keys}


def _setting_text(key: str, value: Any) -> str:
    if key == "training_arguments":
        return "training_arguments: {fsdp: true}"
    return f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
