"""A linear bridge: what stands where the middle layers stood.

Detached layers that are joined end to end learn to do without the middle, and then no longer fit it. The bridge is a
frozen affine map, fitted on the base in closed form, from what enters the middle to what leaves it, so that the
detached model computes roughly what the whole one does and its layers stay usable in it. It stands in for the forward
pass of the middle alone: as a stand-in for its gradient it is noise on real models (dev/LOG.md).
Shapes: N tokens, D hidden width.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from elo.checkpoint.architecture import find_architecture, layers_of
from elo.checkpoint.layers import Gap, gaps_between
from elo.errors import EloError
from elo.evaluate.scoring import evaluating, rope_regime, takes_position_ids

BRIDGE_FILE = "elo_bridge.safetensors"
_BATCH_TOKENS = 4096
_CHECKED_SHARE = 0.2
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Bridge:
    """Affine maps `y = x + x weight^T + bias`, one for each gap; what is stored is the change to the identity.

    Attributes:
        weights: [D, D] a gap, float32.
        biases: [D] a gap, float32.
        explained: share of the variance of the middle's change of the hidden states (relative to their size) that the
            map explains, on tokens it was not fitted on; a gap each.
    """

    gaps: tuple[Gap, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    explained: tuple[float, ...]
    cosine: tuple[float, ...] = ()
    """Cosine between the map's change of the hidden states and the middle's, on the same tokens; a gap each."""
    ridge: tuple[float, ...] = ()
    """Penalty with which each map explains most."""

    def require(self, share: float) -> None:
        """Raise EloError where a map explains less than `share` on unseen tokens."""
        for gap, explained, cosine in zip(self.gaps, self.explained, self.cosine, strict=True):
            if explained < share:
                raise EloError(
                    f"method.middle: bridged: the map over layers {gap.start} to {gap.stop - 1} explains "
                    f"{explained:.1%} of what they do to unseen text (cosine {cosine:.2f}), less than {share:.0%}; "
                    "choose more layers, write method.middle: removed, or take another method"
                )

    def save(self, path: Path) -> None:
        """Write to one safetensors file."""
        tensors = {f"{i}.weight": weight.contiguous() for i, weight in enumerate(self.weights)}
        tensors |= {f"{i}.bias": bias.contiguous() for i, bias in enumerate(self.biases)}
        record = {
            "gaps": [list(gap) for gap in self.gaps],
            "explained": list(self.explained),
            "cosine": list(self.cosine),
            "ridge": list(self.ridge),
        }
        save_file(tensors, path, metadata={"elo_bridge": json.dumps(record)})

    @classmethod
    def load(cls, path: Path) -> "Bridge":
        """Read what `save` wrote.

        Raises:
            EloError: there is no such file, or it is not a bridge.
        """
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["elo_bridge"])
                gaps = tuple(Gap(*map(int, gap)) for gap in record["gaps"])
                weights = tuple(file.get_tensor(f"{i}.weight") for i in range(len(gaps)))
                biases = tuple(file.get_tensor(f"{i}.bias") for i in range(len(gaps)))
                measured = (tuple(map(float, record[name])) for name in ("explained", "cosine", "ridge"))
                return cls(gaps, weights, biases, *measured)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise EloError(
                f"{path}: cannot be read as a bridge ({type(error).__name__}: {error}); detach again"
            ) from None


def fit_bridge(
    model: PreTrainedModel, layers: Sequence[int], rows: Iterable[dict[str, Any]], *, ridges: Sequence[float] = RIDGES
) -> Bridge:
    """Fit a bridge over each gap that `layers` leaves in `model`, by ridge regression towards the identity.

    Every token counts by its error relative to the size of its hidden state, since the norms that follow take the size
    away; otherwise the few first tokens with huge activations would be all that is fitted.

    Args:
        model: the whole base, on any device in any dtype.
        rows: `input_ids` and `position_ids` of packed rows, or `input_ids` and `attention_mask` of padded ones, [T]
            each; some thousand tokens, better 16 D of them. Every fifth batch is kept to measure on.
        ridges: penalties on the squared change, relative to the squared size of each input dimension; the one that
            explains most on unseen tokens is taken.

    Raises:
        EloError: there is no gap, or the model's layers do not pass hidden states on as one tensor.
    """
    parts = find_architecture(model)
    gaps = gaps_between(layers, parts.num_layers)
    if not gaps:
        raise EloError("method.middle: no layer is left out, so there is nothing to bridge; write middle: removed")
    fits = [_Regression() for _ in gaps]
    with evaluating(model) as device, ExitStack() as hooks:
        entering: dict[int, Tensor] = {}
        leaving: dict[int, Tensor] = {}
        for index, gap in enumerate(gaps):
            for place, kept in ((gap.start, entering), (gap.stop, leaving)):
                hooks.callback(_record_input(_module_at(model, place), kept, index).remove)
        for number, batch in enumerate(_batches(rows, model.config)):
            inputs = {"input_ids": batch["input_ids"].to(device)}
            if takes_position_ids(model) and "position_ids" in batch:
                inputs["position_ids"] = batch["position_ids"].to(device)
            text: Any = slice(None)
            if "attention_mask" in batch:
                inputs["attention_mask"] = batch["attention_mask"].to(device)
                text = inputs["attention_mask"].bool()
            model.base_model(**inputs, use_cache=False)
            for index, fit in enumerate(fits):
                x, y = (hidden.pop(index)[text] for hidden in (entering, leaving))
                fit.add(x, y, checked=number % round(1 / _CHECKED_SHARE) == 1)
    solved = [max((fit.solve(ridge) for ridge in ridges), key=lambda each: each.explained) for fit in fits]
    return Bridge(
        tuple(gaps),
        tuple(each.weight for each in solved),
        tuple(each.bias for each in solved),
        tuple(each.explained for each in solved),
        tuple(each.cosine for each in solved),
        tuple(each.ridge for each in solved),
    )


def install_bridge(detached: PreTrainedModel, bridge: Bridge) -> Callable[[], None]:
    """Let a detached model's hidden states pass the bridge where layers are missing.

    The maps are buffers that are not saved: they move with the model, but neither train nor stay in it.

    Returns:
        A function that takes the bridge out again.
    """

    def cross(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden, weight = _hidden(args, kwargs), module.elo_bridge_weight
        assert isinstance(weight, Tensor) and isinstance(module.elo_bridge_bias, Tensor)
        change = F.linear(hidden.to(weight.dtype), weight, module.elo_bridge_bias)
        return _with_hidden(args, kwargs, hidden + change.to(hidden.dtype))

    undo = ExitStack()
    for gap, weight, bias in zip(bridge.gaps, bridge.weights, bridge.biases, strict=True):
        module = _module_at(detached, gap.position)
        _hold(undo, module, elo_bridge_weight=weight, elo_bridge_bias=bias)
        undo.callback(module.register_forward_pre_hook(cross, with_kwargs=True).remove)
    return undo.close


def _hold(undo: ExitStack, module: nn.Module, **tensors: Tensor) -> None:
    device = next((parameter.device for parameter in module.parameters()), None)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.to(device), persistent=False)
        undo.callback(delattr, module, name)


class _Regression:
    """Sums for a weighted ridge regression of (y - x) on x, and the same of the tokens it is checked on."""

    def __init__(self) -> None:
        self.fitted: dict[str, Tensor] = {}
        self.checked: dict[str, Tensor] = {}

    def add(self, entering: Tensor, leaving: Tensor, *, checked: bool) -> None:
        """Add tokens: two tensors [..., D]."""
        x = entering.detach().reshape(-1, entering.shape[-1]).double()
        y = leaving.detach().reshape(-1, leaving.shape[-1]).double()
        if x.shape != y.shape:
            raise EloError(
                f"method.middle: hidden states of {list(entering.shape)} enter the middle and {list(leaving.shape)} "
                "leave it, which no linear bridge can join; write method.middle: removed"
            )
        weight = y.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        ones = torch.ones_like(weight)
        design = torch.cat([x, ones], 1) * weight
        change = (y - x) * weight
        sums = self.checked if checked else self.fitted
        for name, value in (
            ("gram", design.T @ design),
            ("cross", design.T @ change),
            ("power", change.square().sum()),
            ("total", (weight * change).sum(0)),  # for the weighted mean
            ("mass", weight.square().sum()),
        ):
            sums[name] = sums[name] + value if name in sums else value

    def solve(self, ridge: float) -> "_Solution":
        """The map for one penalty, and how well it does on the checked tokens."""
        gram, cross = self.fitted["gram"].cpu(), self.fitted["cross"].cpu()
        penalty = ridge * gram.diagonal().clone()
        penalty[-1] = 0.0  # the bias is free
        floor = 1e-9 * gram.diagonal().max()
        solution = torch.linalg.solve(gram + torch.diag(penalty + floor), cross)
        sums = {name: value.cpu() for name, value in (self.checked or self.fitted).items()}
        along, size = (solution * sums["cross"]).sum(), (solution * (sums["gram"] @ solution)).sum()
        error = sums["power"] - 2 * along + size
        variance = sums["power"] - sums["total"].square().sum() / sums["mass"]
        return _Solution(
            weight=solution[:-1].T.float().contiguous(),
            bias=solution[-1].float().contiguous(),
            explained=float(1 - error / variance) if variance > 0 else 1.0,
            cosine=float(along / (size * sums["power"]).sqrt()) if size > 0 and sums["power"] > 0 else 0.0,
            ridge=ridge,
        )


class _Solution(NamedTuple):
    """Weight [D, D] and bias [D] (float32, on CPU), and what they do on unseen tokens."""

    weight: Tensor
    bias: Tensor
    explained: float
    cosine: float
    ridge: float


def _batches(rows: Iterable[dict[str, Any]], config: PreTrainedConfig) -> Iterable[dict[str, Tensor]]:
    pending: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        pending.append(row)
        tokens += len(row["input_ids"])
        if tokens >= _BATCH_TOKENS or rope_regime(config, len(row["input_ids"])):
            yield _stack(pending)
            pending, tokens = [], 0
    if pending:
        yield _stack(pending)


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.as_tensor(row[name]) for row in rows])
        for name in ("input_ids", "position_ids", "attention_mask")
        if name in rows[0]
    }


def _module_at(model: PreTrainedModel, place: int) -> nn.Module:
    """The decoder layer at `place`, or past the last one the final norm."""
    layers = layers_of(model)
    if place < len(layers):
        return layers[place]
    path = find_architecture(model).norm_path
    if path is None:
        raise EloError("method.middle: no final norm follows the last layer; keep that layer (last:1)")
    return model.get_submodule(path)


def _record_input(module: nn.Module, kept: dict[int, Tensor], index: int) -> Any:
    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        kept[index] = _hidden(args, kwargs)

    return module.register_forward_pre_hook(record, with_kwargs=True)


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise EloError("method.middle: this model's layers do not take one tensor; write method.middle: removed")
    return hidden


def _with_hidden(args: Any, kwargs: Any, hidden: Tensor) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
