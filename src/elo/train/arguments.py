"""Translate the training settings to arguments of transformers and accelerate, and check them before any work."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    LoggerType,
)
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from elo.errors import EloError
from elo.store.processes import world_size
from elo.train.distributed import (
    check_deepspeed,
    check_engaged,
    check_fsdp,
    launch_kept,
    set_precision,
    sharding_arguments,
)
from elo.train.optimizer import require_bitsandbytes
from elo.train.settings import PASSED_ARGUMENTS, TrainingSettings

# The other processes wait in a collective while the main process reads weights and writes checkpoints, which can take
# hours for a large model.
_DDP_TIMEOUT_S = 4 * 3600


def sequences_per_step(sequence_length: int, settings: TrainingSettings) -> int:
    """Return the number of sequences per update, over all processes.

    Raises:
        EloError: `tokens_per_step` is not a multiple of the tokens in one micro-step of all processes.
    """
    micro = sequence_length * settings.per_device_train_batch_size * world_size()
    if settings.tokens_per_step % micro:
        nearest = max(1, round(settings.tokens_per_step / micro)) * micro
        raise EloError(
            f"tokens_per_step: {settings.tokens_per_step} is not a multiple of sequence_length x "
            f"per_device_train_batch_size x processes = {sequence_length} x {settings.per_device_train_batch_size} x "
            f"{world_size()} = {micro}; write for example tokens_per_step: {nearest}"
        )
    return settings.tokens_per_step // sequence_length


def micro_steps_per_step(sequence_length: int, settings: TrainingSettings) -> int:
    """Return the number of micro-steps per update. Raises EloError like `sequences_per_step`."""
    return sequences_per_step(sequence_length, settings) // (settings.per_device_train_batch_size * world_size())


def bf16_pays(device_type: str) -> bool:
    """Return whether this machine multiplies bf16 matrices in hardware."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    cpu = torch.cpu
    return device_type == "cpu" and bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def wants_bf16(settings: TrainingSettings) -> bool:
    """Return whether a phase with these settings runs under bf16 autocast on this machine."""
    if settings.bf16 != "auto":
        return bool(settings.bf16)
    return bf16_pays("cuda" if torch.cuda.is_available() else "cpu")


def training_arguments(
    settings: TrainingSettings,
    micro_steps: int,
    folder: Path | None = None,
    *,
    main_alone: bool = False,
    changes_layers: bool = False,
) -> TrainingArguments:
    """Return transformers' training arguments for the settings: devices, optimizer, FSDP and DeepSpeed.

    Args:
        micro_steps: number of micro-steps per update.
        folder: folder of the training checkpoints; None writes no checkpoints.
        main_alone: whether only the main process has the weights.
        changes_layers: whether the set of trained layers changes between updates, so that DDP must look for parameters
            without a gradient.

    Raises:
        EloError: `training_arguments.fsdp_config` is not a mapping.
    """
    launch = {"ddp_find_unused_parameters": changes_layers, "ddp_timeout": _DDP_TIMEOUT_S}
    arguments = TrainingArguments(
        output_dir=str(folder or "none"),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer_name,
        optim_args=",".join(f"{key}={value}" for key, value in settings.optim_args.items()) or None,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=micro_steps,
        bf16=wants_bf16(settings),
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=settings.dataloader_num_workers,
        **(launch | sharding_arguments(settings.training_arguments, main_alone=main_alone)),
    )
    set_precision(arguments)
    return arguments


def make_accelerator(settings: TrainingSettings, arguments: TrainingArguments) -> Accelerator:
    """Return the accelerator of a phase.

    Raises:
        EloError: accelerate does not shard the weights in the way that the settings ask for.
    """
    folder = Path(str(arguments.output_dir))
    ddp = {
        "find_unused_parameters": arguments.ddp_find_unused_parameters,
        "bucket_cap_mb": arguments.ddp_bucket_cap_mb,
        "broadcast_buffers": arguments.ddp_broadcast_buffers,
        "static_graph": arguments.ddp_static_graph,
    }
    fsdp, deepspeed = arguments.fsdp_plugin_args, arguments.deepspeed_plugin
    accelerator = Accelerator(
        device_placement=False,  # the loop moves a model once, because the optimizer may have views of its weights
        mixed_precision=arguments.mixed_precision,
        cpu=arguments.use_cpu and deepspeed is None,  # with cpu=True, accelerate trains without DeepSpeed
        deepspeed_plugin=deepspeed,
        fsdp_plugin=None if fsdp is None else FullyShardedDataParallelPlugin(**fsdp),
        kwargs_handlers=[DistributedDataParallelKwargs(**{k: v for k, v in ddp.items() if v is not None})],
        # Only DeepSpeed reads the number; the loop normalises the loss itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1 if deepspeed is None else arguments.gradient_accumulation_steps
        ),
        step_scheduler_with_optimizer=False,
        log_with=_trackers(settings) or None,
        project_dir=str(folder.with_name("trackers") / folder.name.removesuffix("-checkpoints")),
    )
    # Otherwise transformers would also shard models that a single process builds later, such as for a report, and hang.
    unset_hf_deepspeed_config()
    check_engaged(accelerator, settings)
    return accelerator


@contextmanager
def accelerating(settings: TrainingSettings, arguments: TrainingArguments) -> Iterator[Accelerator]:
    """Yield the accelerator of a phase with its trackers, and close the trackers on exit."""
    accelerator = make_accelerator(settings, arguments)
    if accelerator.log_with:
        name = str(arguments.run_name or Path(str(arguments.output_dir)).parent.name)
        simple = {key: value for key, value in settings.model_dump().items() if isinstance(value, int | float | str)}
        named = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "elo"), simple, named)
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@launch_kept()
def check_settings(settings: TrainingSettings, sequence_length: int, section: str) -> None:
    """Check the settings of a phase before any work starts.

    Raises:
        EloError: `tokens_per_step` is not divisible, an optimizer or tracker is not installed, `training_arguments` has
            a key that transformers does not have or that ELO does not pass on, or transformers rejects a value.
    """
    try:
        steps = micro_steps_per_step(sequence_length, settings)
        if settings.optimizer_name == "adamw_bnb_8bit":
            require_bitsandbytes()
        _check_trackers(_trackers(settings))
        _check_training_arguments(settings.training_arguments)
        check_deepspeed(training_arguments(settings, steps))
        check_fsdp(settings)
    except EloError as error:
        raise EloError(f"{section}.{error}") from None
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise EloError(f"{section}: transformers rejects these training arguments: {error}") from None


@launch_kept()
def check_sharding(settings: TrainingSettings, sequence_length: int) -> None:
    """Check that accelerate shards the weights in this launch in the way that a phase's settings ask for.

    Raises:
        EloError: it does not.
    """
    make_accelerator(settings, training_arguments(settings, micro_steps_per_step(sequence_length, settings)))


def _trackers(settings: TrainingSettings) -> list[str]:
    names = [settings.report_to] if isinstance(settings.report_to, str) else settings.report_to
    return [name for name in names if name != "none"]


def _check_trackers(names: Iterable[str]) -> None:
    known, installed = sorted(map(str, LoggerType)), [*map(str, get_available_trackers()), "all"]
    for name in names:
        if name not in known:
            raise EloError(f"report_to: got {name!r}; write none, or some of {', '.join(known)}")
        if name not in installed:
            raise EloError(f"report_to: {name} is not installed; install its package, or remove it")


def _check_training_arguments(given: dict[str, Any]) -> None:
    for key in given:
        if "token" in key.lower().split("_"):  # records and the report contain the configuration
            raise EloError(
                f"training_arguments: {key!r} is a secret and must not be in a configuration; "
                "log in with `hf auth login`, or set HF_TOKEN in the environment"
            )
        if key not in TrainingArguments.__dataclass_fields__:
            raise EloError(f"training_arguments: transformers.TrainingArguments has no {key!r}; remove it")
        if key not in PASSED_ARGUMENTS:
            raise EloError(
                f"training_arguments: ELO sets {key!r} from its own settings (docs/configuration.md) or does not use "
                f"it; the keys here are {', '.join(sorted(PASSED_ARGUMENTS))}"
            )
