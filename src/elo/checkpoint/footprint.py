"""Parameter counts of a model and the cost of a trained token; elo.checkpoint.counting computes them from a config.

FLOPs (floating-point operations) count matrix products; a multiply-add is two. Conventions follow Kaplan et al. (2020,
section 2.1) and PaLM (2022, appendix B). Per token, a weight of P elements costs 2P in the forward pass, 2P for the
input gradient and 2P for the weight gradient. Norms, activations, rotary embeddings, scans and convolutions are not
counted, except for their weights.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from elo.checkpoint.architecture import LayerModule
from elo.checkpoint.layers import gaps_between

Middle = Literal["removed", "bridged", "frozen", "adapted", "trained"]
"""How a phase treats the decoder layers that are not selected for training.

`removed`: they are detached, and the kept layers are joined end to end. `bridged`: they are detached, and a frozen
linear map fills each gap. `frozen`: they are computed but do not train. `adapted`: every layer is frozen and has
trainable low-rank adapters. `trained`: every parameter trains.
"""


class ModuleFootprint(NamedTuple):
    """Element counts of a part of a decoder layer; fields as in `LayerFootprint`."""

    parameters: int = 0
    active_matmul: int = 0
    lora_width: int = 0


_NOTHING = ModuleFootprint()


@dataclass(frozen=True)
class LayerFootprint:
    """Element counts of one decoder layer."""

    parameters: int
    active_parameters: int
    """Parameters that one token uses: all except the routed experts that it is not sent to."""
    active_matmul: int
    """Elements of the weight matrices that multiply one token."""
    matmul: int
    """Elements of all weight matrices, including every expert."""
    lora_width: int
    """Inputs plus outputs, summed over the plain linear layers. Low-rank adapters of rank r have r times as many
    parameters."""
    score_width: int
    """Heads x (query width + value width); 0 if the layer has no softmax attention."""
    widest: int
    """Largest number of outputs of one matrix product, per token."""
    window: int | None
    """Number of tokens that a position can attend to; None if it is the whole sequence."""
    attention: ModuleFootprint = _NOTHING
    mlp: ModuleFootprint = _NOTHING

    def part(self, module: LayerModule) -> ModuleFootprint:
        """Return the counts of the layer or of a part of it."""
        whole = ModuleFootprint(self.parameters, self.active_matmul, self.lora_width)
        return {"layer": whole, "attention": self.attention, "mlp": self.mlp}[module]

    def score_flops(self, sequence_length: int) -> float:
        """Count the forward FLOPs per token of Q K^T and P V: 2 x score_width x attended tokens.

        The count is a mean over a causal sequence, in which position t attends to min(t + 1, window) tokens. A
        `sequence_length` of 0 gives 0.
        """
        if sequence_length < 1:
            return 0.0
        window = min(self.window or sequence_length, sequence_length)
        attended = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        return 2.0 * self.score_width * attended


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token."""

    forward: float
    backward: float
    recompute: float
    """Forward FLOPs repeated by activation checkpointing."""
    head: float
    """The LM head's part of `forward` and `backward`."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute

    def mixed(self, other: "Flops", share: float) -> "Flops":
        """Return the mean if `share` of the tokens cost this count and the others cost `other`."""
        return Flops(*(share * a + (1 - share) * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def mean(cls, counts: Sequence["Flops"]) -> "Flops":
        """Return the mean of several counts."""
        return cls(*(sum(values) / len(counts) for values in zip(*map(astuple, counts), strict=True)))


@dataclass(frozen=True)
class Footprint:
    """Parameter counts of a causal language model by part; a tied head is counted once, under `embedding`."""

    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    embedding: int
    head: int
    head_matmul: int
    """Elements of the LM head's weight matrix, tied or not."""
    norm: int
    other: int
    """Parameters outside layers, token embedding, final norm and head, such as position embeddings and projections."""
    layers: tuple[LayerFootprint, ...]
    softcaps: bool = False
    """Whether the logits are soft-capped; the head's loss then keeps them twice."""

    @cached_property
    def total(self) -> int:
        return self.outside + sum(layer.parameters for layer in self.layers)

    @property
    def outside(self) -> int:
        """Parameters outside the decoder layers."""
        return self.embedding + self.head + self.norm + self.other

    @property
    def active(self) -> int:
        """Parameters that one token uses; equal to `total` without routed experts."""
        return self.outside + sum(layer.active_parameters for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def detached(self, layers: Iterable[int]) -> "Footprint":
        """Return the footprint of the model with only these layers."""
        return replace(self, layers=tuple(self.layers[index] for index in layers))

    def with_vocabulary(self, rows: int) -> "Footprint":
        """Return the footprint with `rows` vocabulary rows in both embedding and head."""

        def grown(elements: int) -> int:
            return elements // self.vocab_size * rows

        return replace(
            self,
            vocab_size=rows,
            embedding=grown(self.embedding),
            head=grown(self.head),
            head_matmul=grown(self.head_matmul),
        )

    def lora_parameters(self, rank: int | Sequence[int], module: LayerModule = "layer") -> int:
        """Count low-rank adapters on every dense matrix of a module of every layer: rank x (inputs + outputs).

        Args:
            rank: one rank for all layers, or one for each.
        """
        ranks = self._ranks(rank)
        return sum(own * layer.part(module).lora_width for own, layer in zip(ranks, self.layers, strict=True))

    def _ranks(self, rank: int | Sequence[int]) -> Sequence[int]:
        return [rank] * self.num_layers if isinstance(rank, int) else rank

    def bridge_elements(self, layers: Sequence[int]) -> int:
        """Count the elements of the bridge's maps (elo.train.bridge): hidden size squared for each gap in `layers`."""
        return self.hidden_size**2 * len(gaps_between(layers, self.num_layers))

    def trainable(
        self,
        middle: Middle,
        layers: Sequence[int] | None = None,
        *,
        lora_rank: int | Sequence[int] = 0,
        also_train: Collection[str] = (),
        module: LayerModule = "layer",
    ) -> int:
        """Count the parameters that train; arguments as in `flops_per_token`."""
        if middle == "trained":
            return self.outside + sum(layer.part(module).parameters for layer in self.layers)
        # self.head is 0 for a tied head, so its weights are not counted twice.
        parts = {"embedding": self.embedding, "head": self.head, "norm": self.norm}
        outside = sum(parts[part] for part in set(also_train))
        if middle == "adapted":
            return self.lora_parameters(lora_rank, module) + outside
        chosen = range(self.num_layers) if layers is None else layers
        return sum(self.layers[index].part(module).parameters for index in chosen) + outside

    def flops_per_token(
        self,
        middle: Middle,
        layers: Sequence[int] | None = None,
        *,
        sequence_length: int = 0,
        activation_checkpointing: bool = False,
        lora_rank: int | Sequence[int] = 0,
        also_train: Collection[str] = (),
        module: LayerModule = "layer",
        num_losses: int = 1,
    ) -> Flops:
        """Count the matrix-product FLOPs of one trained token.

        Args:
            middle: treatment of the layers that are not in `layers`.
            layers: indices of the decoder layers that train; None means all (for a model that is already detached).
            sequence_length: T of the attention scores; 0 counts weights only.
            activation_checkpointing: whether each layer's forward is computed again before its backward. PyTorch skips
                the layer's last product then, so the true count is up to 7 % lower.
            lora_rank: rank of the adapters (LoRA, Hu et al. 2021) on every dense matrix of every layer, if the middle
                is `adapted`; one for all layers, or one for each.
            also_train: parts that train with `layers`. With `embedding`, input gradients continue down to it. With
                `head`, the head's weight gradient is counted. `norm` adds nothing.
            module: part of each trained layer that trains or has adapters. Input gradients are counted for the whole
                layer.
            num_losses: how many hidden states of a token go through the head: the last, and those of supervised layers.

        A layer of P elements costs:

        - 2P for the forward,
        - 2P for the input gradient, if anything at or below the layer trains,
        - 2P for the weight gradient, if the layer trains.

        The backward of attention scores costs twice their forward. Layers below the lowest trained layer have no
        backward. The lowest trained layer needs input gradients even over a frozen embedding: the gradient of its
        input norm's weight comes through the query, key and value products. (If the norm follows the products, as in
        OLMo 2, the count is about 1 % too high.) A frozen head and a bridge have a forward and an input gradient.
        """
        everything = range(self.num_layers)
        chosen = set(everything if layers is None or middle in ("trained", "adapted") else layers)
        computed = sorted(chosen) if middle in ("removed", "bridged") else list(everything)
        ranks = self._ranks(lora_rank)
        forward = backward = recompute = 0.0
        gradient_below = middle == "trained" or "embedding" in also_train
        for index in computed:
            layer = self.layers[index]
            scores = layer.score_flops(sequence_length)
            weights = 2.0 * layer.active_matmul
            adapters = 2.0 * ranks[index] * layer.part(module).lora_width if middle == "adapted" else 0.0
            gradient_below = gradient_below or (index in chosen and (middle != "adapted" or adapters > 0))
            forward += weights + adapters + scores
            if gradient_below:
                trains_weights = index in chosen and middle != "adapted"
                own = 2.0 * layer.part(module).active_matmul if trains_weights else 0.0
                backward += weights + own + 2 * adapters + 2 * scores
                recompute += (weights + adapters + scores) if activation_checkpointing else 0.0
        if middle == "bridged":
            maps = 2.0 * self.bridge_elements(sorted(chosen))
            forward, backward = forward + maps, backward + maps
        head_forward = 2.0 * self.head_matmul * num_losses
        gradient_at_head = gradient_below or "norm" in also_train
        head_backward = head_forward * (int(gradient_at_head) + int(middle == "trained" or "head" in also_train))
        return Flops(forward + head_forward, backward + head_backward, recompute, head_forward + head_backward)
