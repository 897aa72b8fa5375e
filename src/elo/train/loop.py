"""Train a model on packed sequences, in one phase."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from elo.checkpoint.architecture import layers_of
from elo.errors import EloError, StoppedBySignalError
from elo.evaluate.bits_per_byte import isolates_documents
from elo.evaluate.scoring import evaluating, takes_position_ids
from elo.log import Progress
from elo.store.processes import from_main, is_main, world_size
from elo.train.attention import VARLEN, choose_attention, require_own_positions
from elo.train.checkpoints import latest_checkpoint
from elo.train.distributed import (
    check_fsdp,
    check_sharding,
    fsdp_arguments,
    launch_kept,
    set_precision,
    whole_parts,
)
from elo.train.embedding_rows import rows_left_out
from elo.train.loss import install_head_loss
from elo.train.peak_memory import peak_memory_bytes, reset_peak_memory
from elo.train.prepared import Prepared
from elo.train.settings import TrainingSettings
from elo.train.trainer import EloTrainer, Evaluate, PackedCollator

_SET_HERE = {
    "output_dir", "max_steps", "num_train_epochs", "gradient_accumulation_steps", "gradient_checkpointing", "use_cpu",
    "fp16", "logging_first_step", "logging_nan_inf_filter", "save_strategy", "eval_strategy", "eval_steps", "seed",
    "data_seed", "disable_tqdm", "remove_unused_columns", "torch_compile", "full_determinism", "auto_find_batch_size",
    "resume_from_checkpoint", "ignore_data_skip", "train_sampling_strategy", "label_smoothing_factor",
}  # fmt: skip
# Other processes wait in a collective while the main process reads weights and writes checkpoints, for hours if the
# model is large.
_LAUNCH = {"ddp_find_unused_parameters": False, "ddp_timeout": 4 * 3600}


@dataclass(frozen=True)
class TrainingResult:
    """The result of a phase.

    Attributes:
        seconds: wall time of training, in seconds, across restarts, without evaluation and checkpoints.
        cpu_seconds: CPU time of this process in that time, in seconds, summed over cores.
        tokens: number of trained positions, including padding in unpacked sequences.
        losses: {"tokens", "seconds", "loss"} by logging interval, with the loss in nats per token.
        evaluations: {"tokens", "seconds", "bpb": {language: bits per byte}} by measurement.
    """

    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    attention: str
    losses: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def rows_per_step(sequence_length: int, settings: TrainingSettings) -> int:
    """Return the number of sequences per update, which is a whole number of micro-steps on every process.

    Raises:
        EloError: `tokens_per_step` is not a multiple of the tokens in one micro-step.
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


@launch_kept()
def train(
    model: PreTrainedModel,
    rows: Dataset,
    *,
    settings: TrainingSettings,
    output_dir: Path,
    seed: int,
    prepared: Prepared | None = None,
    evaluate: Evaluate | None = None,
    save: Callable[[PreTrainedModel, Iterator[dict[str, torch.Tensor]] | None], None] | None = None,
    main_alone: bool = False,
    label: str | None = None,
) -> TrainingResult:
    """Train the parameters of `model` that require gradients, in place, in one pass over `rows` in order.

    Args:
        model: model whose trained parameters are fp32; frozen parameters may have any floating-point dtype.
        rows: map-style dataset of sequences (elo.data.packing) of one length, packed or not. Their number is a multiple
            of `rows_per_step`.
        output_dir: folder for training checkpoints. Training resumes from the newest complete one in it.
        prepared: hooks of the method that prepared `model`. The caller calls `fold`.
        evaluate: function that returns bits per byte of a model by language.
        save: function called in the main process with the trained model. If FSDP or DeepSpeed shards the weights, it
            also gets an iterator over them, part by part, which it must exhaust.
        main_alone: whether only the main process has the weights (elo.train.distributed.main_alone_loads).
        label: label of the progress lines; None shows no progress.

    Raises:
        EloError: the sequences are packed but the model does not keep packed documents apart, or only new vocabulary
            rows train but FSDP or DeepSpeed shards the embedding.
        TrainingDivergedError: the loss is not finite, or it rose and stayed high.
        StoppedBySignalError: SIGTERM or SIGINT arrived; a checkpoint has been written.
    """
    prepared = prepared or Prepared()
    sequence_length = len(rows[0]["input_ids"])
    per_step = rows_per_step(sequence_length, settings)
    steps = len(rows) // per_step  # type: ignore[arg-type]
    tokens_per_step = per_step * sequence_length
    output_dir.mkdir(parents=True, exist_ok=True)
    found = from_main(lambda: latest_checkpoint(output_dir, lambda line: print(line, flush=True)))
    checkpoint, state = found if found else (None, {"seconds": 0.0, "cpu_seconds": 0.0})

    reset_peak_memory()
    stop = _StopOnSignal()
    shown = label if is_main() else None
    with (
        _fitted(model, rows, settings, prepared.first_row) as attention,
        Progress(steps * tokens_per_step, shown, "tokens", done=_step(checkpoint) * tokens_per_step) as progress,
    ):
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trainable -= rows_left_out(model, prepared.first_row) if prepared.first_row else 0
        trainer = EloTrainer(
            model=model,
            args=_arguments(
                settings,
                per_step,
                steps,
                output_dir,
                seed,
                main_alone=main_alone,
                evaluating=evaluate is not None,
            ),
            train_dataset=rows,
            eval_dataset=rows,  # required by Trainer; EloTrainer.evaluate uses held-out text instead
            data_collator=PackedCollator(varlen=attention == VARLEN, position_ids=takes_position_ids(model)),
            callbacks=[_Report(progress, tokens_per_step), stop, _BeforeStep(prepared.before_step)],
            tokens_per_step=tokens_per_step,
            evaluate_bits_per_byte=evaluate,
            loss_spike=settings.max_loss_spike_nats,
            keep_checkpoints=settings.save_total_limit,
            seconds=state["seconds"],
            cpu_seconds=state["cpu_seconds"],
            embedding_learning_rate=settings.embedding_learning_rate,
            first_row=prepared.first_row,
        )
        trainer.remove_callback(PrinterCallback)  # _Report shows the progress
        check_sharding(trainer, settings, checkpoint)
        with stop.listening():
            trainer.resume_clock()
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except torch.OutOfMemoryError as error:
                raise EloError(
                    f"out of GPU memory: {str(error).splitlines()[0]} Lower per_device_train_batch_size, set "
                    "activation_checkpointing: true or set optim: adamw_8bit; `elo plan` estimates the memory"
                ) from None
            finally:
                if settings.optimizer_name == "adamw_bnb_8bit":
                    _forget_overrides()
            trainer.pause_clock()
    if stop.number is not None:
        raise StoppedBySignalError(stop.number, trainer.state.global_step)
    if save is not None:
        divided = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        parts = whole_parts(model) if divided else None
        if is_main():
            save(model, parts)
        for _ in parts or ():
            pass  # gathering a part is collective, so every process must iterate
    return TrainingResult(
        steps=steps,
        tokens=steps * tokens_per_step,
        seconds=trainer.seconds,
        cpu_seconds=trainer.cpu_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        trainable_parameters=trainable,
        attention=attention,
        **_curves(trainer.state.log_history),
    )


@contextmanager
def _fitted(model: PreTrainedModel, rows: Dataset, settings: TrainingSettings, first_row: int) -> Iterator[str]:
    """Move a model to its device and install the head loss and the attention of the settings.

    Yields the name of the attention. Afterwards the model has its original forward and attention.
    """
    # A model that FSDP or DeepSpeed shards may not fit on one GPU; they move it there in parts.
    on_gpu = torch.cuda.is_available() and not settings.divides_model
    if on_gpu:
        model.to("cuda")  # type: ignore[arg-type]
    packed = "attention_mask" not in rows[0]
    require_own_positions(
        model.config,
        len(rows[0]["input_ids"]),
        packed=packed,
        batch_size=settings.per_device_train_batch_size,
    )
    autocast_dtype = torch.bfloat16 if wants_bf16(settings) else None
    own_attention = model.config._attn_implementation
    if packed:
        _require_isolation(model, autocast_dtype)
    restore_forward = install_head_loss(model, settings.head_loss, autocast_dtype, first_row)
    try:
        requested = settings.attn_implementation
        if requested == "auto" and torch.cuda.is_available() and not on_gpu:
            requested = own_attention or "eager"  # no other can be tried, since the model is not on the GPU yet
        attention = "model's own"
        if packed:
            attention = choose_attention(model, len(rows[0]["input_ids"]), requested, autocast_dtype)
        if packed and attention not in (VARLEN, "sdpa"):
            _require_isolation(model, autocast_dtype)  # again, with the attention of the settings
        if settings.torch_compile:
            for layer in layers_of(model):
                layer.compile()
        yield attention
    finally:
        restore_forward()
        # accelerate skips a model that it prepared before, so a second training would run without autocast.
        vars(model).pop("_is_accelerate_prepared", None)
        if model.config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention or "eager")


def _arguments(
    settings: TrainingSettings,
    per_step: int,
    steps: int,
    output_dir: Path,
    seed: int,
    *,
    main_alone: bool = False,
    evaluating: bool = False,
) -> TrainingArguments:
    warmup = settings.warmup_steps
    evaluations = settings.evaluations if evaluating else 0
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=round(warmup * steps) if warmup < 1 else int(warmup),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer_name,
        optim_args=",".join(f"{key}={value}" for key, value in settings.optim_args.items()) or None,
        lr_scheduler_kwargs=settings.lr_scheduler_kwargs or None,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=per_step // (settings.per_device_train_batch_size * world_size()),
        activation_checkpointing=settings.activation_checkpointing,
        bf16=wants_bf16(settings),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=None,  # EloTrainer removes old checkpoints after the newest is sealed
        eval_strategy="steps" if evaluations else "no",
        eval_steps=max(1, -(-steps // evaluations)) if evaluations else None,
        seed=seed,
        data_seed=seed,
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=settings.dataloader_num_workers,
        **(_LAUNCH | fsdp_arguments(settings.training_arguments, main_alone=main_alone)),
    )
    set_precision(arguments)
    arguments._n_gpu = min(1, arguments.n_gpu)  # without a launcher, several GPUs would mean nn.DataParallel
    return arguments


@launch_kept()
def check_settings(settings: TrainingSettings, sequence_length: int, section: str) -> None:
    """Check the settings of a phase before any work starts.

    Raises:
        EloError: `tokens_per_step` is not divisible, an optimizer or tracker is not installed, or `training_arguments`
            has a key that transformers does not have or that ELO sets.
    """
    try:
        rows_per_step(sequence_length, settings)
        if settings.optimizer_name == "adamw_bnb_8bit":
            _require_bitsandbytes()
    except EloError as error:
        raise EloError(f"{section}.{error}") from None
    reporters = [settings.report_to] if isinstance(settings.report_to, str) else settings.report_to
    try:
        for reporter in get_reporting_integration_callbacks([name for name in reporters if name != "none"]):
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise EloError(f"{section}.report_to: {error}") from None
    known = set(TrainingArguments.__dataclass_fields__)
    for key in settings.training_arguments:
        if "token" in key.lower().split("_"):  # records and the report contain the configuration
            raise EloError(
                f"{section}.training_arguments: {key!r} is a secret and must not be in a configuration; "
                "log in with `hf auth login`, or set HF_TOKEN in the environment"
            )
        if key not in known:
            raise EloError(f"{section}.training_arguments: transformers.TrainingArguments has no {key!r}; remove it")
        if key in _SET_HERE or key in TrainingSettings.model_fields:
            raise EloError(
                f"{section}.training_arguments: ELO sets {key!r} from the configuration; "
                f"use the keys of {section} instead (docs/configuration.md)"
            )
    try:
        _arguments(settings, rows_per_step(sequence_length, settings), 1, Path(), 0)
        check_fsdp(settings)
    except EloError as error:
        raise EloError(f"{section}.{error}") from None
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise EloError(f"{section}: transformers rejects these training arguments: {error}") from None


def _any_process(number: int | None) -> int | None:
    """Return the signal that any process has received, so that all stop at the same step."""
    if world_size() == 1:
        return number
    seen = torch.tensor([number or 0])
    if torch.cuda.is_available():
        seen = seen.cuda()
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    return int(seen) or None


def _require_isolation(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> None:
    with evaluating(model, None, autocast_dtype) as device:
        # Under FSDP only rank 0 has weights at this point.
        if from_main(lambda: takes_position_ids(model) and isolates_documents(model, device)):
            return
    raise EloError(
        f"data.packing: {model.config.model_type} does not keep packed documents apart here (it has layers other than "
        f"attention, takes no position ids, or its attention {model.config._attn_implementation!r} ignores them); "
        "write data.packing: false, or attn_implementation: auto"
    )


class _Report(TrainerCallback):
    """Show tokens, rate, remaining time, the last loss and the last bits per byte."""

    def __init__(self, progress: Progress, tokens_per_step: int) -> None:
        self.progress, self.tokens_per_step = progress, tokens_per_step
        self.note = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(state.global_step * self.tokens_per_step, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.progress.curves = _curves(state.log_history)
        if "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}"
        measured = {key.removeprefix("eval_bpb_"): value for key, value in logs.items() if key.startswith("eval_bpb_")}
        if measured:
            shown = ", ".join(f"{language} {value:.4f}" for language, value in measured.items())
            self.progress.say(f"{self.progress.label}: {logs['tokens']:,} tokens, bits per byte: {shown}")


class _BeforeStep(TrainerCallback):
    """Call a method's `before_step`."""

    def __init__(self, call: Callable[[int, Any], None] | None) -> None:
        self.call = call

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.call is not None:
            self.call(state.global_step, getattr(optimizer, "optimizer", optimizer))


class _StopOnSignal(TrainerCallback):
    """Finish the step, write a checkpoint and stop on SIGTERM or SIGINT. A second signal stops immediately."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous: dict[signal.Signals, Any] = {}

        def note(number: int, _: Any) -> None:
            if self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                previous[each] = signal.signal(each, note)
        except ValueError:
            pass  # not in the main thread, where Python does not allow signal handlers
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = _any_process(self.number)
        if self.number is not None:
            control.should_save = True
            control.should_training_stop = True


def _curves(history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return losses and measurements so far."""
    return {
        "losses": [_point(entry) | {"loss": entry["loss"]} for entry in history if "loss" in entry],
        "evaluations": [
            _point(entry)
            | {"bpb": {k.removeprefix("eval_bpb_"): v for k, v in entry.items() if k.startswith("eval_bpb_")}}
            for entry in history
            if any(key.startswith("eval_bpb_") for key in entry)
        ],
    }


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": int(entry["tokens"]), "seconds": entry["seconds"]}


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def _forget_overrides() -> None:
    """Reset bitsandbytes' list of parameters with 32-bit optimizer state.

    bitsandbytes keeps the list for the whole process, by position in the optimizer. Without a reset, the next phase
    would have 32-bit state for the parameters at these positions, but a resumed run would not.
    """
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise EloError(
            "optim: adamw_8bit needs bitsandbytes, which is not installed; "
            "run pip install 'elo-cpt[adamw8bit]', or write optim: adamw"
        ) from None
