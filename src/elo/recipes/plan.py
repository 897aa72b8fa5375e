"""`elo plan`: what a run will cost, whether it will fit, and how much faster it is, before anything is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.errors import EloError
from elo.layers import DEFAULT_LAYERS, parse_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from elo.model.devices import Device
    from elo.model.footprint import Footprint
    from elo.model.memory import SavedActivations, StageMemory

DEFAULT_DEVICE = "H100"
UTILISATION = 0.40
"""Share of the data sheet's rate that training reaches; torchtitan reports 33 to 39 % for an 8B model on H100. On this
machine the share is measured with a layer of the model itself."""
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
class _Stage:
    """One training to be planned."""

    name: str
    label: str
    method: Any
    tokens: int
    choices: Choices


@dataclass(frozen=True)
class _Job:
    """What all stages share."""

    counted: "Footprint"
    layers: tuple[int, ...]
    detached: "SavedActivations"
    whole: "SavedActivations"
    device: "Device"
    devices: int
    utilisation: float
    tokens_per_step: int
    price_per_hour: float | None
    lora_rank: int


def plan(
    model: "str | Path | PretrainedConfig",
    *,
    layers: str | Sequence[int] = DEFAULT_LAYERS,
    tokens: int = 1_000_000_000,
    alignment_share: float = 0.1,
    sequence_length: int = 2048,
    per_device_train_batch_size: int = 1,
    alignment_per_device_train_batch_size: int | None = None,
    tokens_per_step: int = 65536,
    device: str | None = None,
    devices: int = 1,
    measure: bool = False,
    optim: str = "adamw",
    alignment_optim: str | None = None,
    activation_checkpointing: bool = False,
    pretraining_activation_checkpointing: bool = False,
    head_loss: str = "auto",
    sharded: bool = False,
    lora_rank: int = 16,
    utilisation: float | None = None,
    price_per_hour: float | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Work out parameters, FLOPs, memory, time, cost and speed-ups of an ELO run from the model's config alone.

    Args:
        model: checkpoint folder, config.json, Hugging Face id, or a config.
        layers: decoder layers that ELO pretraining keeps and trains.
        tokens: training tokens of the whole run; full CPT and LoRA are compared on as many.
        alignment_share: share of them that goes to layer alignment.
        sequence_length: T, tokens of a packed row.
        per_device_train_batch_size: rows in one micro-step of one device.
        alignment_per_device_train_batch_size: the same for layer alignment and the baselines, when it differs.
        tokens_per_step: tokens of an optimizer update over all devices.
        device: a GPU of elo.model.devices.DEVICES; H100 when None.
        devices: how many of them.
        measure: measure this machine for some seconds and plan for it instead of `device`.
        optim: adamw, adamw_8bit or adafactor.
        alignment_optim: the same for layer alignment and the baselines, when it differs.
        activation_checkpointing: in layer alignment and LoRA. Full CPT is planned with and without.
        pretraining_activation_checkpointing: in ELO pretraining.
        head_loss: as in elo.training.losses: auto, plain, chunked, linear_cross_entropy or model.
        sharded: weights, gradients and optimizer states are divided among the devices (FSDP).
        lora_rank: of the LoRA baseline, on every dense matrix of every layer.
        utilisation: share of the device's matrix-product rate that training reaches (0 to 1).
        price_per_hour: of one device, in any currency; without it cost is given in device-hours alone.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        A dictionary ready for JSON: model, parameters, device, settings, stages (elo_pretraining, layer_alignment),
        elo (the whole run), baselines (full, full_recompute, frozen, lora), speed_up, assumptions. FLOPs are counts,
        times seconds, sizes bytes. docs/plan.md explains each.

    Raises:
        EloError: no config there, layers that do not exist, an unknown device or optimizer, or a number out of range.
        UnsupportedArchitectureError: layers of this model cannot be detached.
    """
    for name, number in (
        ("tokens", tokens),
        ("sequence_length", sequence_length),
        ("per_device_train_batch_size", per_device_train_batch_size),
        ("tokens_per_step", tokens_per_step),
        ("devices", devices),
        ("lora_rank", lora_rank),
    ):
        if number < 1:
            raise EloError(f"{name}: got {number}; give a whole number of at least 1")
    if not 0 <= alignment_share < 1:
        raise EloError(f"alignment_share: got {alignment_share}; give a share of the tokens, at least 0 and below 1")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise EloError(f"utilisation: got {utilisation}; give a share of the device's rate, above 0 and at most 1")
    if price_per_hour is not None and not (isfinite(price_per_hour) and price_per_hour >= 0):
        raise EloError(f"price_per_hour: got {price_per_hour}; give the price of one device for an hour, 0 or more")
    if measure and device is not None:
        raise EloError(f"device: got {device!r} together with measure; name a device or measure this machine, not both")

    from elo.model.devices import find_device
    from elo.model.footprint import footprint, read_config
    from elo.model.measure import measure_utilisation
    from elo.model.memory import check_head_loss, check_optimizer, saved_activations
    from elo.model.refusals import require_detachable

    found = _this_machine() if measure else find_device(device or DEFAULT_DEVICE)
    optim, alignment_optim = check_optimizer(optim), check_optimizer(alignment_optim or optim)
    check_head_loss(head_loss)
    if isinstance(model, str | Path):
        config = read_config(model, revision=revision, trust_remote_code=trust_remote_code)
        name = str(model)
    else:
        config, name = model, model.model_type
    require_detachable(config)
    counted = footprint(config)
    chosen = parse_layers(layers, counted.num_layers)
    measured = {
        "layer": chosen[-1],
        "tokens": per_device_train_batch_size * sequence_length,
        "sequence_length": sequence_length,
    }
    job = _Job(
        counted=counted,
        layers=chosen,
        detached=saved_activations(config, counted, chosen, precision=found.precision, kind=found.kind),
        whole=saved_activations(config, counted, precision=found.precision, kind=found.kind),
        device=found,
        devices=devices,
        utilisation=utilisation or (measure_utilisation(config, found, **measured) if measure else UTILISATION),
        tokens_per_step=tokens_per_step,
        price_per_hour=price_per_hour,
        lora_rank=lora_rank,
    )
    aligned = round(tokens * alignment_share)
    detached_choices = Choices(
        per_device_train_batch_size, sequence_length, optim, pretraining_activation_checkpointing, head_loss, sharded
    )
    whole_choices = replace(
        detached_choices,
        per_device_train_batch_size=alignment_per_device_train_batch_size or per_device_train_batch_size,
        optim=alignment_optim,
        activation_checkpointing=activation_checkpointing,
    )
    pretraining = _plan_stage(
        job, _Stage("elo_pretraining", "ELO pretraining", "elo", tokens - aligned, detached_choices)
    )
    alignment = _plan_stage(job, _Stage("layer_alignment", "layer alignment", "full", aligned, whole_choices))
    baselines = {
        stage.name: _plan_stage(job, stage)
        for stage in (
            _Stage("full", "full CPT", "full", tokens, replace(whole_choices, activation_checkpointing=False)),
            _Stage(
                "full_recompute",
                "full CPT, recomputing",
                "full",
                tokens,
                replace(whole_choices, activation_checkpointing=True),
            ),
            _Stage("frozen", "frozen middle", "frozen", tokens, whole_choices),
            _Stage("lora", f"LoRA, rank {lora_rank}", "lora", tokens, whole_choices),
        )
    }
    stages = [pretraining, alignment] if aligned else [pretraining]
    elo = {
        "label": "ELO, whole run",
        "tokens": tokens,
        "flops": sum(stage["flops"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "device_hours": sum(stage["device_hours"] for stage in stages),
        "cost": None if price_per_hour is None else sum(stage["cost"] for stage in stages),
        "peak_memory_bytes": max(stage["memory"]["peak"] for stage in stages),
        "fits": all(stage["memory"]["fits"] for stage in stages),
    }
    return {
        "schema": 1,
        "model": {
            "name": name,
            "model_type": counted.model_type,
            "num_layers": counted.num_layers,
            "layers": list(chosen),
            "tied": counted.tied,
            "hidden_size": counted.hidden_size,
            "vocab_size": counted.vocab_size,
        },
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "embedding": counted.embedding,
            "head": counted.head,
            "norm": counted.norm,
            "other": counted.other,
            "layers": [layer.parameters for layer in counted.layers],
            "detached": counted.detached(chosen).total,
            "trainable": counted.trainable("elo", chosen),
            "lora": counted.lora_parameters(lora_rank),
        },
        "device": {
            "name": found.name,
            "count": devices,
            "matmul_flops": found.matmul_flops,
            "measured": found.measured,
            "precision": found.precision,
            "memory_bytes": found.memory_bytes,
            "bandwidth": found.bandwidth,
            "utilisation": job.utilisation,
            "price_per_hour": price_per_hour,
        },
        "settings": {
            "tokens": tokens,
            "alignment_share": alignment_share,
            "tokens_per_step": tokens_per_step,
            "elo_pretraining": vars(detached_choices),
            "layer_alignment": vars(whole_choices),
        },
        "stages": {stage["name"]: stage for stage in stages},
        "elo": elo,
        "baselines": baselines,
        "speed_up": {
            "elo_pretraining": _speed_ups(pretraining, baselines),
            "whole_run": _speed_ups(elo, baselines),
        },
        "assumptions": _assumptions(job, config, detached_choices, whole_choices),
    }


def _this_machine() -> "Device":
    """This machine as training here would use it."""
    import torch

    from elo.model.devices import measure_matmul_rate
    from elo.training.loop import bf16_pays

    pays = bf16_pays("cuda" if torch.cuda.is_available() else "cpu")
    return measure_matmul_rate(precision="bf16" if pays else "fp32")


def _speed_ups(ours: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over each baseline: of FLOPs and of wall time, on equal tokens."""
    share = ours["tokens"]
    return {
        name: {
            kind: (baseline[kind] / baseline["tokens"]) / (ours[kind] / share) if share else 0.0
            for kind in ("flops", "seconds")
        }
        for name, baseline in baselines.items()
    }


def _plan_stage(job: _Job, stage: _Stage) -> dict[str, Any]:
    choices = stage.choices
    flops = job.counted.flops_per_token(
        stage.method,
        job.layers,
        sequence_length=choices.sequence_length,
        activation_checkpointing=choices.activation_checkpointing,
        lora_rank=job.lora_rank,
    )
    trainable = job.counted.trainable(stage.method, job.layers, lora_rank=job.lora_rank)
    rate = job.device.matmul_flops * job.utilisation * job.devices
    updated = trainable / (job.devices if choices.sharded else 1)
    update_seconds = _OPTIMIZER_TRAFFIC[choices.optim] * updated / job.device.bandwidth
    seconds_per_token = flops.total / rate + update_seconds / job.tokens_per_step
    seconds = seconds_per_token * stage.tokens
    device_hours = seconds * job.devices / 3600
    memory = _memory(job, stage.method, choices)
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


def _memory(job: _Job, method: Any, choices: Choices) -> "StageMemory":
    from elo.model.memory import stage_memory

    tokens = choices.per_device_train_batch_size * choices.sequence_length
    return stage_memory(
        job.counted,
        job.detached if method == "elo" else job.whole,
        method,
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
    )


def _smallest_change(job: _Job, stage: _Stage) -> dict[str, Any]:
    """The fewest settings to change so that the stage fits; failing that, the smallest known device or number of them.

    Returns:
        `set` (key to value), `device` and `devices` (None: as they are), `peak` in bytes, and `text`.
    """
    for count in range(1, 5):
        for changes in combinations(tuple(_changes(job, stage)), count):
            values = {key: value for change in changes for key, value in change.items()}
            if len(values) < count:
                continue
            memory = _memory(job, stage.method, replace(stage.choices, **values))
            if memory.peak <= USABLE_MEMORY * job.device.memory_bytes:
                return _change(values, None, None, memory.peak)
    return _other_devices(job, stage)


def _changes(job: _Job, stage: _Stage) -> Iterator[dict[str, Any]]:
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


def _other_devices(job: _Job, stage: _Stage) -> dict[str, Any]:
    from elo.model.devices import DEVICES

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
            memory = _memory(_moved(job, device, devices), stage.method, replace(choices, **values))
            if memory.peak <= USABLE_MEMORY * device.memory_bytes:
                return _change(_changed(choices, values), device.name, None, memory.peak)
    for devices in (2, 4, 8, 16, 32, 64, 128):
        if devices <= job.devices or job.device.kind == "cpu":
            continue
        values = leanest | {"sharded": True}
        memory = _memory(_moved(job, job.device, devices), stage.method, replace(choices, **values))
        if memory.peak <= USABLE_MEMORY * job.device.memory_bytes:
            return _change(_changed(choices, values), None, devices, memory.peak)
    return {"set": {}, "device": None, "devices": None, "peak": None, "text": "no setting or device known here fits it"}


def _moved(job: _Job, device: "Device", devices: int) -> _Job:
    return replace(job, device=device, devices=devices)


def _changed(choices: Choices, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if getattr(choices, key) != value}


def _change(values: dict[str, Any], device: str | None, devices: int | None, peak: int) -> dict[str, Any]:
    words = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    words += [f"device {device}"] if device else []
    words += [f"{devices} devices"] if devices else []
    text = " and ".join(words) + f" (then {peak / 2**30:.1f} GiB)"
    return {"set": values, "device": device, "devices": devices, "peak": peak, "text": text}


def _assumptions(job: _Job, config: "PretrainedConfig", choices: Choices, alignment: Choices) -> list[str]:
    from elo.model.footprint import text_config

    device = job.device
    source = "measured here" if device.measured else "data sheet, dense"
    notes = [
        f"rate: {device.matmul_flops / 1e12:.3g} TFLOP/s {device.precision} ({source}) x {job.utilisation:.0%} used"
        + (" (measured on one layer of this model)" if device.measured else "")
        + (f" x {job.devices} devices, communication not counted" if job.devices > 1 else ""),
        "time: training alone; prepare, detach, attach, evaluation and checkpoints are not counted",
        "FLOPs: matrix products, attention scores of one causal sequence of sequence_length (half the square)",
        f"memory: fp32 master weights for what trains, {device.precision if device.kind == 'gpu' else 'fp32'} for what "
        "is frozen; "
        f"at most {USABLE_MEMORY:.0%} of the device is planned for",
        "memory of frozen middle and LoRA: their activations are taken to be those of full training, an upper bound",
        f"layer alignment and LoRA {'recompute' if alignment.activation_checkpointing else 'do not recompute'} "
        "activations; full CPT is given both ways",
        f"optimizer: an update every {job.tokens_per_step:,} tokens, bound by memory bandwidth",
    ]
    if job.devices > 1 and not choices.sharded:
        notes.append("devices: each holds the whole model (data parallel)")
    if not (job.whole.traced and job.detached.traced):
        notes.append("activations: this model's modules could not be traced, so they are a rule of thumb (within 50 %)")
    if job.counted.active != job.counted.total:
        notes.append("experts: FLOPs are those of the experts a token is sent to; all of them are in memory and train")
    longest = getattr(text_config(config), "max_position_embeddings", None)
    if isinstance(longest, int) and choices.sequence_length > longest:
        notes.append(
            f"warning: sequence_length {choices.sequence_length} is above the model's max_position_embeddings {longest}"
        )
    if text_config(config) is not config:
        notes.append("multimodal model: the text decoder alone is planned")
    return notes
