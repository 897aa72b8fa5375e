"""The section `chat` of a run: what is done after the adaptation to get a chat model (docs/chat.md)."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from elo.methods import Method, section_of_name
from elo.methods.full import Full
from elo.methods.lora import Lora
from elo.train.settings import Part, TrainingSettings

if TYPE_CHECKING:
    ChatMethod = Method
else:
    ChatMethod = Annotated[Lora | Full, Field(discriminator="name"), BeforeValidator(section_of_name)]

_LEARNING_RATES = {"lora": 2e-4, "full": 1e-5}
_WITHOUT_EFFECT = ("vocabulary", "vocabulary_sample", "evaluations")


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Files = Annotated[list[str], BeforeValidator(_one_or_several)]


class ChatTraining(TrainingSettings):
    """Training settings of the supervised fine-tuning, with defaults for few conversations."""

    learning_rate: float | None = Field(None, gt=0, le=1)  # type: ignore[assignment]
    """Peak learning rate; null is 2e-4 with `lora` and 1e-5 with `full`."""
    tokens_per_step: int = Field(16384, gt=0)
    """Positions per optimizer update, over all processes, prompts and padding included."""
    save_steps: int = Field(100, gt=0, json_schema_extra={"execution": True})
    """Number of updates between training checkpoints. A killed run loses at most this many."""

    @model_validator(mode="after")
    def _have_effect(self) -> "ChatTraining":
        for name in _WITHOUT_EFFECT:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect on supervised fine-tuning; remove it")
        return self


class ChatConfig(BaseModel):
    """Stages after the adaptation: the chat vector, if `model` is given, then supervised fine-tuning (SFT)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: str | None = Field(None, min_length=1)
    """Chat model (instruct model) made from the base, whose change is added to the adapted model; null adds none."""
    base: str | None = Field(None, min_length=1)
    """Base of the chat model; null is the run's `model`."""
    scale: float = Field(1.0, ge=-100, le=100)
    """Factor of the chat model's change; 1 adds all of it."""
    leave_out: tuple[Part, ...] = ()
    """Parts of the model to which the change is not added."""
    data: dict[str, Files] = Field(default_factory=dict)
    """Files of conversations (.jsonl, also .gz or .zst) by language, for SFT; empty does no SFT."""
    heldout: dict[str, str] = Field(default_factory=dict)
    """File of held-out conversations by language, which measure the chat models."""
    heldout_share: float = Field(0.1, gt=0, lt=0.5)
    """Share of a language's conversations that is held out when `heldout` has no file for it."""
    template: str | None = Field(None, min_length=1)
    """Chat template: a Jinja file, `chatml` or `plain`; null is that of the chat model, or of the run's tokenizer."""
    method: ChatMethod = Lora()
    """What SFT trains: `lora` (adapters, merged at the end) or `full`, or a section with `name` and settings."""
    epochs: int = Field(2, ge=1, le=1000)
    """Number of passes over the conversations."""
    sequence_length: int = Field(2048, ge=8, le=1 << 24)
    """Length of a training sequence, in tokens. Longer conversations are left out and counted."""
    packing: bool = True
    """Pack whole conversations into a sequence, each with attention to itself alone. Architectures that cannot keep
    them apart get one conversation per sequence, as with false."""
    training: ChatTraining = ChatTraining()
    """Training settings, with the keys of `training`."""
    prompts: int = Field(32, ge=1)
    """Number of held-out conversations per language for which answers are generated and measured."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum length of a generated answer, in tokens."""

    @field_validator("method")
    @classmethod
    def _unscaled(cls, value: Method) -> Method:
        if value.scale != 1.0:
            raise ValueError("scale: has no effect on supervised fine-tuning; remove it")
        return value

    @model_validator(mode="after")
    def _has_a_stage(self) -> "ChatConfig":
        if self.model is None and not self.data:
            raise ValueError("has neither a model nor data; give the chat model, conversations, or both")
        for language, files in self.data.items():
            if not files:
                raise ValueError(f"data: {language!r} has no file; give one")
        for language in (*self.data, *self.heldout):
            if not language.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"language name {language!r} may contain only letters, digits, - and _")
        return self

    @property
    def settings(self) -> TrainingSettings:
        """Training settings with the learning rate of the method."""
        values = self.training.model_dump()
        if values["learning_rate"] is None:
            values["learning_rate"] = _LEARNING_RATES[self.method.name]
        return TrainingSettings.model_validate(values)

    @property
    def stages(self) -> list[str]:
        """The stages of this section, in order."""
        return [*(["chat_vector"] if self.model else []), *(["sft"] if self.data else [])]
