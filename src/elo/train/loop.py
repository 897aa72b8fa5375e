"""Train a model on packed sequences, in one phase."""

import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device, set_seed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from elo.checkpoint.architecture import layers_of
from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError, StoppedBySignalError, TrainingDivergedError
from elo.evaluate.bits_per_byte import isolates_documents
from elo.evaluate.scoring import evaluating, takes_position_ids
from elo.log import Progress
from elo.store.processes import from_main, is_main
from elo.train.arguments import accelerating, micro_steps_per_step, sequences_per_step, training_arguments, wants_bf16
from elo.train.attention import VARLEN, choose_attention, require_own_positions
from elo.train.batches import PackedCollator, micro_batches
from elo.train.checkpoints import latest_checkpoint, read_checkpoint, step_of, write_checkpoint
from elo.train.distributed import (
    accumulating,
    check_resumable,
    divide_groups,
    launch_kept,
    leave_out_frozen,
    whole_parts,
)
from elo.train.embedding_rows import keep_old_rows, keep_old_rows_in_flat, rows_left_out
from elo.train.loss import install_head_loss
from elo.train.optimizer import forget_overrides, make_optimizer, make_schedule
from elo.train.peak_memory import peak_memory_bytes, reset_peak_memory
from elo.train.prepared import Prepared
from elo.train.record import Record
from elo.train.settings import TrainingSettings

Evaluate = Callable[[PreTrainedModel], dict[str, Any]]
"""Measure a model during training: {"bpb": {language: bits per byte}, "measures": records of other values}."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a phase.

    Attributes:
        seconds: wall time of training, in seconds, across restarts, without evaluation and checkpoints.
        cpu_seconds: CPU time of this process in that time, in seconds, summed over cores.
        tokens: number of trained positions, including padding in unpacked sequences.
        losses: {"tokens", "seconds", "loss"} by logging interval, with the loss in nats per token; with deep
            supervision, "internal" is the loss by layer.
        evaluations: {"tokens", "seconds"} and what `evaluate` returned, by measurement.
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


@launch_kept()
def train(
    model: PreTrainedModel,
    rows: Dataset,
    *,
    settings: TrainingSettings,
    output_dir: Path | None,
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
            of `sequences_per_step`.
        output_dir: folder for training checkpoints. Training resumes from the newest complete one in it. None writes no
            checkpoints.
        prepared: hooks of the method that prepared `model`. The caller calls `fold`.
        evaluate: function that measures the model.
        save: function called in the main process with the trained model. If FSDP or DeepSpeed shards the weights, it
            also gets an iterator over them, part by part, which it must exhaust.
        main_alone: whether only the main process has the weights (elo.train.distributed.main_alone_loads).
        label: label of the progress lines; None shows no progress.

    Raises:
        EloError: the sequences are packed but the model does not keep packed documents apart.
        TrainingDivergedError: the loss is not finite, or it rose and stayed high.
        StoppedBySignalError: SIGTERM or SIGINT arrived; a checkpoint has been written.
    """
    prepared = prepared or Prepared()
    sequence_length = len(rows[0]["input_ids"])
    per_step = sequences_per_step(sequence_length, settings)
    micro_steps = micro_steps_per_step(sequence_length, settings)
    steps, tokens_per_step = len(rows) // per_step, per_step * sequence_length  # type: ignore[arg-type]
    evaluations = settings.evaluations if evaluate is not None else 0
    evaluation_steps = -(-steps // evaluations) if evaluations else 0
    found = None
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        found = from_main(lambda: latest_checkpoint(output_dir, lambda line: print(line, flush=True)))
    checkpoint, done, state = (found[0], step_of(found[0]), found[1]) if found else (None, 0, {})
    record = Record(tokens_per_step, **state)

    arguments = training_arguments(
        settings,
        micro_steps,
        output_dir,
        main_alone=main_alone,
        changes_layers=prepared.before_step is not None,
    )

    supervised: dict[int, float] = {}
    if settings.deep_supervision:
        supervised = settings.deep_supervision.weight_by_layer(len(layers_of(model)))
    reset_peak_memory()
    with (
        accelerating(settings, arguments) as accelerator,
        _fitted(model, rows, settings, prepared, supervised, accelerator.device) as attention,
        _StopOnSignal() as stop,
        Progress(steps * tokens_per_step, label if is_main() else None, "tokens", done * tokens_per_step) as progress,
    ):
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trainable -= rows_left_out(model, prepared.first_row) if prepared.first_row else 0
        if checkpoint is not None:
            check_resumable(accelerator, checkpoint)
        set_seed(seed)
        if settings.activation_checkpointing:
            model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        divided = by_deepspeed or accelerator.is_fsdp2
        optimizer = make_optimizer(model, settings, arguments, 0 if divided else prepared.first_row)
        in_parts = by_deepspeed and (prepared.before_step is not None or prepared.first_row > 0)
        owners = divide_groups(optimizer, model) if in_parts else []
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        forget: Callable[[nn.Parameter], Any] = lambda each: optimizer.optimizer.state.pop(each, None)  # noqa: E731
        if owners:
            forget = leave_out_frozen(optimizer.optimizer.optimizer, owners)
            if prepared.first_row:
                keep_old_rows_in_flat(optimizer.optimizer.optimizer, owners, model, prepared.first_row)
        drop_old_gradients: Callable[[], None] = lambda: None  # noqa: E731
        if accelerator.is_fsdp2 and prepared.first_row:
            drop_old_gradients = keep_old_rows(optimizer.optimizer, model, prepared.first_row)
        schedule = accelerator.prepare_scheduler(make_schedule(optimizer, settings, steps))
        collator = PackedCollator(varlen=attention == VARLEN, position_ids=takes_position_ids(model))
        batches = micro_batches(rows, collator, arguments, accelerator, first_row=done * per_step)
        if checkpoint is not None:
            if prepared.before_step is not None:
                prepared.before_step(done - 1, forget)  # FSDP reads the states of what trained then
            read_checkpoint(accelerator, checkpoint)  # last, because it restores the random generators
        scaling = {"scale_wrt_gas": False} if by_deepspeed else {}  # the loss is scaled here
        loss_sum, logged = torch.zeros(settings.num_losses, device=accelerator.device), done
        note, progress.curves = "", {"losses": record.losses, "evaluations": record.evaluations}
        wrapped.train()
        optimizer.train()
        record.resume_clock()

        for step in range(done + 1, steps + 1):
            if prepared.before_step is not None:
                prepared.before_step(step - 1, forget)
            micro_batches_of_step = list(itertools.islice(batches, micro_steps))
            targets = sum((batch["shift_labels"] != IGNORE_INDEX).sum() for batch in micro_batches_of_step)
            targets = accelerator.reduce(targets.to(accelerator.device))
            for index, batch in enumerate(micro_batches_of_step):
                with accumulating(accelerator, wrapped, last=index == micro_steps - 1):
                    losses = wrapped(**send_to_device(batch, accelerator.device))  # summed over this micro-batch
                    # Gradients are averaged over processes, but the targets are those of all processes.
                    accelerator.backward(losses.loss * (accelerator.num_processes / targets), **scaling)
                loss_sum += losses.nats * (accelerator.num_processes / targets)
            drop_old_gradients()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm or math.inf)
            optimizer.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            wrapped.zero_grad()

            # Read once: a signal that arrives later in this step stops the next one, so every stop has a checkpoint.
            stopped_by = stop.agree(accelerator)
            evaluates = bool(evaluation_steps) and (step % evaluation_steps == 0 or step == steps)
            saves = step % settings.save_steps == 0 or step == steps or stopped_by is not None
            if evaluates or saves:
                record.pause_clock()
            # A logged loss is the mean since the last one. It must not span a checkpoint, where a resumed run starts.
            if saves or step == 1 or step % settings.logging_steps == 0:
                mean, *means = (accelerator.reduce(loss_sum, "mean") / (step - logged)).tolist()
                internal = dict(zip(supervised, means, strict=True))
                gradient = float(norm.full_tensor() if isinstance(norm, DTensor) else norm or 0.0)
                loss_sum, logged, note = torch.zeros_like(loss_sum), step, f"loss {mean:.3f}"
                values = {"loss": mean, "grad_norm": gradient, "learning_rate": rate}
                values |= {f"loss_layer_{layer}": value for layer, value in internal.items()}
                values |= record.add_loss(step, mean, internal)
                accelerator.log(_named("train", values), step)
                if fault := record.fault(gradient, settings.max_loss_spike_nats):
                    raise _diverged(fault, step, tokens_per_step, output_dir)
            progress.update(step * tokens_per_step, note)
            if evaluates:
                assert evaluate is not None
                measured = _measure(evaluate, model, optimizer)
                bpb = measured["bpb"]
                values = {f"bpb_{language}": value for language, value in bpb.items()}
                for each in measured.get("measures", ()):
                    values["_".join(filter(None, (each["measure"], each["name"], each["language"])))] = each["value"]
                values |= record.add_evaluation(step, measured)
                accelerator.log(_named("eval", values), step)
                shown = ", ".join(f"{language} {value:.4f}" for language, value in bpb.items())
                progress.say(f"{label}: {step * tokens_per_step:,} tokens, bits per byte: {shown}")
            if saves and output_dir is not None:
                write_checkpoint(accelerator, output_dir, step, record.state(), settings.save_total_limit)
            if stopped_by is not None:
                raise StoppedBySignalError(stopped_by, step)
            if evaluates or saves:
                record.resume_clock()

        record.pause_clock()
        if (stopped_by := stop.agree(accelerator)) is not None:  # during the last step, whose checkpoint is written
            raise StoppedBySignalError(stopped_by, steps)
        optimizer.eval()
    if save is not None:
        parts = whole_parts(model) if settings.divides_model else None
        if is_main():
            save(model, parts)
        for _ in parts or ():
            pass  # gathering a part is collective, so every process must iterate
    return TrainingResult(
        steps=steps,
        tokens=steps * tokens_per_step,
        peak_memory_bytes=peak_memory_bytes(),
        trainable_parameters=trainable,
        attention=attention,
        **record.state(),
    )


@contextmanager
def _fitted(
    model: PreTrainedModel,
    rows: Dataset,
    settings: TrainingSettings,
    prepared: Prepared,
    supervised: Mapping[int, float],
    device: torch.device,
) -> Iterator[str]:
    """Move a model to its device and install the head loss and the attention of the settings.

    Yields the name of the attention. Afterwards the model has its original forward and attention.
    """
    # A model that FSDP or DeepSpeed shards may not fit on one GPU; they move it there in parts.
    if not settings.divides_model:
        model.to(device)  # type: ignore[arg-type]
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
    restore_forward = install_head_loss(
        model, settings.head_loss, autocast_dtype, prepared.first_row, supervised, prepared.supervised_output
    )
    try:
        requested = settings.attn_implementation
        if requested == "auto" and torch.cuda.is_available() and settings.divides_model:
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
    except torch.OutOfMemoryError as error:
        raise EloError(
            f"out of GPU memory: {str(error).splitlines()[0]} Lower per_device_train_batch_size, set "
            "activation_checkpointing: true or set optim: adamw_8bit; `elo plan` estimates the memory"
        ) from None
    finally:
        forget_overrides()
        restore_forward()
        # accelerate skips a model that it prepared before, so a second training would run without autocast.
        vars(model).pop("_is_accelerate_prepared", None)
        if model.config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention or "eager")


def _require_isolation(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> None:
    with evaluating(model, None, autocast_dtype) as device:
        # Under FSDP only rank 0 has weights at this point.
        if from_main(lambda: isolates_documents(model, device)):
            return
    raise EloError(
        f"data.packing: {model.config.model_type} does not keep packed documents apart here (it has layers other than "
        f"attention, takes no position ids, or its attention {model.config._attn_implementation!r} ignores them); "
        "write data.packing: false, or attn_implementation: auto"
    )


def _measure(evaluate: Evaluate, model: PreTrainedModel, optimizer: Any) -> dict[str, Any]:
    model.eval()
    optimizer.eval()
    # Evaluation batches have other shapes, for which compilation would cost more than it saves.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        measured = evaluate(model)
    model.train()
    optimizer.train()
    return measured


def _named(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return values under the names that trackers show."""
    return {f"{part}/{key}": value for key, value in values.items()}


def _diverged(fault: str, step: int, tokens_per_step: int, folder: Path | None) -> TrainingDivergedError:
    sealed = sorted(folder.glob("checkpoint-*"), key=step_of) if folder else []
    kept = f"the last good checkpoint is {sealed[-1]}" if sealed else "no checkpoint has been written yet"
    return TrainingDivergedError(
        f"training diverged at step {step} ({step * tokens_per_step:,} tokens): {fault}; {kept}. "
        "Lower learning_rate or raise warmup_steps (the phase then restarts), and check the data at that step"
    )


class _StopOnSignal:
    """Note SIGTERM or SIGINT, so that training stops after the step. A second signal stops immediately."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                self._previous[each] = signal.signal(each, self._note)
        except ValueError:
            pass  # not in the main thread, where Python does not allow signal handlers
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def agree(self, accelerator: Accelerator) -> int | None:
        """Return the signal that any process has received, so that all stop at the same step."""
        if accelerator.num_processes == 1:
            return self.number
        number = torch.tensor([self.number or 0], device=accelerator.device)
        return int(accelerator.gather(number).max()) or None

    def _note(self, number: int, _: Any) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
