"""Base class of the methods: settings, phases, the parameters that train in each phase, and the cost.

A method is one file in this package: a class with a `name`, settings as fields, and `phases`. Importing `elo.methods`
imports every file here. The configuration, the plan, the report and the tests read `METHODS`.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from torch import nn
from transformers import PreTrainedModel

from elo.checkpoint.architecture import LayerModule, find_architecture, layers_of, modules_in, modules_of
from elo.checkpoint.footprint import Flops, Footprint, Middle
from elo.checkpoint.new_rows import read_new_rows
from elo.errors import EloError
from elo.train.bridge import Bridge, install_bridge
from elo.train.prepared import Prepared
from elo.train.settings import Part, TrainingSettings, check_also_train

Portion = Literal["pretraining", "alignment", "all"]
Scale = float | Literal["search"]


@dataclass(frozen=True)
class Phase:
    """One phase of training, of the whole model or a detached one.

    Attributes:
        name: name in records, folder names and `training.phases`.
        middle: treatment of the layers that are not in `layers`; see `Middle`.
        portion: portion of the token budget; `all` is `pretraining` followed by `alignment`.
        also_train: trained parts outside the decoder layers.
        lora_rank: rank of the adapters, if `middle` is `adapted`.
        learning_rate: peak rate if the configuration has none.
    """

    name: str
    middle: Middle
    portion: Portion = "all"
    also_train: tuple[Part, ...] = ()
    lora_rank: int = 0
    learning_rate: float = 1e-4

    @property
    def detached(self) -> bool:
        """Whether the phase trains a detached model, which is attached afterwards."""
        return self.middle in ("removed", "bridged")

    def decisive(self) -> dict[str, Any]:
        """Return everything that determines the outcome of the phase, for the fingerprint of a stage."""
        return asdict(self)


@dataclass(frozen=True)
class Setup:
    """The inputs of `Method.prepare` besides the model.

    Attributes:
        layers: 0-based indices of the base's decoder layers that the configuration chooses.
        bridge: bridge of a phase whose middle is `bridged`.
        seed: seed of the run.
    """

    layers: Sequence[int] = ()
    bridge: Bridge | None = None
    seed: int = 0

    def generator(self, number: int) -> torch.Generator:
        """Return the generator of draw `number`. It does not depend on earlier draws, so that runs can resume."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


class Method(BaseModel):
    """An adaptation method. Its fields are the settings under `method:` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    label: ClassVar[str]
    """Name in reports."""
    redraws_layers: ClassVar[bool] = False
    """Whether the set of trained layers changes during training, which requires all weights in fp32."""
    uses_layers: ClassVar[bool] = True
    """Whether the method uses the layers that the configuration chooses."""
    name: str
    scale: Scale = 1.0
    """Factor of the trained change: the result is base + scale x (trained - base). `search` tries several scales on
    text that was not trained on, 0 (the base) among them, and takes the one with the lowest loss over all languages."""
    module: LayerModule = "layer"
    """Part of each trained decoder layer that trains: all of the `layer`, its `attention`, or its feed-forward part
    (`mlp`). With the last two, the layers' norms are frozen."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: Scale) -> Scale:
        if not isinstance(value, str) and not 0 < value <= 2:
            raise ValueError(f"got {value}; write a number above 0 and at most 2, or search")
        return value

    def decisive(self) -> dict[str, Any]:
        """Return the settings that determine the trained weights, for the fingerprint of a stage."""
        return self.model_dump(mode="json", exclude={"scale"})

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the method, in order."""

    @property
    def alignment_share(self) -> float:
        """Share of the token budget for the phases with portion `alignment`."""
        return 0.0

    def share_of(self, phase: Phase) -> float:
        """Return the share of the token budget that one of the method's phases trains on."""
        share = self.alignment_share
        return {"pretraining": 1 - share, "alignment": share, "all": 1.0}[phase.portion]

    @property
    def needs_new_rows(self) -> bool:
        """Whether the method requires a base with an extended vocabulary."""
        return False

    @property
    def probe_criterion(self) -> str | None:
        """Criterion of `elo.probe` that must score the layers before the method starts; None if it needs no scores."""
        return None

    def with_scores(self, scores: Sequence[float]) -> "Method":
        """Return the method with the settings that follow from each layer's score by `probe_criterion`."""
        return self

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        """Set `requires_grad` on every parameter of `model` and install the phase's adapters, bridge or hooks.

        Args:
            model: the whole model, or the detached one if `phase.detached`.

        Returns:
            The hooks for the training loop.

        Raises:
            EloError: the model does not support the method's settings.
        """
        if phase.middle == "trained":
            train_all(model, self.module)
            return Prepared(first_row=self.first_row(model))
        layers = range(len(setup.layers)) if phase.detached else setup.layers
        select_layers(model, layers, phase.also_train, self.module)
        if phase.middle != "bridged":
            return Prepared(first_row=self.first_row(model))
        assert setup.bridge is not None
        return Prepared(first_row=self.first_row(model), fold=install_bridge(model, setup.bridge))

    def first_row(self, model: PreTrainedModel) -> int:
        """Return the index of the first trained row of embedding and head."""
        return first_new_row(model) if self.needs_new_rows else 0

    def layers_at_once(self, phase: Phase, layers: Sequence[int], num_layers: int) -> Sequence[int]:
        """Return the decoder layers that have gradients and optimizer states at the same time.

        Args:
            layers: layers that the configuration chooses.
            num_layers: number of decoder layers of the base.
        """
        return range(num_layers) if phase.middle == "trained" else layers

    def lora_ranks(self, phase: Phase, num_layers: int) -> Sequence[int]:
        """Return the rank of the adapters on each decoder layer of the base; 0 means no adapter."""
        return [phase.lora_rank] * num_layers

    def flops_per_token(
        self, phase: Phase, footprint: Footprint, layers: Sequence[int], sequence_length: int, **counting: Any
    ) -> Flops:
        """Return the matmul FLOPs per trained token, forward and backward.

        Args:
            footprint: footprint of the base.
            layers: layers that the configuration chooses.
            counting: further arguments of `Footprint.flops_per_token`.
        """
        return footprint.flops_per_token(
            phase.middle,
            self.layers_at_once(phase, layers, footprint.num_layers),
            sequence_length=sequence_length,
            lora_rank=self.lora_ranks(phase, footprint.num_layers),
            also_train=phase.also_train,
            module=self.module,
            **counting,
        )


class TrainedParts(Method):
    """A method that can train parts outside the decoder layers too."""

    also_train: tuple[Part, ...] = ()
    """Parts outside the layers that train in full: embedding, norm, head. An extended vocabulary needs embedding and
    head."""
    embedding_rows: Literal["all", "new"] = "all"
    """Vocabulary rows to train in embedding and head; `new` means only those that `elo vocab extend` added."""

    @model_validator(mode="after")
    def _check_new_rows(self) -> Self:
        if self.embedding_rows == "new" and not {"embedding", "head"} & set(self.also_train):
            raise ValueError(
                "embedding_rows: new needs a trained embedding or head; name one in also_train, or write all"
            )
        return self

    @property
    def needs_new_rows(self) -> bool:
        return self.embedding_rows == "new"


class ChosenLayers(TrainedParts):
    """A method that trains the chosen layers and parts outside them."""

    also_train: tuple[Part, ...] = ("embedding", "head")
    """Parts outside the layers that train too, and are attached with detached layers: embedding, norm, head."""


M = TypeVar("M", bound=Method)
METHODS: dict[str, type[Method]] = {}
"""All methods, by name."""


def register(method: type[M]) -> type[M]:
    """Add a method to `METHODS` under its name."""
    METHODS[method.model_fields["name"].default] = method
    return method


def section_of_name(value: Any) -> Any:
    """Expand the bare name of a method to a section with default settings."""
    return {"name": value} if isinstance(value, str) else value


def parameters_in(layer: nn.Module, module: LayerModule) -> Iterator[nn.Parameter]:
    """Yield the parameters of a part of a decoder layer."""
    for part in modules_in(layer, module):
        yield from part.parameters()


def train_all(model: PreTrainedModel, module: LayerModule = "layer") -> None:
    """Unfreeze all of `model` except the parts of its decoder layers other than `module`."""
    model.requires_grad_(True)
    layers = layers_of(model)
    layers.requires_grad_(module == "layer")
    for layer in layers:
        for parameter in parameters_in(layer, module):
            parameter.requires_grad_(True)


def select_layers(
    model: PreTrainedModel,
    layers: Collection[int],
    also_train: Collection[Part] = (),
    module: LayerModule = "layer",
) -> None:
    """Freeze all of `model` except `module` of the decoder layers at `layers` and the parts in `also_train`.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    model.requires_grad_(False)
    decoder_layers = layers_of(model)
    for index in layers:
        for parameter in parameters_in(decoder_layers[index], module):
            parameter.requires_grad_(True)
    train_parts(model, also_train)


def train_parts(model: PreTrainedModel, also_train: Collection[Part]) -> None:
    """Unfreeze the named parts outside the decoder layers.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    check_also_train(also_train, tied=find_architecture(model).tied)
    for module in modules_of(model, also_train):
        module.requires_grad_(True)


def check_supervision(phase: Phase, settings: TrainingSettings, layers: Sequence[int], num_layers: int) -> None:
    """Check the internal layers that are supervised in a phase.

    Args:
        layers: layers that the configuration chooses.
        num_layers: number of decoder layers of the base.

    Raises:
        EloError: a layer is not an internal one of the model that the phase trains, or its loss would train nothing.
    """
    if settings.deep_supervision is None:
        return
    try:
        supervised = settings.deep_supervision.weight_by_layer(len(layers) if phase.detached else num_layers)
    except EloError as error:
        raise EloError(f"{error} (phase {phase.name})") from None
    if phase.middle == "frozen" and not phase.also_train and min(supervised) < min(layers):
        raise EloError(
            f"training.deep_supervision.layers: nothing trains at or below layer {min(supervised)} in phase "
            f"{phase.name}; write layers from {min(layers)} on"
        )


def first_new_row(model: PreTrainedModel) -> int:
    """Return the index of the first row of embedding and head that `elo vocab extend` added.

    Raises:
        EloError: the model has no record of new rows, or the record is damaged.
    """
    rows = read_new_rows(model.config)
    if rows is None:
        raise EloError(
            "method.embedding_rows: new: this model has no record of new rows; extend its vocabulary with `elo vocab "
            "extend`, or write embedding_rows: all"
        )
    return rows.start
