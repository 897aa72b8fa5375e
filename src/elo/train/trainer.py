"""`transformers.Trainer` for packed sequences, with exact order, exact resume, and logs of bits per byte and time.

All other features of Trainer (accelerate, FSDP, DeepSpeed, callbacks, report_to) are unchanged.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer

from elo.data.packing import IGNORE_INDEX
from elo.errors import EloError, TrainingDivergedError
from elo.store.files import disk_errors_told
from elo.train.attention import document_starts
from elo.train.checkpoints import rotate_checkpoints, seal_checkpoint, step_of
from elo.train.cost import cost_so_far
from elo.train.embedding_rows import set_embeddings_apart

Evaluate = Callable[[PreTrainedModel], dict[str, float]]
"""Bits per byte of a model, by language."""


class PackedCollator:
    """Stack sequences; with `varlen`, concatenate them to one and add where each document starts.

    Args:
        varlen: whether the attention is `elo.train.attention.VARLEN`.
        position_ids: whether the model takes position ids; one that does not needs unpacked sequences.
    """

    def __init__(self, *, varlen: bool = False, position_ids: bool = True) -> None:
        self.varlen, self.position_ids = varlen, position_ids

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        keys = [key for key in rows[0] if self.position_ids or key != "position_ids"]
        batch: dict[str, Any] = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in keys}
        if not self.varlen:
            return batch
        boundaries, longest = document_starts(batch["position_ids"])
        flat = {key: value.reshape(1, -1) for key, value in batch.items()}
        # A constant upper bound, so that compiled layers are not compiled again.
        longest = max(longest, len(rows[0]["input_ids"]))
        return flat | {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }


class EloTrainer(Trainer):
    """Train the parameters of `model` that require gradients, on sequences in their given order.

    The model's forward must return the summed loss (elo.train.loss.install_head_loss).

    Args:
        tokens_per_step: tokens per update over all processes, for the records.
        evaluate_bits_per_byte: function called at each evaluation.
        loss_spike: difference to the recent median loss at which training stops, in nats.
        keep_checkpoints: number of sealed checkpoints to keep.
        seconds, cpu_seconds: training time before this process, if it resumes, in seconds.
        embedding_learning_rate: peak rate of embedding and LM head; None is that of the other weights.
        first_row: first row of a trained embedding and head that changes.
    """

    def __init__(
        self,
        *args: Any,
        tokens_per_step: int,
        evaluate_bits_per_byte: Evaluate | None,
        loss_spike: float,
        keep_checkpoints: int,
        seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        embedding_learning_rate: float | None = None,
        first_row: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.embedding_learning_rate = embedding_learning_rate
        self.first_row = first_row
        self.tokens_per_step = tokens_per_step
        self.evaluate_bits_per_byte = evaluate_bits_per_byte
        self.loss_spike = loss_spike
        self.keep_checkpoints = keep_checkpoints
        self.loss_is_scaled_for_ga = True
        self._seconds, self._cpu_seconds = seconds, cpu_seconds
        self._running_since: float | None = None
        self._cpu_since = 0.0
        self._gradient_norm: Any = None

    # Time of training, without evaluation and checkpoints.

    @property
    def seconds(self) -> float:
        """Wall time of training so far, in seconds, across restarts."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds + running

    @property
    def cpu_seconds(self) -> float:
        """CPU time of training so far, in seconds summed over cores, across restarts."""
        running = 0.0 if self._running_since is None else time.process_time() - self._cpu_since
        return self._cpu_seconds + running

    def resume_clock(self) -> None:
        self._running_since, self._cpu_since = time.perf_counter(), time.process_time()

    def pause_clock(self) -> None:
        if torch.cuda.is_available() and self._running_since is not None:
            torch.cuda.synchronize()
        self._cpu_seconds, self._seconds, self._running_since = self.cpu_seconds, self.seconds, None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        pausing = control.should_evaluate or control.should_save
        # A logged loss is the mean since the last log. It must not span a checkpoint, where a resumed run starts over.
        control.should_log |= control.should_save
        if pausing:
            self.pause_clock()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if pausing:
            self.resume_clock()

    # Data, in order, so that resuming needs only the number of consumed sequences.

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        count = sum((batch["shift_labels"] != IGNORE_INDEX).sum() for batch in batch_samples)
        if not isinstance(count, Tensor):
            return None
        count = count.to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-step's part of the update's mean loss, in nats per predicted token."""
        assert num_items_in_batch is not None
        outputs = model(**inputs)
        # Gradients are averaged over processes, but the count is the sum over all of them.
        loss = outputs.loss * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate visits every parameter at every micro-step; elo plan has the exact count

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.first_row and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise EloError(
                "training_arguments: FSDP and DeepSpeed shard the embedding, so new rows cannot train alone "
                "(method.embedding_rows: new, method embeddings_first); remove fsdp and deepspeed"
            )
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made and (self.first_row or self.embedding_learning_rate):
            set_embeddings_apart(
                optimizer, self.model if model is None else model, self.embedding_learning_rate, self.first_row
            )
        return optimizer

    # Records.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        tokens = self.state.global_step * self.tokens_per_step
        cost = cost_so_far(self.seconds, self.cpu_seconds)
        super().log({**logs, "tokens": tokens, "seconds": round(self.seconds, 3), **cost}, start_time)
        if "loss" in logs:
            self._check_loss(logs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return bits per byte by language, as `eval_bpb_<language>`."""
        if self.evaluate_bits_per_byte is None:
            return {}
        model: Any = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        # Evaluation batches have other shapes, for which compilation would cost more than it saves.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            measured = self.evaluate_bits_per_byte(model)
        model.train(training)
        metrics = {f"eval_bpb_{language}": value for language, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Safety.

    def _check_loss(self, logs: dict[str, float]) -> None:
        loss, gradient = logs["loss"], logs.get("grad_norm", 0.0)
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            self._diverged(f"the loss is {loss} and the gradient norm {gradient}")
        history = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        recent, before = history[-3:], history[-23:-3]
        if len(before) >= 5 and min(recent) > statistics.median(before) + self.loss_spike:
            shown = ", ".join(f"{value:.3f}" for value in recent)
            self._diverged(
                f"the last three logged losses ({shown}) are more than {self.loss_spike} nats above the "
                f"recent median {statistics.median(before):.3f} (max_loss_spike_nats)"
            )

    def _diverged(self, what: str) -> None:
        sealed = sorted(Path(str(self.args.output_dir)).glob("checkpoint-*"), key=step_of)
        kept = f"the last good checkpoint is {sealed[-1]}" if sealed else "no checkpoint has been written yet"
        raise TrainingDivergedError(
            f"training diverged at step {self.state.global_step} "
            f"({self.state.global_step * self.tokens_per_step:,} tokens): {what}; {kept}. "
            "Lower learning_rate or raise warmup_steps (the phase then restarts), and check the data at that step"
        )

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._gradient_norm = super()._clip_grad_norm(model)
        return self._gradient_norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Never seal weights after a step with a non-finite loss, which may not be logged yet.
        loss, gradient = float(self._tr_loss), float(0.0 if self._gradient_norm is None else self._gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            self._diverged(f"the loss is {loss} and the gradient norm {gradient}")
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with disk_errors_told(checkpoint):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with disk_errors_told(checkpoint):
                seal_checkpoint(checkpoint, {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds})
            rotate_checkpoints(folder, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()
