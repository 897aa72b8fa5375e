"""Training settings: the section `training` of the configuration, and what `elo.train.loop.train` takes.

Names are transformers' where transformers has one. A field marked as an execution setting says how the work is done,
not what comes out but for rounding: it may change between restarts of the same run.
"""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.config import JsonDict
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from elo.errors import EloError

Part = Literal["embedding", "norm", "head"]
"""A part of a model outside its decoder layers."""
HeadLoss = Literal["chunked", "plain", "linear_cross_entropy", "model"]

CHUNK = {"gpu": 2048, "cpu": 256}
"""Tokens that the chunked head loss takes at a time: 256 x 8192 x 4 bytes = 8 MiB of logits stay in a CPU's last-level
cache; a GPU wants larger chunks."""
EXECUTION: JsonDict = {"execution": True}
"""Mark of execution settings, for `Field(json_schema_extra=EXECUTION)`."""
_SHORT_NAMES = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}


class TrainingSettings(BaseModel):
    """How one phase trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    embedding_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of embedding and LM head, where they train; null is `learning_rate`."""
    lr_scheduler_type: str = "cosine"
    """Schedule over the phase's own updates: any that transformers knows by name."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the schedule, such as num_decay_steps of warmup_stable_decay."""
    warmup_steps: float = Field(0.03, ge=0)
    """Below 1 a share of the phase's updates, otherwise a number of updates."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""
    optim: str = "adamw"
    """Optimizer: adamw, adamw_8bit (needs bitsandbytes), adafactor, or any other that transformers knows by name."""
    optim_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, passed on by transformers."""
    tokens_per_step: int = Field(65536, gt=0)
    """Tokens of an optimizer update over all processes; gradients are accumulated to reach it."""
    vocabulary: Literal["all", "corpus"] = "all"
    """Rows of embedding and LM head that training computes with. `corpus`: those that the training text uses, the
    special tokens and `vocabulary_sample` others; when the phase ends all rows are back, unused ones unchanged."""
    vocabulary_sample: int = Field(1024, ge=0)
    """Rows that the training text does not use, drawn at random, kept under `vocabulary: corpus`."""
    evaluations: int = Field(4, ge=0)
    """Times that bits per byte are measured within the phase, evenly spaced, the last at its end."""
    logging_steps: int = Field(10, gt=0)
    """Updates between logged losses."""
    per_device_train_batch_size: int = Field(1, gt=0, json_schema_extra=EXECUTION)
    """Sequences in one forward-backward on one device."""
    activation_checkpointing: bool = Field(False, json_schema_extra=EXECUTION)
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    torch_compile: bool = Field(False, json_schema_extra=EXECUTION)
    """Compile each decoder layer; needs a C++ compiler on a CPU, and up to a minute at the start."""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 autocast over fp32 weights; auto: where the hardware multiplies bf16 matrices."""
    attn_implementation: str = Field("auto", json_schema_extra=EXECUTION)
    """Attention kernel; auto: the fastest that keeps packed documents apart on this device."""
    head_loss: HeadLoss = Field("chunked", json_schema_extra=EXECUTION)
    """How the LM head's cross-entropy is computed; see elo.train.loss."""
    save_steps: int = Field(500, gt=0, json_schema_extra=EXECUTION)
    """Updates between checkpoints: what a kill can cost."""
    save_total_limit: int = Field(2, gt=0, json_schema_extra=EXECUTION)
    """Checkpoints that are kept."""
    max_loss_spike_nats: float = Field(2.0, gt=0, json_schema_extra=EXECUTION)
    """Stop when the logged loss stays this far above its recent median."""
    dataloader_num_workers: int = Field(0, ge=0, json_schema_extra=EXECUTION)
    """Processes that read sequences."""
    report_to: str | list[str] = Field("none", json_schema_extra=EXECUTION)
    """Trackers as transformers knows them: wandb, tensorboard, mlflow, trackio, ..."""
    training_arguments: dict[str, Any] = Field(default_factory=dict, json_schema_extra=EXECUTION)
    """Further transformers.TrainingArguments (fsdp, deepspeed, ddp_backend, ...), passed on unchanged."""

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return _one_of(value, [*_SHORT_NAMES, *(each.value for each in OptimizerNames)])

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return _one_of(value, [each.value for each in SchedulerType])

    @property
    def optimizer_name(self) -> str:
        """The optimizer as transformers names it."""
        return _SHORT_NAMES.get(self.optim, self.optim)

    @property
    def divides_model(self) -> bool:
        """Whether FSDP or DeepSpeed divide the trained weights among the processes."""
        return any(self.training_arguments.get(key) for key in ("fsdp", "deepspeed"))

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what comes out, for a stage's fingerprint."""
        fields = type(self).model_fields
        how = {name for name, field in fields.items() if field.json_schema_extra == EXECUTION}
        further = {
            key: value for key, value in self.training_arguments.items() if not key.startswith(_EXECUTION_ARGUMENTS)
        }
        return self.model_dump(mode="json", exclude=how) | further


# Further transformers.TrainingArguments that say how the work is done.
_EXECUTION_ARGUMENTS = ("fsdp", "deepspeed", "ddp_", "dataloader_", "accelerator_config", "log", "run_name", "tf32")


class TrainingSection(TrainingSettings):
    """Training settings of all phases, with what is different in some."""

    learning_rate: float | None = Field(None, gt=0, le=1)  # type: ignore[assignment]
    """Peak learning rate; null is the method's own (docs/methods.md)."""
    phases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings by phase, such as layer_alignment: {learning_rate: 1.0e-5}."""

    @field_validator("phases")
    @classmethod
    def _each_is_right(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in value.items():
            try:
                TrainingSettings.model_validate(settings)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join([name, *map(str, first["loc"])])
                known = sorted(TrainingSettings.model_fields)
                what = f"unknown key; known keys here: {', '.join(known)}" if first["type"] == "extra_forbidden" else ""
                raise ValueError(f"{where}: {what or first['msg'].removeprefix('Value error, ')}") from None
        return value

    def for_phase(self, name: str, default_learning_rate: float) -> TrainingSettings:
        """The settings of one phase.

        Args:
            default_learning_rate: where the configuration names none.
        """
        shared = self.model_dump(exclude={"phases"})
        merged = shared | self.phases.get(name, {})
        if merged["learning_rate"] is None:
            merged["learning_rate"] = default_learning_rate
        return TrainingSettings.model_validate(merged)


def check_also_train(also_train: Collection[Part], *, tied: bool) -> None:
    """Check what trains beside the layers of a model whose LM head is `tied` to its embedding, or is not.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    if tied and ("embedding" in also_train) != ("head" in also_train):
        raise EloError(
            "method.also_train: this model ties its LM head to its embedding, so they train together or not at all; "
            f"got {sorted(also_train)}, name both embedding and head or neither"
        )


def _one_of(value: str, known: list[str]) -> str:
    if value not in known:
        raise ValueError(f"must be one of {', '.join(sorted(known))}; got {value!r}")
    return value
