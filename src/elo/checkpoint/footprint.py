"""What a model holds and what a trained token costs: numbers alone, which elo.checkpoint.counting makes from a config.

FLOPs are those of matrix products (a multiply and an add are two), the convention of Kaplan et al. (2020, section 2.1)
and of PaLM (2022, appendix B): per token, a weight of P elements costs 2P forward, 2P for the gradient with respect to
its input and 2P for its own gradient. Norms, activations, rotary embeddings, scans and convolutions (but for their
weights) are not counted.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Literal

from elo.checkpoint.layers import gaps_between

Middle = Literal["removed", "bridged", "frozen", "adapted", "trained"]
"""What becomes of the decoder layers that are not chosen to train.

`removed`: they are detached, and what is kept is joined end to end. `bridged`: they are detached, and a frozen linear
map stands in each gap. `frozen`: they are computed and do not train. `adapted`: every layer is frozen and has trainable
low-rank adapters. `trained`: every parameter trains.
"""


@dataclass(frozen=True)
class LayerFootprint:
    """One decoder layer: counts of elements; what follows `matmul` is per token."""

    parameters: int
    active_parameters: int
    """Parameters a token uses: all but the routed experts it is not sent to."""
    active_matmul: int
    """Elements of the weight matrices that a token is multiplied with."""
    matmul: int
    """Elements of all weight matrices, every expert counted."""
    lora_width: int
    """Sum of inputs and outputs of the dense weight matrices; times r it counts a LoRA of rank r on each."""
    score_width: int
    """Heads x (width of a query + width of a value); 0 where the layer has no softmax attention."""
    widest: int
    """The most numbers that one product gives for a token."""
    window: int | None
    """Tokens a position can attend to, when fewer than the sequence."""

    def score_flops(self, sequence_length: int) -> float:
        """Forward FLOPs per token of Q K^T and P V: 2 x score_width x tokens attended to.

        Averaged over a causal sequence, in which position t attends to min(t + 1, window) tokens: half the square, as a
        causal kernel computes it. 0 when `sequence_length` is 0.
        """
        if sequence_length < 1:
            return 0.0
        window = min(self.window or sequence_length, sequence_length)
        attended = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        return 2.0 * self.score_width * attended


@dataclass(frozen=True)
class Flops:
    """FLOPs for one token; `recompute` is what activation checkpointing computes again, `head` the LM head's part."""

    forward: float
    backward: float
    recompute: float
    head: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute

    def mixed(self, other: "Flops", share: float) -> "Flops":
        """The mean where this is the count of a `share` of the tokens, and `other` that of the rest."""
        return Flops(*(share * a + (1 - share) * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def mean(cls, counts: Sequence["Flops"]) -> "Flops":
        """The mean of several counts."""
        return cls(*(sum(values) / len(counts) for values in zip(*map(astuple, counts), strict=True)))


@dataclass(frozen=True)
class Footprint:
    """Parameter counts of a causal language model, by part. A tied head is counted once, under `embedding`."""

    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    embedding: int
    head: int
    head_matmul: int
    """Elements the LM head multiplies with, own or tied."""
    norm: int
    other: int
    """Parameters outside layers, token embedding, final norm and head: position embeddings, projections."""
    layers: tuple[LayerFootprint, ...]
    softcaps: bool = False
    """Whether the logits are soft-capped, for which the head's loss keeps them twice."""

    @cached_property
    def total(self) -> int:
        return self.outside + sum(layer.parameters for layer in self.layers)

    @property
    def outside(self) -> int:
        """Parameters outside the decoder layers."""
        return self.embedding + self.head + self.norm + self.other

    @property
    def active(self) -> int:
        """Parameters a token uses; equals `total` without routed experts."""
        return self.outside + sum(layer.active_parameters for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def detached(self, layers: Iterable[int]) -> "Footprint":
        """The footprint of the model with only these layers kept."""
        return replace(self, layers=tuple(self.layers[index] for index in layers))

    def with_vocabulary(self, rows: int) -> "Footprint":
        """The footprint with so many rows in embedding and head, which have as many as each other."""

        def grown(elements: int) -> int:
            return elements // self.vocab_size * rows

        return replace(
            self,
            vocab_size=rows,
            embedding=grown(self.embedding),
            head=grown(self.head),
            head_matmul=grown(self.head_matmul),
        )

    def parameters(self) -> dict[str, int | list[int]]:
        """Counts for a record: total, active (per token), embedding, head (0 when tied), norm, other, one a layer."""
        return {
            "total": self.total,
            "active": self.active,
            "embedding": self.embedding,
            "head": self.head,
            "norm": self.norm,
            "other": self.other,
            "layers": [layer.parameters for layer in self.layers],
        }

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of `rank` on every dense matrix of every layer: rank x (inputs + outputs)."""
        return rank * sum(layer.lora_width for layer in self.layers)

    def bridge_elements(self, layers: Sequence[int]) -> int:
        """Elements of the bridge's maps (elo.train.bridge): one of hidden size squared over each gap in `layers`."""
        return self.hidden_size**2 * len(gaps_between(layers, self.num_layers))

    def trainable(
        self,
        middle: Middle,
        layers: Sequence[int] | None = None,
        *,
        lora_rank: int = 0,
        also_train: Collection[str] = (),
    ) -> int:
        """Parameters that train; arguments as in `flops_per_token`."""
        if middle == "trained":
            return self.total
        # A tied head's own count is 0, so that it is not counted twice.
        parts = {"embedding": self.embedding, "head": self.head, "norm": self.norm}
        outside = sum(parts[part] for part in set(also_train))
        if middle == "adapted":
            return self.lora_parameters(lora_rank) + outside
        chosen = range(self.num_layers) if layers is None else layers
        return sum(self.layers[index].parameters for index in chosen) + outside

    def flops_per_token(
        self,
        middle: Middle,
        layers: Sequence[int] | None = None,
        *,
        sequence_length: int = 0,
        activation_checkpointing: bool = False,
        lora_rank: int = 0,
        also_train: Collection[str] = (),
    ) -> Flops:
        """Matmul FLOPs of one trained token.

        Args:
            middle: what becomes of the layers that are not in `layers`.
            layers: indices of the decoder layers that train; all when None (a model that is detached already).
            sequence_length: T of the attention scores; 0 counts the weights alone.
            activation_checkpointing: each layer's forward is computed again before its backward. (PyTorch then skips
                the layer's last product, whose output nothing keeps: up to 7 % less than counted here.)
            lora_rank: rank of the adapters (Hu et al. 2021) on every dense matrix of every layer, where the middle is
                `adapted`.
            also_train: parts that train with `layers`. With `embedding` an input gradient has to reach it; with `head`
                the head's weight gradient is computed too; `norm` costs nothing that is counted.

        A layer costs 2P forward; 2P for the input gradient where anything at or below it trains; 2P for the weight
        gradient where it trains; the scores' backward is twice their forward. Nothing below the lowest trained layer
        has a backward. That layer pays for its input gradients although the frozen embedding below needs none: its
        input norm has a weight, whose gradient comes through the query, key and value products. (Where the norm comes
        after, as in OLMo 2, this counts about 1 % too much.) A frozen head has a forward and an input gradient. A
        bridge has a forward and an input gradient.
        """
        everything = range(self.num_layers)
        chosen = set(everything if layers is None or middle in ("trained", "adapted") else layers)
        computed = sorted(chosen) if middle in ("removed", "bridged") else list(everything)
        forward = backward = recompute = 0.0
        gradient_below = middle == "trained" or "embedding" in also_train
        for index in computed:
            layer = self.layers[index]
            scores = layer.score_flops(sequence_length)
            weights = 2.0 * layer.active_matmul
            adapters = 2.0 * lora_rank * layer.lora_width if middle == "adapted" else 0.0
            gradient_below = gradient_below or index in chosen
            forward += weights + adapters + scores
            if gradient_below:
                trains_weights = index in chosen and middle != "adapted"
                backward += weights * (2 if trains_weights else 1) + 2 * adapters + 2 * scores
                recompute += (weights + adapters + scores) if activation_checkpointing else 0.0
        if middle == "bridged":
            maps = 2.0 * self.bridge_elements(sorted(chosen))
            forward, backward = forward + maps, backward + maps
        head_forward = 2.0 * self.head_matmul
        gradient_at_head = gradient_below or "norm" in also_train
        head_backward = head_forward * (int(gradient_at_head) + int(middle == "trained" or "head" in also_train))
        return Flops(forward + head_forward, backward + head_backward, recompute, head_forward + head_backward)
