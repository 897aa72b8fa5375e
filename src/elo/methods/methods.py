"""What trains where: each way to adapt a model is one class here.

A method is a sequence of phases. A phase trains one model, detached or whole, on its part of the run's rows, with the
settings of one section of the configuration. `prepare` says what trains, what stands in for the middle, what happens
before an update, and how what was added is folded back into a plain Hugging Face model. Adding a method: write a class,
name it, give it phases and, where `select_layers` or everything is not what trains, a `prepare`; `METHODS` finds it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from elo.checkpoint.architecture import find_architecture, layers_of, modules_of
from elo.checkpoint.footprint import Flops, Footprint
from elo.checkpoint.footprint import Method as FootprintMethod
from elo.checkpoint.new_rows import read_new_rows
from elo.errors import EloError
from elo.methods.phases import Phase, elo_phases
from elo.store.processes import world_size
from elo.train.bridge import Bridge, install_bridge, pass_forward_only
from elo.train.settings import PUBLISHED, EloOptions, LisaSettings, LoraSettings, Part, check_also_train


@dataclass(frozen=True)
class Setup:
    """What a model is prepared with.

    Attributes:
        layers: decoder layers of the base that ELO trains, 0-based.
        bridge: for phases that need one.
        seed: of the run.
    """

    layers: Sequence[int] = ()
    bridge: Bridge | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """A model made ready for a phase.

    Attributes:
        before_step: called before each update with its 0-based number and the optimizer, after a restart too.
        first_row: of embedding and head, rows before this one stay as they are; 0 trains all.
        fold: takes out what was added and leaves a plain Hugging Face model that holds what was trained.
    """

    before_step: Callable[[int, Any], None] | None = None
    first_row: int = 0
    fold: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Options:
    """What can be chosen about methods, besides training arguments: sections of the configuration."""

    elo: EloOptions = field(default_factory=EloOptions)
    lora: LoraSettings = field(default_factory=LoraSettings)
    lisa: LisaSettings = field(default_factory=LisaSettings)


class Method:
    """A way to adapt a model; subclasses state what is special about them."""

    name: ClassVar[str]
    label: ClassVar[str]
    phases: tuple[Phase, ...] = ()
    also_train: tuple[Part, ...] = ()
    """Parts outside the layers that train with them, and are attached with them."""
    needs_new_rows: bool = False
    """Whether it asks for a model whose vocabulary was extended."""
    scale: float | Literal["search"] = 1.0
    """How much of the trained change is attached: theta0 + scale * (theta - theta0)."""

    def __init__(self, options: Options) -> None:
        pass

    def check(self) -> None:
        """Raise EloError where the method cannot run here at all."""

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        """Set `requires_grad` on every parameter of `model`, and add what the phase needs.

        Args:
            model: the whole model, or just the kept layers if `phase.detached`.
        """
        model.requires_grad_(True)
        return Prepared()

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        """Matmul FLOPs of one trained token of a phase, forward and backward."""
        return counted.flops_per_token("full", sequence_length=sequence_length).total

    def kept_layers_flops(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        """`flops_per_token` of a phase that trains the kept layers and `also_train`."""

        def count(how: FootprintMethod) -> Flops:
            return counted.flops_per_token(how, layers, sequence_length=sequence_length, also_train=self.also_train)

        map_flops = 2.0 * counted.bridge_elements(layers)
        if phase.middle == "absent":
            return count("elo").total
        if phase.middle == "bridge":  # forward and input gradient
            return count("elo").total + 2 * map_flops
        if phase.middle == "forward_only":
            return count("forward_only").total + map_flops  # input gradient alone
        return count("frozen").total

    def _first_row(self, model: PreTrainedModel) -> int:
        return first_new_row(model) if self.needs_new_rows else 0

    def prepare_kept_layers(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        """Train the kept layers and `also_train`, with what `phase.middle` says for the others."""
        layers = range(len(setup.layers)) if phase.detached else setup.layers
        select_layers(model, layers, self.also_train)
        first_row = self._first_row(model)
        if not phase.needs_bridge:
            return Prepared(first_row=first_row)
        assert setup.bridge is not None
        install = install_bridge if phase.detached else pass_forward_only
        return Prepared(first_row=first_row, fold=install(model, setup.bridge))


class Elo(Method):
    """ELO as we recommend it: the options of section `elo`; docs/experiments.md tells what their defaults rest on."""

    name = "elo"
    label = "ELO"

    def __init__(self, options: Options) -> None:
        elo = options.elo
        self.also_train = elo.also_train
        self.needs_new_rows = elo.embedding_rows == "new"
        self.scale = elo.scale
        self.phases = elo_phases(elo)

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        if phase.middle == "computed":
            model.requires_grad_(True)
            return Prepared(first_row=self._first_row(model))
        return self.prepare_kept_layers(model, phase, setup)

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        if phase.middle == "computed":
            return super().flops_per_token(phase, counted, layers, sequence_length)
        return self.kept_layers_flops(phase, counted, layers, sequence_length)


class EloPaper(Elo):
    """ELO as published (arXiv 2601.03648): layers joined end to end, all else frozen, then a brief full fine-tune."""

    name = "elo_paper"
    label = "ELO as published"

    def __init__(self, options: Options) -> None:
        super().__init__(Options(elo=PUBLISHED))


class Full(Method):
    """Full continual pretraining: the baseline that trains everything on the same tokens."""

    name = "full"
    label = "Full CPT"
    phases = (Phase("full", "computed", rows="all", settings="full"),)


class FullAtWallTime(Full):
    """Full continual pretraining on as many tokens as fit into ELO's wall time, with a schedule of its own."""

    name = "full_at_wall_time"
    label = "Full CPT, ELO's wall time"


class EmbeddingsFirst(Method):
    """New rows of embedding and head (without any, all of them) by themselves, then everything, as EEVE begins.

    arXiv 2402.14714; the second part is `layer_alignment.share` of the tokens.
    """

    name = "embeddings_first"
    label = "Embeddings first, then full CPT"
    phases = (
        Phase("embeddings", "computed", rows="pretraining", settings="full"),
        Phase("full", "computed", rows="alignment", settings="full"),
    )
    also_train = ("embedding", "head")

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        if phase.name == "full":
            return super().prepare(model, phase, setup)
        select_layers(model, (), self.also_train)
        rows = read_new_rows(model.config)
        return Prepared(first_row=rows.start if rows else 0)

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        if phase.name == "full":
            return super().flops_per_token(phase, counted, layers, sequence_length)
        return self.kept_layers_flops(phase, counted, (), sequence_length)


class AlignOnly(Method):
    """Layer alignment without any ELO pretraining before it."""

    name = "align_only"
    label = "Alignment alone"
    phases = (Phase("layer_alignment", "computed", rows="alignment", settings="layer_alignment"),)


class Frozen(Method):
    """The same layers as ELO, trained in place with the middle frozen but computed and differentiated."""

    name = "frozen"
    label = "Frozen middle"
    phases = (Phase("frozen", "computed", rows="all", settings="full"),)

    def __init__(self, options: Options) -> None:
        self.also_train = options.elo.also_train
        self.needs_new_rows = options.elo.embedding_rows == "new"

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        return self.prepare_kept_layers(model, phase, setup)

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        return self.kept_layers_flops(phase, counted, layers, sequence_length)


class Lora(Method):
    """Low-rank adapters on all linear layers (arXiv 2106.09685) by peft, merged into the weights at the end."""

    name = "lora"
    label = "LoRA"
    phases = (Phase("lora", "computed", rows="all", settings="lora"),)

    def __init__(self, options: Options) -> None:
        self.settings = options.lora
        self.also_train = options.lora.also_train

    def check(self) -> None:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise EloError("method: lora needs peft, which is not installed; pip install 'elo-cpt[lora]'") from None
        if self.settings.divides_model:
            raise EloError(
                "method: lora is merged in one process's memory; leave fsdp and deepspeed out of its section"
            )

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        from peft import LoraConfig, LoraModel

        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules="all-linear",
        )
        with torch.random.fork_rng():
            torch.manual_seed(setup.seed)  # a restart finds the same adapters before it loads its checkpoint
            tuner = LoraModel(model, {"default": config}, "default")
        train_parts(model, self.settings.also_train)

        def fold() -> None:
            tuner.merge_and_unload(safe_merge=True)

        return Prepared(fold=fold)

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        settings = self.settings
        return counted.flops_per_token(
            "lora", sequence_length=sequence_length, lora_rank=settings.rank, also_train=settings.also_train
        ).total


class Lisa(Method):
    """LISA (arXiv 2403.17919): embedding, head and a few layers train at a time, which are drawn anew now and then."""

    name = "lisa"
    label = "LISA"
    phases = (Phase("lisa", "computed", rows="all", settings="lisa"),)

    def __init__(self, options: Options) -> None:
        self.settings = options.lisa

    def check(self) -> None:
        if world_size() > 1:
            raise EloError(
                "method: lisa changes what trains from step to step, which works in one process alone so far"
            )

    def prepare(self, model: PreTrainedModel, phase: Phase, setup: Setup) -> Prepared:
        layers = layers_of(model)
        drawn = min(self.settings.layers, len(layers))
        # The optimizer is made for whatever trains at its making: all of it, some of which has no gradient at a time.
        model.requires_grad_(True)

        def before_step(step: int, optimizer: Any) -> None:
            turn, inside = divmod(step, self.settings.period)
            generator = torch.Generator().manual_seed(setup.seed * 1_000_003 + turn)
            chosen = set(torch.randperm(len(layers), generator=generator)[:drawn].tolist())
            for index, layer in enumerate(layers):
                layer.requires_grad_(index in chosen)
                if inside == 0 and index not in chosen:
                    for parameter in layer.parameters():  # its moments would be stale when it is drawn again
                        optimizer.state.pop(parameter, None)

        return Prepared(before_step=before_step)

    def flops_per_token(self, phase: Phase, counted: Footprint, layers: Sequence[int], sequence_length: int) -> float:
        drawn = range(min(self.settings.layers, counted.num_layers))  # embedding trains, so which ones does not matter
        return counted.flops_per_token(
            "frozen", drawn, sequence_length=sequence_length, also_train=("embedding", "head")
        ).total


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Elo, EloPaper, Full, FullAtWallTime, EmbeddingsFirst, AlignOnly, Frozen, Lora, Lisa)
}


def find_method(name: str, options: Options | None = None) -> Method:
    """The method called `name`, with its options.

    Raises:
        EloError: there is none.
    """
    if name not in METHODS:
        raise EloError(f"method: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name](options or Options())


def select_layers(model: PreTrainedModel, layers: Collection[int], also_train: Collection[Part] = ()) -> None:
    """Freeze `model` but for the decoder layers at `layers` and the named parts outside them.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    model.requires_grad_(False)
    decoder_layers = layers_of(model)
    for index in layers:
        decoder_layers[index].requires_grad_(True)
    train_parts(model, also_train)


def train_parts(model: PreTrainedModel, also_train: Collection[Part]) -> None:
    """Let the named parts outside the decoder layers train.

    Raises:
        EloError: `also_train` names one of two tied parts without the other.
    """
    check_also_train(also_train, tied=find_architecture(model).tied)
    for module in modules_of(model, also_train):
        module.requires_grad_(True)


def first_new_row(model: PreTrainedModel) -> int:
    """The first row of embedding and head that `elo vocab` added.

    Raises:
        EloError: it added none, or the model's record of it is damaged.
    """
    rows = read_new_rows(model.config)
    if rows is None:
        raise EloError(
            "elo.embedding_rows: new: this model has no record of new rows; extend its vocabulary with elo vocab "
            "extend, or write all"
        )
    return rows.start
