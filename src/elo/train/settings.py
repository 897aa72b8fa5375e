"""Settings of one training phase: a section of the configuration, and the plain argument of `elo.train.loop.train`.

Names are transformers' where transformers has one.
"""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from elo.errors import EloError
from elo.plan.memory import HeadLoss

Part = Literal["embedding", "norm", "head"]
"""A part of a model outside its decoder layers."""


class TrainingSettings(BaseModel):
    """How one phase trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    embedding_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of embedding and LM head, where they train; null: `learning_rate`."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule over the phase's own steps."""
    warmup_steps: float = Field(0.03, ge=0)
    """Below 1: share of the phase's steps; otherwise a number of steps."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""
    optim: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """`adamw_8bit` needs bitsandbytes (pip install 'elo-cpt[adamw8bit]')."""
    tokens_per_step: int = Field(65536, gt=0)
    """Tokens an optimizer update over all processes; gradients are accumulated to reach it."""
    per_device_train_batch_size: int = Field(1, gt=0)
    """Rows of sequence_length tokens in one forward-backward on one device."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    torch_compile: bool = False
    """Compile each decoder layer; needs a C++ compiler on CPU, and some seconds to a minute at the start."""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 autocast over fp32 weights; auto: where the hardware multiplies bf16 matrices."""
    attn_implementation: str = "auto"
    """auto: the fastest that keeps packed documents apart on this device."""
    head_loss: HeadLoss = "chunked"
    """How the LM head's cross-entropy is computed; see elo.train.loss."""
    logging_steps: int = Field(10, gt=0)
    save_steps: int = Field(500, gt=0)
    """Updates between checkpoints: what a kill can cost."""
    save_total_limit: int = Field(2, gt=0)
    evaluations: int = Field(4, ge=0)
    """Times that bits per byte are measured within the phase, evenly spaced, the last at its end."""
    loss_spike: float = Field(2.0, gt=0)
    """Stop when the logged loss stays this many nats above its recent median."""
    dataloader_num_workers: int = Field(0, ge=0)
    report_to: str | list[str] = "none"
    """wandb, tensorboard, ... as transformers knows them."""
    training_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further transformers.TrainingArguments (fsdp, deepspeed, ddp_backend, ...), passed on as they are."""

    @property
    def divides_model(self) -> bool:
        """Whether FSDP or DeepSpeed divide what is trained among the processes."""
        return any(self.training_arguments.get(key) for key in ("fsdp", "deepspeed"))


class EloOptions(BaseModel):
    """What method `elo` does beyond its training arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stand_in: Literal["none", "bridge", "forward_only"] = "forward_only"
    """What stands for the middle layers in ELO pretraining. `none`: nothing, as published. `bridge`: a linear map
    fitted on the base. `forward_only`: they are computed, but not differentiated; nothing is detached then."""
    also_train: tuple[Part, ...] = ("embedding", "head")
    """Parts outside the layers that train and are attached with them; none in the published method."""
    embedding_rows: Literal["all", "new"] = "all"
    """Which rows of a trained embedding and head train; `new`: those that elo vocab added, while the others stay as
    they are, bit for bit."""
    scale: float | Literal["search"] = "search"
    """How much of a detached model's change is attached, of new rows always all; search: as much as predicts unseen
    rows of both languages best."""
    alignment: Literal["auto", "full", "forward_only", "none"] = "auto"
    """What layer alignment trains: everything; the kept layers again, past a middle computed without a graph; or there
    is none. auto: full after a detached phase, none after a forward-only one, which has nothing to align."""

    @model_validator(mode="after")
    def _rows_of_something(self) -> "EloOptions":
        if self.embedding_rows == "new" and not {"embedding", "head"} & set(self.also_train):
            raise ValueError(
                "embedding_rows: new says which rows of embedding and head train; name them in also_train, or write all"
            )
        return self

    @field_validator("scale")
    @classmethod
    def _within_reach(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 < value <= 2:
            raise ValueError(f"scale must be above 0 and at most 2, or search; got {value}")
        return value


PUBLISHED = EloOptions(stand_in="none", also_train=(), scale=1.0, alignment="full")
"""ELO as published (arXiv 2601.03648)."""


class LoraSettings(TrainingSettings):
    """How method `lora` trains."""

    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    also_train: tuple[Part, ...] = ()
    """Parts outside the layers that train in full beside the adapters: a new vocabulary needs embedding and head."""


class LisaSettings(TrainingSettings):
    """How method `lisa` trains."""

    layers: int = Field(2, gt=0)
    """Decoder layers that train at a time."""
    period: int = Field(20, gt=0)
    """Updates between draws."""


def check_also_train(also_train: Collection[Part], *, tied: bool) -> None:
    """Check what trains beside the layers of a model whose LM head is `tied` to its embedding, or is not.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    if tied and ("embedding" in also_train) != ("head" in also_train):
        raise EloError(
            "also_train: this model ties its LM head to its embedding, so they train together or not at all; "
            f"got {sorted(also_train)}, name both embedding and head or neither"
        )
