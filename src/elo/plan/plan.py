"""`elo plan`: what a run will cost, whether it will fit, and how much faster it is, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from elo.checkpoint.layers import DEFAULT_LAYERS, parse_layers
from elo.errors import EloError
from elo.methods.phases import Phase, elo_phases
from elo.plan.devices import Device, find_device
from elo.plan.memory import check_head_loss, check_optimizer
from elo.plan.outline import draw_outline, keep_outline, kept_outline, outline_place
from elo.plan.stage import USABLE_MEMORY, Choices, PlanJob, Stage, plan_stage
from elo.train.settings import EloOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_DEVICE = "H100"
UTILISATION = 0.40
"""Share of the data sheet's rate that training reaches; torchtitan reports 33 to 39 % for an 8B model on H100. On this
machine the share is measured with a layer of the model itself."""


def plan(
    model: "str | Path | PretrainedConfig",
    *,
    layers: str | Sequence[int] = DEFAULT_LAYERS,
    stand_in: str = "forward_only",
    also_train: Sequence[str] = ("embedding", "head"),
    alignment: str = "auto",
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
    head_loss: str = "chunked",
    sharded: bool = False,
    lora_rank: int = 16,
    utilisation: float | None = None,
    price_per_hour: float | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Work out parameters, FLOPs, memory, time, cost and speed-ups of an ELO run from the model's config alone.

    What is counted of a model on this disk is kept for its next plan, in $ELO_CACHE or ~/.cache/elo (docs/plan.md).

    Args:
        model: checkpoint folder, config.json, Hugging Face id, or a config.
        layers: decoder layers that ELO pretraining keeps and trains.
        stand_in: what stands for the middle in ELO pretraining, as in elo.train.settings: forward_only, bridge or
            none (as published).
        also_train: parts that train with the layers, in the frozen baseline too: embedding, norm, head; none of them
            in the published method.
        alignment: what layer alignment trains: full, forward_only or none; auto is none after a forward-only middle
            and full otherwise.
        tokens: training tokens of the whole run; full CPT and LoRA are compared on as many.
        alignment_share: share of them that goes to layer alignment, if there is one.
        sequence_length: T, tokens of a packed row.
        per_device_train_batch_size: rows in one micro-step of one device.
        alignment_per_device_train_batch_size: the same for layer alignment and the baselines, when it differs.
        tokens_per_step: tokens of an optimizer update over all devices.
        device: a GPU of elo.plan.devices.DEVICES; H100 when None.
        devices: how many of them.
        measure: measure this machine for some seconds and plan for it instead of `device`.
        optim: adamw, adamw_8bit or adafactor.
        alignment_optim: the same for layer alignment and the baselines, when it differs.
        activation_checkpointing: in layer alignment and LoRA. Full CPT is planned with and without.
        pretraining_activation_checkpointing: in ELO pretraining.
        head_loss: as in elo.train.loss: chunked, plain, linear_cross_entropy or model.
        sharded: weights, gradients and optimizer states are divided among the devices (FSDP).
        lora_rank: of the LoRA baseline, on every dense matrix of every layer.
        utilisation: share of the device's matrix-product rate that training reaches (0 to 1).
        price_per_hour: of one device, in any currency; without it cost is given in device-hours alone.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow the checkpoint's own Python code to define the model.

    Returns:
        A dictionary ready for JSON: model, parameters, device, settings, stages (elo_pretraining, and layer_alignment
        if there is one), elo (the whole run), baselines (full, full_recompute, frozen, lora), speed_up, assumptions.
        FLOPs are counts, times seconds, sizes bytes. docs/plan.md explains each.

    Raises:
        EloError: no config there, layers that do not exist, an unknown device, optimizer or option, or a number out of
            range.
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

    options = _options(stand_in, also_train, alignment)
    found = _this_machine() if measure else find_device(device or DEFAULT_DEVICE)
    optim, alignment_optim = check_optimizer(optim), check_optimizer(alignment_optim or optim)
    check_head_loss(head_loss)
    asked: dict[str, Any] = {
        "layers": layers,
        "also_train": options.also_train,
        "precision": found.precision,
        "kind": found.kind,
    }
    place = outline_place(model, **asked) if isinstance(model, str | Path) and not trust_remote_code else None
    # What measures this machine needs the config, torch and transformers in any case.
    outline = kept_outline(place) if place is not None and not measure else None
    if outline is None:
        from elo.checkpoint.counting import read_config

        if isinstance(model, str | Path):
            config = read_config(model, revision=revision, trust_remote_code=trust_remote_code)
        else:
            config = model
        outline = draw_outline(config, **asked)
        if place is not None:
            keep_outline(outline, place)
    counted = outline.counted
    chosen = parse_layers(layers, counted.num_layers)
    if measure:
        from elo.plan.measure import measure_utilisation

        utilisation = utilisation or measure_utilisation(
            config,
            found,
            layer=chosen[-1],
            tokens=per_device_train_batch_size * sequence_length,
            sequence_length=sequence_length,
        )
    job = PlanJob(
        outline=outline,
        layers=chosen,
        device=found,
        devices=devices,
        utilisation=utilisation or UTILISATION,
        tokens_per_step=tokens_per_step,
        price_per_hour=price_per_hour,
        lora_rank=lora_rank,
    )
    phases = elo_phases(options)
    if len(phases) == 1:
        alignment_share = 0.0
    aligned = round(tokens * alignment_share)
    pretraining_choices = Choices(
        per_device_train_batch_size, sequence_length, optim, pretraining_activation_checkpointing, head_loss, sharded
    )
    whole_choices = replace(
        pretraining_choices,
        per_device_train_batch_size=alignment_per_device_train_batch_size or per_device_train_batch_size,
        optim=alignment_optim,
        activation_checkpointing=activation_checkpointing,
    )
    planned = [
        plan_stage(
            job,
            _stage(
                phase,
                options,
                aligned if phase.rows == "alignment" else tokens - aligned,
                pretraining_choices if phase.settings == "elo_pretraining" else whole_choices,
            ),
        )
        for phase in phases
    ]
    pretraining = planned[0]
    baselines = {
        stage.name: plan_stage(job, stage)
        for stage in (
            Stage("full", "full CPT", "full", tokens, replace(whole_choices, activation_checkpointing=False)),
            Stage(
                "full_recompute",
                "full CPT, recomputing",
                "full",
                tokens,
                replace(whole_choices, activation_checkpointing=True),
            ),
            Stage("frozen", "frozen middle", "frozen", tokens, whole_choices, options.also_train),
            Stage("lora", f"LoRA, rank {lora_rank}", "lora", tokens, whole_choices),
        )
    }
    stages = planned if aligned else planned[:1]
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
            "name": str(model) if isinstance(model, str | Path) else model.model_type,
            "model_type": counted.model_type,
            "num_layers": counted.num_layers,
            "layers": list(chosen),
            "tied": counted.tied,
            "hidden_size": counted.hidden_size,
            "vocab_size": counted.vocab_size,
        },
        "parameters": {
            **counted.parameters(),
            "detached": counted.detached(chosen).total,
            "trainable": pretraining["trainable_parameters"],
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
            "stand_in": options.stand_in,
            "also_train": list(options.also_train),
            "alignment": options.alignment,
            "alignment_share": alignment_share,
            "tokens_per_step": tokens_per_step,
            "elo_pretraining": vars(pretraining_choices),
            "layer_alignment": vars(whole_choices),
        },
        "stages": {stage["name"]: stage for stage in stages},
        "elo": elo,
        "baselines": baselines,
        "speed_up": {
            "elo_pretraining": _speed_ups(pretraining, baselines),
            "whole_run": _speed_ups(elo, baselines),
        },
        "assumptions": _assumptions(job, options, pretraining_choices, whole_choices, aligned > 0),
    }


def _options(stand_in: str, also_train: Sequence[str], alignment: str) -> EloOptions:
    """The options of section `elo`, checked.

    Raises:
        EloError: one of them is unknown.
    """
    try:
        return EloOptions(stand_in=stand_in, also_train=tuple(also_train), alignment=alignment)
    except ValidationError as error:
        first = error.errors()[0]
        raise EloError(f"{first['loc'][0]}: got {first['input']!r}; {first['msg']}") from None


_MIDDLES: dict[str, tuple[str, str]] = {
    "absent": ("elo", "detached"),
    "bridge": ("elo", "bridge"),
    "forward_only": ("forward_only", "forward-only"),
    "computed": ("full", ""),
}
"""What a phase does with the middle: the method that counts it, and how its label says it."""


def _stage(phase: Phase, options: EloOptions, tokens: int, choices: Choices) -> Stage:
    method, how = _MIDDLES[phase.middle]
    label = {"elo_pretraining": "ELO pretraining", "layer_alignment": "layer alignment"}[phase.name]
    return Stage(
        phase.name,
        f"{label}, {how}" if how else label,
        method,
        tokens,
        choices,
        options.also_train if method != "full" else (),
        bridge=phase.middle == "bridge",
    )


def _this_machine() -> Device:
    """This machine as training here would use it."""
    import torch

    from elo.plan.devices import measure_matmul_rate
    from elo.train.loop import bf16_pays

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


def _assumptions(
    job: PlanJob,
    options: EloOptions,
    choices: Choices,
    alignment: Choices,
    aligned: bool,
) -> list[str]:
    device, outline = job.device, job.outline
    source = "measured here" if device.measured else "data sheet, dense"
    middle = {
        "none": "the kept layers are joined end to end",
        "bridge": "a linear map stands in each gap",
        "forward_only": "the whole model is in memory, and the other layers are computed without a graph",
    }
    with_them = ", ".join(options.also_train)
    whole = "layer alignment and LoRA" if aligned else "LoRA"
    recompute = "recomputed" if alignment.activation_checkpointing else "not recomputed"
    notes = [
        f"ELO pretraining (stand_in: {options.stand_in}): {middle[options.stand_in]}; "
        + (f"{with_them} train with the layers" if with_them else "all but the layers is frozen")
        + ("" if options.stand_in == "none" else "; fitting the bridge is not counted"),
        f"rate: {device.matmul_flops / 1e12:.3g} TFLOP/s {device.precision} ({source}) x {job.utilisation:.0%} used"
        + (" (measured on one layer of this model)" if device.measured else "")
        + (f" x {job.devices} devices, communication not counted" if job.devices > 1 else ""),
        "time: training alone; prepare, detach, attach, evaluation and checkpoints are not counted",
        "FLOPs: matrix products, attention scores of one causal sequence of sequence_length (half the square)",
        f"memory: fp32 master weights for what trains, {device.precision if device.kind == 'gpu' else 'fp32'} for what "
        "is frozen; "
        f"at most {USABLE_MEMORY:.0%} of the device is planned for",
        "memory of LoRA: its activations are taken to be those of full training, an upper bound",
        f"activations of {whole} are {recompute}; full CPT is given both ways",
        f"optimizer: an update every {job.tokens_per_step:,} tokens, bound by memory bandwidth",
    ]
    if job.devices > 1 and not choices.sharded:
        notes.append("devices: each holds the whole model (data parallel)")
    if not (all(each.traced for each in (outline.kept, outline.frozen, outline.whole))):
        notes.append("activations: this model's modules could not be traced, so they are a rule of thumb (within 50 %)")
    if outline.counted.active != outline.counted.total:
        notes.append("experts: FLOPs are those of the experts a token is sent to; all of them are in memory and train")
    longest = outline.longest
    if longest is not None and choices.sequence_length > longest:
        notes.append(
            f"warning: sequence_length {choices.sequence_length} is above the model's max_position_embeddings {longest}"
        )
    if outline.multimodal:
        notes.append("multimodal model: the text decoder alone is planned")
    return notes
