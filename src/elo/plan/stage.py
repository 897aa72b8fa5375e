"""One stage of a plan: its FLOPs, time and memory, and the smallest change with which it would fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from elo.plan.devices import DEVICES, Device
from elo.plan.memory import StageMemory, stage_memory
from elo.plan.outline import Outline

USABLE_MEMORY = 0.95
"""Share of a device's memory that can be planned for; the rest goes to the allocator's gaps."""

_OPTIMIZER_TRAFFIC = {"adamw": 40.0, "adamw_8bit": 28.0, "adafactor": 28.0}
"""Bytes to and from memory for one trained parameter and update: weight, clipped gradient, states; read and written."""


@dataclass(frozen=True)
class Choices:
    """What a user can change to make a stage fit."""

    per_device_train_batch_size: int
    sequence_length: int
    optim: str
    activation_checkpointing: bool
    head_loss: str
    sharded: bool


@dataclass(frozen=True)
class Stage:
    """One training to be planned."""

    name: str
    label: str
    method: Any
    """Of elo.checkpoint.footprint."""
    tokens: int
    choices: Choices
    also_train: tuple[str, ...] = ()
    """Parts that train with the layers."""
    bridge: bool = False
    """A linear bridge stands in the gaps of the detached model; a forward-only middle has one of its own."""


@dataclass(frozen=True)
class PlanJob:
    """What all stages share."""

    outline: Outline
    layers: tuple[int, ...]
    device: Device
    devices: int
    utilisation: float
    tokens_per_step: int
    price_per_hour: float | None
    lora_rank: int


def plan_stage(job: PlanJob, stage: Stage) -> dict[str, Any]:
    counted, choices = job.outline.counted, stage.choices
    flops = counted.flops_per_token(
        stage.method,
        job.layers,
        sequence_length=choices.sequence_length,
        activation_checkpointing=choices.activation_checkpointing,
        lora_rank=job.lora_rank,
        also_train=stage.also_train,
    )
    map_flops = 2.0 * counted.bridge_elements(job.layers)
    forward = flops.forward + (map_flops if stage.bridge else 0.0)
    backward = flops.backward + (map_flops if stage.bridge or stage.method == "forward_only" else 0.0)
    flops = replace(flops, forward=forward, backward=backward)
    trainable = counted.trainable(stage.method, job.layers, lora_rank=job.lora_rank, also_train=stage.also_train)
    rate = job.device.matmul_flops * job.utilisation * job.devices
    updated = trainable / (job.devices if choices.sharded else 1)
    update_seconds = _OPTIMIZER_TRAFFIC[choices.optim] * updated / job.device.bandwidth
    seconds_per_token = flops.total / rate + update_seconds / job.tokens_per_step
    seconds = seconds_per_token * stage.tokens
    device_hours = seconds * job.devices / 3600
    memory = _memory(job, stage)
    fits = memory.peak <= USABLE_MEMORY * job.device.memory_bytes
    return {
        "name": stage.name,
        "label": stage.label,
        "tokens": stage.tokens,
        "trainable_parameters": trainable,
        "flops_per_token": {
            "forward": flops.forward,
            "backward": flops.backward,
            "recompute": flops.recompute,
            "head": flops.head,
            "total": flops.total,
        },
        "flops": flops.total * stage.tokens,
        "seconds": seconds,
        "tokens_per_second": 1 / seconds_per_token,
        "tokens_per_hour": 3600 / seconds_per_token,
        "optimizer_share": update_seconds / job.tokens_per_step / seconds_per_token,
        "device_hours": device_hours,
        "cost": None if job.price_per_hour is None else device_hours * job.price_per_hour,
        "memory": {"peak": memory.peak, "moment": memory.moment, "parts": memory.parts, "fits": fits},
        "change": None if fits else _smallest_change(job, stage),
    }


def _memory(job: PlanJob, stage: Stage) -> StageMemory:
    outline, choices = job.outline, stage.choices
    tokens = choices.per_device_train_batch_size * choices.sequence_length
    return stage_memory(
        outline.counted,
        {"elo": outline.kept, "forward_only": outline.kept, "frozen": outline.frozen}.get(stage.method, outline.whole),
        stage.method,
        job.layers,
        tokens=tokens,
        sequence_length=choices.sequence_length,
        precision=job.device.precision,
        kind=job.device.kind,
        optimizer=choices.optim,  # type: ignore[arg-type]
        activation_checkpointing=choices.activation_checkpointing,
        head_loss=choices.head_loss,  # type: ignore[arg-type]
        accumulates=job.tokens_per_step > tokens * job.devices,
        sharded_over=job.devices if choices.sharded else 1,
        lora_rank=job.lora_rank,
        also_train=stage.also_train,
        bridge=stage.bridge,
    )


def _smallest_change(job: PlanJob, stage: Stage) -> dict[str, Any]:
    """The fewest settings to change so that the stage fits; failing that, the smallest known device or number of them.

    Returns:
        `set` (key to value), `device` and `devices` (None: as they are), `peak` in bytes, and `text`.
    """
    for count in range(1, 5):
        for changes in combinations(tuple(_changes(job, stage)), count):
            values = {key: value for change in changes for key, value in change.items()}
            if len(values) < count:
                continue
            memory = _memory(job, _with(stage, values))
            if memory.peak <= USABLE_MEMORY * job.device.memory_bytes:
                return _change(values, None, None, memory.peak)
    return _other_devices(job, stage)


def _changes(job: PlanJob, stage: Stage) -> Iterator[dict[str, Any]]:
    """Single changes, what costs least speed and quality first."""
    choices = stage.choices
    if choices.head_loss in ("plain", "model"):
        yield {"head_loss": "chunked"}
    batch = choices.per_device_train_batch_size
    while batch > 1:
        batch //= 2
        yield {"per_device_train_batch_size": batch}
    if job.devices > 1 and not choices.sharded:
        yield {"sharded": True}
    # The baseline without recomputation is there to be compared: it stays what it is.
    if not choices.activation_checkpointing and stage.name != "full":
        yield {"activation_checkpointing": True}
    if choices.optim == "adamw" and job.device.kind == "gpu":
        yield {"optim": "adamw_8bit"}
    length = choices.sequence_length
    while length > 512:
        length //= 2
        yield {"sequence_length": length}
    if stage.name == "elo_pretraining" and stage.method == "forward_only":
        # Without `alignment: none` a full one would follow, which needs far more than what does not fit already.
        yield {"stand_in": "bridge", "alignment": "none"}


def _with(stage: Stage, values: dict[str, Any]) -> Stage:
    if values.get("stand_in") == "bridge":
        stage = replace(stage, method="elo", bridge=True)
    choices = {key: value for key, value in values.items() if key not in ("stand_in", "alignment")}
    return replace(stage, choices=replace(stage.choices, **choices))


def _other_devices(job: PlanJob, stage: Stage) -> dict[str, Any]:
    choices = stage.choices
    lean: dict[str, Any] = {"per_device_train_batch_size": 1}
    if choices.head_loss in ("plain", "model"):
        lean["head_loss"] = "chunked"
    checkpointed = lean | ({} if stage.name == "full" else {"activation_checkpointing": True})
    leanest = checkpointed | ({"optim": "adamw_8bit"} if choices.optim == "adamw" else {})
    options: list[tuple[dict[str, Any], int]] = [(each, job.devices) for each in ({}, lean, checkpointed, leanest)]
    larger = sorted(DEVICES.values(), key=lambda device: device.memory_bytes)
    for values, devices in options:
        for device in larger:
            if device.memory_bytes <= job.device.memory_bytes:
                continue
            memory = _memory(_moved(job, device, devices), _with(stage, values))
            if memory.peak <= USABLE_MEMORY * device.memory_bytes:
                return _change(_changed(choices, values), device.name, None, memory.peak)
    for devices in (2, 4, 8, 16, 32, 64, 128):
        if devices <= job.devices or job.device.kind == "cpu":
            continue
        values = leanest | {"sharded": True}
        memory = _memory(_moved(job, job.device, devices), _with(stage, values))
        if memory.peak <= USABLE_MEMORY * job.device.memory_bytes:
            return _change(_changed(choices, values), None, devices, memory.peak)
    return {"set": {}, "device": None, "devices": None, "peak": None, "text": "no setting or device known here fits it"}


def _moved(job: PlanJob, device: Device, devices: int) -> PlanJob:
    return replace(job, device=device, devices=devices)


def _changed(choices: Choices, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if getattr(choices, key) != value}


def _change(values: dict[str, Any], device: str | None, devices: int | None, peak: int) -> dict[str, Any]:
    words = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    words += [f"device {device}"] if device else []
    words += [f"{devices} devices"] if devices else []
    text = " and ".join(words) + f" (then {peak / 2**30:.1f} GiB)"
    return {"set": values, "device": device, "devices": devices, "peak": peak, "text": text}
