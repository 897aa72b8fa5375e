"""What trains where: each way to adapt a model is one class here.

A method is a sequence of phases. A phase trains either the detached model (and its layers are then attached) or the
whole model, on its part of the mixture's rows, with the settings of one section of the configuration. Adding a method:
write a class, give it a name and phases, say which parameters train; `METHODS` finds it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from elo.errors import EloError
from elo.model.architecture import find_architecture
from elo.training.settings import Part

Rows = Literal["pretraining", "alignment", "all"]


@dataclass(frozen=True)
class Phase:
    """One training of one model.

    Attributes:
        name: as it stands in records and folder names.
        detached: train the detached model and attach it afterwards; otherwise train the whole model.
        rows: which part of the run's token budget it sees. `all` is `pretraining` followed by `alignment`.
        settings: section of the configuration that holds its training arguments.
    """

    name: str
    detached: bool
    rows: Rows
    settings: Literal["elo_pretraining", "layer_alignment", "full"]


class Method:
    """A way to adapt a model; subclasses state what is special about them."""

    name: ClassVar[str]
    label: ClassVar[str]
    phases: ClassVar[tuple[Phase, ...]]
    also_train: ClassVar[tuple[Part, ...]] = ()
    """Parts outside the layers that detached phases train and attach, besides those of the configuration."""

    def select_trainable(
        self, model: PreTrainedModel, phase: Phase, layers: Sequence[int], also_train: Collection[Part] = ()
    ) -> None:
        """Set `requires_grad` on every parameter of `model`, which holds just the kept layers if `phase.detached`.

        Args:
            layers: decoder layers of the base that ELO trains, 0-based.
            also_train: parts outside the layers that train in a detached phase.
        """
        model.requires_grad_(True)


class Elo(Method):
    """ELO as published: detached layers on most of the tokens, then a brief full fine-tune on the rest."""

    name = "elo"
    label = "ELO"
    phases = (
        Phase("elo_pretraining", detached=True, rows="pretraining", settings="elo_pretraining"),
        Phase("layer_alignment", detached=False, rows="alignment", settings="layer_alignment"),
    )

    def select_trainable(
        self, model: PreTrainedModel, phase: Phase, layers: Sequence[int], also_train: Collection[Part] = ()
    ) -> None:
        if phase.detached:
            select_layers(model, range(len(layers)), also_train)
        else:
            model.requires_grad_(True)


class EloEmbeddings(Elo):
    """ELO with embedding and LM head trained too: what a shallow model can learn most with, at their cost in memory."""

    name = "elo_embeddings"
    label = "ELO, embedding and head too"
    also_train = ("embedding", "head")


class Full(Method):
    """Full continual pretraining: the baseline that trains everything on the same tokens."""

    name = "full"
    label = "Full CPT"
    phases = (Phase("full", detached=False, rows="all", settings="full"),)


class FullAtWallTime(Full):
    """Full continual pretraining on as many tokens as fit into ELO's wall time, with a schedule of its own."""

    name = "full_at_wall_time"
    label = "Full CPT, ELO's wall time"


class AlignOnly(Method):
    """Layer alignment without any ELO pretraining before it."""

    name = "align_only"
    label = "Alignment alone"
    phases = (Phase("layer_alignment", detached=False, rows="alignment", settings="layer_alignment"),)


class Frozen(Method):
    """The same layers as ELO, trained in place with the middle frozen but computed."""

    name = "frozen"
    label = "Frozen middle"
    phases = (Phase("frozen", detached=False, rows="all", settings="full"),)

    def select_trainable(
        self, model: PreTrainedModel, phase: Phase, layers: Sequence[int], also_train: Collection[Part] = ()
    ) -> None:
        select_layers(model, layers, also_train)


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Elo, EloEmbeddings, Full, FullAtWallTime, AlignOnly, Frozen)
}


def find_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        EloError: there is none.
    """
    if name not in METHODS:
        raise EloError(f"method: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]()


def select_layers(model: PreTrainedModel, layers: Collection[int], also_train: Collection[Part] = ()) -> None:
    """Freeze `model` but for the decoder layers at `layers` and the named parts outside them.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    architecture = find_architecture(model)
    if architecture.tied and ("embedding" in also_train) != ("head" in also_train):
        raise EloError(
            "also_train: this model ties its LM head to its embedding, so they train together or not at all; "
            f"got {sorted(also_train)}, name both embedding and head or neither"
        )
    model.requires_grad_(False)
    decoder_layers = model.get_submodule(architecture.layers_path)
    assert isinstance(decoder_layers, nn.ModuleList)
    for index in layers:
        decoder_layers[index].requires_grad_(True)
    paths = {
        "embedding": architecture.embedding_path,
        "norm": architecture.norm_path,
        "head": architecture.head_path,
    }
    for part in also_train:
        path = paths[part]
        if path is not None:
            model.get_submodule(path).requires_grad_(True)
