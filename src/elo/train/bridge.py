"""A linear bridge that replaces the removed middle layers of a detached model.

If detached layers are joined end to end, training adapts them to the missing middle, and they no longer fit the whole
model. The bridge is a frozen affine map from the middle's input to its output, fitted on the base in closed form. With
it, the detached model computes roughly what the whole model does. The bridge approximates only the forward pass of the
middle. As an approximation of the middle's gradient, it is noise on real models (dev/LOG.md).
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
from elo.checkpoint.layer_outputs import entering, with_entering
from elo.checkpoint.layers import Gap, gaps_between
from elo.errors import EloError, MethodFailedError
from elo.evaluate.scoring import evaluating, rope_regime, takes_position_ids

BRIDGE_FILE = "elo_bridge.safetensors"
_BATCH_TOKENS = 4096
_CHECKED_SHARE = 0.2
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Bridge:
    """Affine maps `y = x + x weight^T + bias`, one per gap.

    Attributes:
        gaps: runs of base layers that the maps replace.
        weights: one float32 [D, D] tensor per gap.
        biases: one float32 [D] tensor per gap.
        explained: share, per gap, of the variance of the middle's change of the hidden states (relative to their size)
            that the map explains on held-out tokens.
    """

    gaps: tuple[Gap, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    explained: tuple[float, ...]
    cosine: tuple[float, ...] = ()
    """Cosine, per gap, between the map's and the middle's change of the hidden states on the held-out tokens."""
    ridge: tuple[float, ...] = ()
    """Ridge penalty of each map, chosen for the largest `explained`."""

    def require(self, share: float) -> None:
        """Raise MethodFailedError if a map explains less than `share` of the variance on held-out tokens."""
        for gap, explained, cosine in zip(self.gaps, self.explained, self.cosine, strict=True):
            if explained < share:
                raise MethodFailedError(
                    f"method.middle: bridged: the map over layers {gap.start} to {gap.stop - 1} explains "
                    f"{explained:.1%} of their effect on held-out text (cosine {cosine:.2f}), less than {share:.0%}; "
                    "choose more layers, write method.middle: removed, or choose another method"
                )

    def save(self, path: Path) -> None:
        """Write the maps to one safetensors file."""
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
        """Read a file that `save` wrote.

        Raises:
            EloError: the file cannot be read or is not a bridge.
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
    model: PreTrainedModel,
    layers: Sequence[int],
    rows: Iterable[dict[str, Any]],
    *,
    ridges: Sequence[float] = RIDGES,
    autocast_dtype: torch.dtype | None = None,
) -> Bridge:
    """Fit a bridge over each gap that `layers` leaves in `model`, by ridge regression towards the identity.

    The error of each token is relative to the size of its hidden state, because the next norm removes the size.
    Otherwise, the first tokens of documents, which have huge activations, would dominate the fit.

    Args:
        model: the whole base, on any device and in any dtype.
        layers: increasing 0-based indices of the kept layers.
        rows: `input_ids` and `position_ids` of packed sequences, or `input_ids` and `attention_mask` of padded ones,
            [T] each. Give at least a few thousand tokens, better 16 D. Every fifth batch is held out; a single batch is
            both fitted and measured.
        ridges: penalties to try on the squared change, relative to the squared size of each input dimension. The one
            that explains most on held-out tokens is used.
        autocast_dtype: autocast dtype of the model's forward; None computes in the model's dtype. The regression is in
            fp64.

    Raises:
        EloError: there is no gap, or the model's layers do not pass hidden states as one tensor of constant shape.
    """
    parts = find_architecture(model)
    gaps = gaps_between(layers, parts.num_layers)
    if not gaps:
        raise EloError(
            "method.middle: bridged: every layer is chosen, so there is no gap to bridge; choose fewer layers"
        )
    fits = [_Regression() for _ in gaps]
    with evaluating(model) as device, ExitStack() as hooks:
        before: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        for index, gap in enumerate(gaps):
            for place, kept in ((gap.start, before), (gap.stop, after)):
                hooks.callback(_record_input(_module_at(model, place), kept, index).remove)
        for number, batch in enumerate(_batches(rows, model.config)):
            inputs = {"input_ids": batch["input_ids"].to(device)}
            if takes_position_ids(model) and "position_ids" in batch:
                inputs["position_ids"] = batch["position_ids"].to(device)
            text: Any = slice(None)
            if "attention_mask" in batch:
                inputs["attention_mask"] = batch["attention_mask"].to(device)
                text = inputs["attention_mask"].bool()
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                model.base_model(**inputs, use_cache=False)
            for index, fit in enumerate(fits):
                x, y = (hidden.pop(index)[text] for hidden in (before, after))
                fit.add(x, y, checked=number % round(1 / _CHECKED_SHARE) == 1)
    solved = [max((fit.solve(ridge) for ridge in ridges), key=lambda each: each.explained) for fit in fits]
    return Bridge(tuple(gaps), *zip(*solved, strict=True))


def install_bridge(detached: PreTrainedModel, bridge: Bridge) -> Callable[[], None]:
    """Install the maps of a bridge in a detached model, in place of the removed layers.

    The maps are non-persistent buffers, which move with the model but are neither trained nor saved.

    Returns:
        A function that removes the bridge.
    """

    def cross(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden, weight = _hidden(args, kwargs), module.elo_bridge_weight
        assert isinstance(weight, Tensor) and isinstance(module.elo_bridge_bias, Tensor)
        change = F.linear(hidden.to(weight.dtype), weight, module.elo_bridge_bias)
        return with_entering(args, kwargs, hidden + change.to(hidden.dtype))

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
    """Sums over tokens for a weighted ridge regression of (y - x) on x; those of held-out tokens are `checked`."""

    def __init__(self) -> None:
        self.fitted: dict[str, Tensor] = {}
        self.checked: dict[str, Tensor] = {}

    def add(self, before: Tensor, after: Tensor, *, checked: bool) -> None:
        """Add the hidden states [..., D] of some tokens before and after the middle."""
        x = before.detach().reshape(-1, before.shape[-1]).double()
        y = after.detach().reshape(-1, after.shape[-1]).double()
        if x.shape != y.shape:
            raise EloError(
                f"method.middle: bridged: hidden states have shape {list(before.shape)} before the middle and "
                f"{list(after.shape)} after it; write method.middle: removed"
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
        """Return the map for one penalty, with its quality on the held-out tokens."""
        gram, cross = self.fitted["gram"].cpu(), self.fitted["cross"].cpu()
        penalty = ridge * gram.diagonal().clone()
        penalty[-1] = 0.0  # no penalty on the bias
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
    """Weight [D, D] and bias [D] of one map (float32, on the CPU), and its quality as in `Bridge`."""

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
    """Return the decoder layer at `place`, or the final norm after the last layer."""
    layers = layers_of(model)
    if place < len(layers):
        return layers[place]
    path = find_architecture(model).norm_path
    if path is None:
        raise EloError("method.middle: this model has no final norm after the last layer; add last:1 to layers")
    return model.get_submodule(path)


def _record_input(module: nn.Module, kept: dict[int, Tensor], index: int) -> Any:
    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        kept[index] = _hidden(args, kwargs)

    return module.register_forward_pre_hook(record, with_kwargs=True)


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden = entering(args, kwargs)
    if not isinstance(hidden, Tensor):
        raise EloError("method.middle: this model's layers do not take a single tensor; write method.middle: removed")
    return hidden
