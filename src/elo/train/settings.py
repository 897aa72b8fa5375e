"""Training settings: the section `training` of the configuration and the settings of `elo.train.loop.train`.

Settings have transformers' names where it has them. Execution settings affect speed and memory, and results only by
rounding, so they may change when a run is resumed.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from elo.errors import EloError

Part = Literal["embedding", "norm", "head"]
"""A part of a model outside its decoder layers."""
HeadLoss = Literal["chunked", "plain", "linear_cross_entropy", "model"]

CHUNK = {"gpu": 2048, "cpu": 256}
"""Tokens per chunk of the chunked head loss. On a CPU, a chunk's logits should fit into the last-level cache (8 MiB for
256 tokens and 8,192 vocabulary rows). A GPU needs larger chunks."""
EXECUTION: JsonDict = {"execution": True}
"""Marker of execution settings, for `Field(json_schema_extra=EXECUTION)`."""
_SHORT_NAMES = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}


def execution_keys(model: type[BaseModel]) -> set[str]:
    """Return the names of a model's execution settings."""
    return {name for name, field in model.model_fields.items() if field.json_schema_extra == EXECUTION}


class DeepSupervision(BaseModel):
    """Further cross-entropies at internal layers, through the model's own final norm and LM head (docs/methods.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    layers: list[int | float] = Field(min_length=1)
    """Layers of the trained model whose output is supervised: 0-based indices (negative from the end), or shares of its
    depth between 0 and 1, such as 0.5."""
    weights: list[Annotated[float, Field(gt=0, le=100)]]
    """Factor of each layer's loss; the main loss has 1."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> "DeepSupervision":
        if len(self.layers) != len(self.weights):
            raise ValueError(
                f"got {len(self.layers)} layers and {len(self.weights)} weights; write one weight per layer"
            )
        return self

    def weight_by_layer(self, num_layers: int) -> dict[int, float]:
        """Return the weight of each supervised layer of a model with `num_layers` layers.

        Raises:
            EloError: a layer does not exist, is the last one, or is selected twice.
        """
        found: dict[int, float] = {}
        for place, weight in zip(self.layers, self.weights, strict=True):
            if isinstance(place, float):
                index = max(0, int(place * num_layers) - 1) if 0 < place < 1 else -1
            else:
                index = place + num_layers if place < 0 else place
            if not 0 <= index < num_layers - 1 or index in found:
                wrong = "selects a layer twice" if index in found else "is not a layer below the last one"
                raise EloError(
                    f"training.deep_supervision.layers: {place} {wrong} in a trained model of {num_layers} layers; "
                    f"write different indices from 0 to {num_layers - 2} or shares of the depth, under training.phases "
                    "for a phase whose model is detached"
                )
            found[index] = weight
        return found


class TrainingSettings(BaseModel):
    """Training settings of one phase."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    embedding_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of embedding and LM head, if they train; null is `learning_rate`."""
    lr_scheduler_type: str = "cosine"
    """Learning-rate schedule over the updates of a phase: the name of any schedule in transformers that needs no
    measured loss."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the schedule, such as num_decay_steps for warmup_stable_decay."""
    warmup_steps: float = Field(0.03, ge=0)
    """Length of the warmup: below 1 a share of the phase's updates, otherwise a number of updates."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Weight decay of the optimizer."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of Adam's first moment."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of Adam's second moment."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Norm to which gradients are clipped; 0 turns clipping off."""
    optim: str = "adamw"
    """Optimizer: adamw, adamw_8bit (needs bitsandbytes), adafactor, or the name of any other optimizer in transformers
    except lomo and adalomo, which update the weights in the backward pass of each micro-step."""
    optim_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, passed to it by transformers."""
    tokens_per_step: int = Field(65536, gt=0)
    """Tokens per optimizer update, over all processes. Gradients are accumulated to reach it."""
    vocabulary: Literal["all", "corpus"] = "all"
    """Vocabulary rows of embedding and LM head that training computes with. `corpus` keeps the rows that the training
    text uses, the special tokens, and `vocabulary_sample` others. The phase's output has all rows; those left out are
    unchanged."""
    vocabulary_sample: int = Field(1024, ge=0)
    """Number of unused vocabulary rows, drawn at random, to keep with `vocabulary: corpus`."""
    deep_supervision: DeepSupervision | None = None
    """Further losses at internal layers, such as {layers: [0.5], weights: [0.3]}; null adds none. The logged loss
    remains that of the last layer."""
    evaluations: int = Field(4, ge=0)
    """Number of measurements of bits per byte during a phase, evenly spaced, with the last one at its end."""
    logging_steps: int = Field(10, gt=0)
    """Number of updates between logged losses."""
    per_device_train_batch_size: int = Field(1, gt=0, json_schema_extra=EXECUTION)
    """Number of sequences in one forward and backward pass on one device."""
    activation_checkpointing: bool = Field(False, json_schema_extra=EXECUTION)
    """Recompute activations in the backward pass, which takes about a third more time and far less memory."""
    torch_compile: bool = Field(False, json_schema_extra=EXECUTION)
    """Compile each decoder layer, which takes up to a minute at the start and, on a CPU, needs a C++ compiler."""
    bf16: bool | Literal["auto"] = "auto"
    """Train with bf16 autocast over fp32 weights. auto does so if the hardware multiplies bf16 matrices."""
    attn_implementation: str = Field("auto", json_schema_extra=EXECUTION)
    """Attention implementation; auto chooses the fastest one on this device that keeps packed documents apart."""
    head_loss: HeadLoss = Field("chunked", json_schema_extra=EXECUTION)
    """Implementation of the LM head's cross-entropy; see elo.train.loss."""
    save_steps: int = Field(500, gt=0, json_schema_extra=EXECUTION)
    """Number of updates between training checkpoints. A killed run loses at most this many updates."""
    save_total_limit: int = Field(2, gt=0, json_schema_extra=EXECUTION)
    """Number of training checkpoints to keep."""
    max_loss_spike_nats: float = Field(2.0, gt=0, json_schema_extra=EXECUTION)
    """Stop when the last three logged losses are more than this many nats above the recent median."""
    dataloader_num_workers: int = Field(0, ge=0, json_schema_extra=EXECUTION)
    """Number of processes that load sequences; 0 loads them in the training process."""
    report_to: str | list[str] = Field("none", json_schema_extra=EXECUTION)
    """Experiment trackers, by their names in accelerate (tensorboard, wandb, mlflow, trackio, ...), or `all` for all
    installed ones. Files are written to the folder `trackers` of the run."""
    training_arguments: dict[str, Any] = Field(default_factory=dict, json_schema_extra=EXECUTION)
    """Further settings by their names in transformers.TrainingArguments: fsdp, fsdp_config, deepspeed, and others that
    docs/launching.md lists."""

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        known = {each.value for each in OptimizerNames} - {"lomo", "adalomo"}
        return _one_of(value, [*_SHORT_NAMES, *known])

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return _one_of(
            value, [each.value for each in SchedulerType if each.value not in ("reduce_lr_on_plateau", "greedy")]
        )

    @property
    def optimizer_name(self) -> str:
        """Name of the optimizer in transformers."""
        return _SHORT_NAMES.get(self.optim, self.optim)

    @property
    def num_losses(self) -> int:
        """Number of cross-entropies per token: one, and one for each supervised internal layer."""
        return 1 + (len(self.deep_supervision.layers) if self.deep_supervision else 0)

    @property
    def divides_model(self) -> bool:
        """Whether FSDP or DeepSpeed shards the weights over the processes."""
        return any(self.training_arguments.get(key) for key in ("fsdp", "deepspeed"))

    def decisive(self) -> dict[str, Any]:
        """Return the settings that determine the result, for the fingerprint of a stage."""
        further = {
            key: value for key, value in self.training_arguments.items() if not key.startswith(_EXECUTION_ARGUMENTS)
        }
        return self.model_dump(mode="json", exclude=execution_keys(type(self))) | further


PASSED_ARGUMENTS = {
    "fsdp", "fsdp_config", "deepspeed", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_find_unused_parameters", "ddp_static_graph", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "run_name", "tf32", "adam_epsilon",
    "optim_target_modules", "activation_checkpointing_kwargs",
}  # fmt: skip
"""Keys of transformers.TrainingArguments that `training_arguments` may have."""
# Prefixes of the keys that are execution settings.
_EXECUTION_ARGUMENTS = ("fsdp", "deepspeed", "ddp_", "dataloader_", "run_name", "tf32", "activation_")


class TrainingSection(TrainingSettings):
    """Training settings of all phases, with overrides by phase."""

    learning_rate: float | None = Field(None, gt=0, le=1)  # type: ignore[assignment]
    """Peak learning rate; null is the method's default (docs/methods.md)."""
    phases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides by phase, such as layer_alignment: {learning_rate: 1.0e-5}."""

    @field_validator("phases")
    @classmethod
    def _check_phases(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
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
        """Return the settings of one phase.

        Args:
            default_learning_rate: peak learning rate if the configuration has none.
        """
        shared = self.model_dump(exclude={"phases"})
        merged = shared | self.phases.get(name, {})
        if merged["learning_rate"] is None:
            merged["learning_rate"] = default_learning_rate
        return TrainingSettings.model_validate(merged)


def check_also_train(also_train: Collection[Part], *, tied: bool) -> None:
    """Check the parts that train beside the layers.

    Args:
        tied: whether the model's LM head is tied to its embedding.

    Raises:
        EloError: embedding and head are tied, and `also_train` names only one of them.
    """
    if tied and ("embedding" in also_train) != ("head" in also_train):
        raise EloError(
            f"method.also_train: got {sorted(also_train)}, but this model ties its LM head to its embedding; write "
            "both embedding and head, or neither"
        )


def _one_of(value: str, known: list[str]) -> str:
    if value not in known:
        raise ValueError(f"got {value!r}; write one of {', '.join(sorted(known))}")
    return value
