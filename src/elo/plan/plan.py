"""Estimate the cost of a run, whether it fits, and its speed-up over other methods, without loading weights."""

import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from elo.budget import divide_sequences
from elo.checkpoint.counting import footprint, read_config
from elo.checkpoint.footprint import Footprint
from elo.checkpoint.layers import assumed_layers, parse_auto
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.refusals import require_detachable
from elo.config import RunConfig, load_config
from elo.data.shards import PreparedData
from elo.errors import EloError, UnfinishedError
from elo.methods import METHODS
from elo.plan.devices import find_device, this_machine
from elo.plan.measure import measure_phases
from elo.plan.memory import OPTIMIZER_BYTES
from elo.plan.phase import USABLE_MEMORY, Machine, Model, plan_phase
from elo.plan.schema import MethodPlan, Plan, PlannedDevice, PlannedModel, SpeedUp
from elo.store.files import read_json, read_record
from elo.train.settings import check_also_train
from elo.train.vocabulary_cut import choose_rows

DEFAULT_DEVICE = "H100"
DEFAULT_TOKENS = 1_000_000_000
COMMON_METHODS = ("elo", "elo_paper", "frozen", "lisa", "full")
"""Methods compared with the default method when a model is planned without the name of a method."""
DEFAULT_BASELINES = ("full", "lora")
_COUNTED_TOKENS = 1 << 27  # counting the vocabulary rows of this text takes seconds
UTILISATION = 0.40
"""Assumed share of the data sheet's rate that training reaches. torchtitan reports 33 to 39 % (8B model, H100)."""


def plan(
    config: RunConfig | str | Path | dict[str, Any],
    *,
    device: str | None = None,
    devices: int = 1,
    measure: bool = False,
    price_per_hour: float | None = None,
    vocabulary_rows: int | None = None,
    compare_with: Sequence[str] = DEFAULT_BASELINES,
) -> Plan:
    """Estimate parameters, FLOPs, memory, time and cost of a run, and of the same run with other methods.

    Args:
        config: configuration of a run (object, YAML file or dict), or a model (checkpoint folder, config.json or hub
            id) for a run with default settings.
        device: name of a GPU in elo.plan.devices.DEVICES; None means H100.
        devices: number of devices.
        measure: train each phase for a few updates on this machine, and plan for this machine instead of a `device`.
        price_per_hour: price of one device per hour, in any currency.
        vocabulary_rows: number of rows of embedding and head under `training.vocabulary: corpus`. By default, the
            number that the run folder records, or that its prepared text uses, otherwise all rows.
        compare_with: methods to compare with, with their default settings.

    Raises:
        EloError: the configuration is wrong, there is no such model, device or method, or a number is out of range.
        UnsupportedArchitectureError: layers of this model cannot be detached.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config) if isinstance(config, dict) else planned_run(config)
    if devices < 1:
        raise EloError(f"devices: got {devices}; write a whole number of at least 1")
    if price_per_hour is not None and not (isfinite(price_per_hour) and price_per_hour >= 0):
        raise EloError(f"price_per_hour: got {price_per_hour}; write the price of one device for an hour, 0 or more")
    if measure and device is not None:
        raise EloError(f"device: got {device!r} together with measure; name a device or measure this machine")
    unknown = [name for name in compare_with if name not in METHODS]
    if unknown:
        raise EloError(f"compare_with: there is no method {unknown[0]!r}; choose among {', '.join(METHODS)}")
    found = this_machine() if measure else find_device(device or DEFAULT_DEVICE)

    others = [
        config.model_copy(update={"method": METHODS[name].model_validate({"name": name})}) for name in compare_with
    ]
    model_config = read_config(config.model, trust_remote_code=config.trust_remote_code)
    if any(phase.detached for each in (config, *others) for phase in each.method.phases):
        require_detachable(model_config)
    counted = footprint(model_config, trust_remote_code=config.trust_remote_code)
    uses_layers = any(each.method.uses_layers for each in (config, *others))
    layers = assumed_layers(config.layers, counted.num_layers) if uses_layers else ()
    notes: list[str] = []
    if uses_layers and parse_auto(config.layers):
        notes.append(f"layers: {config.layers}: a probe will choose; the plan assumes layers evenly spaced over depth")
    if config.method.probe_criterion:
        notes.append("method.profile: probe: a probe will decide the ranks; the plan assumes u_shaped")
    rows = _vocabulary_rows(config, counted, vocabulary_rows, notes)
    model = Model(model_config, counted, rows)
    total = config.tokens or DEFAULT_TOKENS
    if config.tokens is None:
        notes.append(f"tokens: null means one pass over the target languages; the plan assumes {total:,}")
    runs: list[tuple[RunConfig, dict[str, str]]] = [(config, {})]
    for other in others:
        if other.method.name != config.method.name:
            runs.append((other, {}))
        if other.method.name == "full":
            runs += _full_recomputing(other)

    def planned() -> list[MethodPlan]:
        return [_plan_method(model, machine, each, layers, total).model_copy(update=name) for each, name in runs]

    machine = Machine(found, devices, price_per_hour, training_flops=UTILISATION * (found.matmul_flops or 1.0))
    methods = planned()
    if measure:
        machine = measure_phases(model, machine, layers, [each for each, _ in runs], methods)
        methods = planned()
    run, *baselines = methods
    return Plan(
        model=PlannedModel(
            name=config.model,
            model_type=counted.model_type,
            layers=list(layers),
            num_layers=counted.num_layers,
            hidden_size=counted.hidden_size,
            vocab_size=counted.vocab_size,
            vocabulary_rows=rows,
            tied=counted.tied,
            total_parameters=counted.total,
            active_parameters=counted.active,
            embedding_parameters=counted.embedding,
            head_parameters=counted.head,
            layer_parameters=[layer.parameters for layer in counted.layers],
        ),
        device=PlannedDevice(
            name=machine.device.name,
            count=devices,
            training_flops=machine.training_flops,
            measured=measure,
            precision=machine.device.precision,
            memory_bytes=machine.device.memory_bytes,
            price_per_hour=price_per_hour,
        ),
        run=run,
        baselines=baselines,
        speed_ups=[
            SpeedUp(over=other.name, flops=other.flops / run.flops, seconds=other.seconds / run.seconds)
            for other in baselines
        ],
        notes=notes + _notes(model, machine, config, methods),
        config=config.model_dump(mode="json"),
    )


def planned_run(
    source: str | Path,
    overrides: Sequence[str] | None = None,
    *,
    method: str | None = None,
    tokens: float | None = None,
) -> RunConfig:
    """Return the configuration of the run that `elo plan SOURCE` plans.

    Args:
        source: a run's YAML file, or a model, for a run with default settings.
        overrides: overrides of the form `key.path=value`, as for `elo run`.
        method: name of the method; None keeps the configuration's.
        tokens: token budget; None keeps the configuration's.

    Raises:
        EloError: the configuration cannot be read, or a key or value is wrong.
    """
    if tokens is not None and not (isfinite(tokens) and tokens >= 1):
        raise EloError(f"--tokens: got {tokens:g}; write a number of training tokens, such as 1e9")
    changes = [*(overrides or [])]
    changes += [] if method is None else [f"method={method}"]
    changes += [] if tokens is None else [f"tokens={tokens!r}"]
    if is_configuration(source):
        return load_config(source, changes)
    nowhere = os.devnull  # the plan never reads the run folder or the corpora
    defaults: dict[str, Any] = {
        "model": str(source),
        "output": nowhere,
        "tokens": DEFAULT_TOKENS,
        "data": {"target": "target", "source": "source", "corpora": {"target": nowhere, "source": nowhere}},
    }
    return load_config(defaults, changes)


def is_configuration(source: str | Path) -> bool:
    """Return whether `source` is a run's YAML file rather than a model."""
    return str(source).endswith((".yaml", ".yml"))


def _plan_method(model: Model, machine: Machine, config: RunConfig, layers: Sequence[int], total: int) -> MethodPlan:
    method, length = config.method, config.data.sequence_length
    for phase in method.phases:
        check_also_train(phase.also_train, tied=model.whole.tied)
    pretraining, alignment = divide_sequences(config, total // length)
    sequences = {"pretraining": pretraining, "alignment": alignment, "all": pretraining + alignment}
    phases = [
        plan_phase(
            model,
            machine,
            method,
            phase,
            layers,
            config.settings(phase),
            tokens=sequences[phase.portion] * length,
            sequence_length=length,
        )
        for phase in method.phases
    ]
    return MethodPlan(name=method.name, label=method.label, phases=phases)


def _full_recomputing(full: RunConfig) -> list[tuple[RunConfig, dict[str, str]]]:
    """Return full CPT (continual pretraining) with activation checkpointing, and its name in the plan.

    The list is empty if full CPT already has activation checkpointing.
    """
    (phase,) = full.method.phases
    if full.settings(phase).activation_checkpointing:
        return []
    changed = full.training.phases.get(phase.name, {}) | {"activation_checkpointing": True}
    training = full.training.model_copy(update={"phases": {phase.name: changed}})
    name = {"name": "full_recomputing", "label": f"{full.method.label}, recomputing"}
    return [(full.model_copy(update={"training": training}), name)]


def _vocabulary_rows(config: RunConfig, counted: Footprint, requested: int | None, notes: list[str]) -> int:
    cut = [phase for phase in config.method.phases if config.settings(phase).vocabulary == "corpus"]
    if requested is not None:
        if not cut:
            raise EloError("vocabulary_rows: training.vocabulary is all; write training.vocabulary: corpus too")
        if not 1 <= requested <= counted.vocab_size:
            raise EloError(
                f"vocabulary_rows: got {requested}; write a number from 1 to the model's {counted.vocab_size}"
            )
        return requested
    for phase in cut:
        record = Path(config.output) / "stages" / f"vocabulary-{phase.name}.json"
        if record.is_file():
            return int(read_json(record)["record"]["rows"])
    data = _prepared(config) if cut else None
    if data is not None:
        sample, trust = config.settings(cut[0]).vocabulary_sample, config.trust_remote_code
        return len(choose_rows(data, config.model, sample=sample, seed=config.seed, trust_remote_code=trust))
    if cut:
        notes.append(
            "vocabulary: corpus: the run has not counted its vocabulary rows yet, so the plan assumes all rows; "
            "set another number with --vocabulary-rows"
        )
    return counted.vocab_size


def _prepared(config: RunConfig) -> PreparedData | None:
    """Return the run folder's prepared data, if it was made for this configuration and is quickly counted.

    Changed files of a corpus are not noticed: their identities need the checkpoint, which a plan does not fetch.
    """
    folder, now = Path(config.output), config.model_dump(mode="json")
    if not (folder / "stages" / "prepared.json").is_file():
        return None
    of = read_record(folder / "config.json", "model", "tokenizer", "data")
    if of is None:
        return None
    keys = {"corpora", "heldout", "filters", *config.data.decisive()}
    same = all(of[key] == now[key] for key in ("model", "tokenizer"))
    if not same or any(of["data"].get(key) != now["data"][key] for key in keys):
        return None
    try:
        data = PreparedData.open(folder / "prepared")
    except UnfinishedError:
        return None
    num_tokens = sum(corpus.num_tokens for language in data.languages for corpus in data.train(language))
    return data if num_tokens <= _COUNTED_TOKENS else None


def _notes(model: Model, machine: Machine, config: RunConfig, methods: Sequence[MethodPlan]) -> list[str]:
    """Return the assumptions behind the numbers."""
    device, length = machine.device, config.data.sequence_length
    settings = [config.settings(phase) for phase in config.method.phases]
    frozen = "fp32" if device.kind == "cpu" else device.precision
    if device.matmul_flops is None:
        rate = f"measured here in {device.precision}, by training each phase for a few updates with random weights"
    else:
        rate = (
            f"{device.matmul_flops / 1e12:.3g} TFLOP/s {device.precision} (data sheet, dense), of which training "
            f"reaches {UTILISATION:.0%} (assumed)"
        )
    notes = [
        f"rate: {rate}",
        "time: training only, without preparation, surgery, bridge fitting, scale search, evaluation and checkpoints",
        "FLOPs: matrix products and attention scores of one causal sequence",
        f"memory: trained weights in fp32, frozen weights in {frozen}; the plan uses at most {USABLE_MEMORY:.0%} of a "
        "device",
    ]
    guessed = [each.label for each in methods if not all(phase.measured for phase in each.phases)]
    if machine.timings and guessed:
        notes.append(
            f"rate: {', '.join(guessed)} could not be measured on one device; times are estimated from FLOPs, at the "
            f"{machine.training_flops / 1e12:.3g} TFLOP/s of what was measured"
        )
    if machine.devices > 1:
        notes.append("devices: communication is not counted")
        if not all(each.divides_model for each in settings):
            notes.append("devices: each holds the whole model; training_arguments: {fsdp: true} shards it")
    for each in settings:
        micro = length * each.per_device_train_batch_size * machine.devices
        if each.tokens_per_step % micro:
            notes.append(f"warning: tokens_per_step must be a multiple of {micro:,} on these devices")
            break
    for name in dict.fromkeys(each.optimizer_name for each in settings if each.optimizer_name not in OPTIMIZER_BYTES):
        notes.append(f"optim: memory and traffic of {name} are assumed to be those of AdamW")
    if not machine.timings and any(machine.precision(each) != device.precision for each in settings):
        notes.append(f"bf16: the plan uses the rate of {device.precision}, although training uses another precision")
    if config.method.needs_new_rows:
        notes.append("embedding_rows: new: the plan assumes that all rows train, an upper bound")
    if not model.is_traced:
        notes.append("activations: estimated by a rule of thumb (within 50 %), since this model cannot be traced")
    if model.whole.active != model.whole.total:
        notes.append("experts: FLOPs count only the experts that a token is sent to; memory counts all experts")
    longest = getattr(text_config_of(model.config), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        notes.append(f"warning: sequence_length {length} is above the model's max_position_embeddings {longest}")
    if text_config_of(model.config) is not model.config:
        notes.append("multimodal model: the plan covers the text decoder only")
    return notes
