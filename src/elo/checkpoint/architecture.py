"""Find a model's embedding, decoder layers, final norm and head from the model itself."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elo.checkpoint import quirks
from elo.checkpoint.model_config import num_layers_of
from elo.errors import EloError, UnsupportedArchitectureError

# Token mixers that carry a state along the sequence, or pool windows of it (DeepSeek V4). Position ids cannot separate
# packed documents in them.
_RECURRENT = re.compile(
    r"mamba|(?-i:SSM)|rwkv|xlstm|mlstm|deltanet|deltarule|linearattention|lightningattention|shortconv|rglru|recurrent"
    r"|retention|conv1d|compressor",
    re.IGNORECASE,
)
_PLAIN_CONV = {"Conv1D"}  # transformers' name for a transposed linear layer (GPT-2)
_NORM_NAME = re.compile(r"norm|^ln|_ln$", re.IGNORECASE)
_MLP_NAME = re.compile(r"mlp|feed_?forward|ffn|moe|^fc\d", re.IGNORECASE)
_MLP_CLASS = re.compile(r"(MLP|Mlp|MoE|Moe|FeedForward)$")
_FINAL_NORM = re.compile(r"^(?!.*emb)(.*norm.*|ln|ln_f|ln_out|ln_post)$", re.IGNORECASE)

PLAIN_LINEAR = (nn.Linear, Conv1D)
"""Linear layers that can have adapters. Subclasses cannot: some, such as routers, return more than one tensor."""
LayerModule = Literal["layer", "attention", "mlp"]
"""A decoder layer, its attention (or other token mixer), or its feed-forward part (experts included)."""


@dataclass(frozen=True)
class Architecture:
    """Parts of a model; paths are dotted module names, as `model.get_submodule` takes them."""

    model_type: str
    layers_path: str
    embedding_path: str
    norm_path: str | None
    head_path: str
    num_layers: int
    tied: bool


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find the parts of a decoder-only causal LM.

    Raises:
        UnsupportedArchitectureError: a part cannot be found.
    """
    model_type = model.config.model_type
    num_layers = num_layers_of(model.config)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = _module_from(model, "get_input_embeddings"), _module_from(model, "get_output_embeddings")
    if embedding is None or id(embedding) not in names:
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: get_input_embeddings() does not return a token embedding; "
            "choose a model of another architecture"
        )
    if head is None or id(head) not in names:
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: {type(model).__name__} has no language-model head; choose a causal LM"
        )
    layers_path = _layers_path(model, num_layers)
    tied = getattr(head, "weight", None) is not None and head.weight is getattr(embedding, "weight", None)
    return Architecture(
        model_type=model_type,
        layers_path=layers_path,
        embedding_path=names[id(embedding)],
        norm_path=_norm_path(model, layers_path, names[id(head)]),
        head_path=names[id(head)],
        num_layers=num_layers,
        tied=tied,
    )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers."""
    layers = model.get_submodule(find_architecture(model).layers_path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def modules_in(layer: nn.Module, which: LayerModule) -> list[nn.Module]:
    """Return the modules of a part of a decoder layer; an empty list if the layer has no such part.

    The layer's norms belong to neither attention nor feed-forward part.
    """
    if which == "layer":
        return [layer]
    found: list[nn.Module] = []
    for name, child in layer.named_children():
        if _NORM_NAME.search(name) or next(child.parameters(), None) is None:
            continue
        is_mlp = bool(_MLP_NAME.search(name) or _MLP_CLASS.search(type(child).__name__))
        if is_mlp == (which == "mlp"):
            found += child if isinstance(child, nn.ModuleList) else [child]
    return found


def require_module(model: PreTrainedModel, which: LayerModule, setting: str) -> None:
    """Raise EloError, naming `setting`, if no decoder layer of the model has this part."""
    if not any(modules_in(layer, which) for layer in layers_of(model)):
        raise EloError(f"{setting}: {which}: the layers of {model.config.model_type} have no such part; write layer")


def modules_of(model: PreTrainedModel, parts: Collection[str]) -> list[nn.Module]:
    """Return the modules of the named parts ("embedding", "norm", "head"), without parts that the model lacks."""
    found = find_architecture(model)
    paths = {"embedding": found.embedding_path, "norm": found.norm_path, "head": found.head_path}
    return [model.get_submodule(path) for part in parts if (path := paths[part]) is not None]


def tensor_groups(model: PreTrainedModel) -> dict[str, str]:
    """Map state-dict names to "embedding", "head" or "norm"; names of other tensors are left out.

    A tensor shared with one of these parts belongs to it under every name. For names in files, see
    elo.checkpoint.naming.NameMap.group.
    """
    parts = find_architecture(model)
    paths = {"embedding": parts.embedding_path, "head": parts.head_path, "norm": parts.norm_path}
    state = model.state_dict(keep_vars=True)
    groups = {name: group for name in state for group, path in paths.items() if path and name.startswith(f"{path}.")}
    shared = {id(state[name]): group for name, group in groups.items()}
    return {name: groups.get(name) or shared[id(t)] for name, t in state.items() if name in groups or id(t) in shared}


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether a decoder layer mixes tokens without attention (state space, convolution, pooling and others).

    Such layers see across document boundaries in a packed sequence, even with separate position ids.
    """
    return any(
        type(module).__name__ not in _PLAIN_CONV
        and (_RECURRENT.search(type(module).__name__) or isinstance(module, nn.Conv1d))
        for module in layers_of(model).modules()
    )


def _module_from(model: PreTrainedModel, method: str) -> nn.Module | None:
    # A family without this part may lack the getter or raise in it. The caller reports what is missing.
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None


def _layers_path(model: PreTrainedModel, num_layers: int) -> str:
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and next(module.parameters(), None) is not None
    ]
    decoder = _module_from(model, "get_decoder")
    inside = next((name for name, module in model.named_modules() if name and module is decoder), "")
    lists = [name for name in lists if name.startswith(f"{inside}.")] or lists  # excludes a vision tower's layers
    # Lists inside a decoder layer hold experts or heads.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UnsupportedArchitectureError(
            f"model type {model.config.model_type!r}: expected one list of {num_layers} decoder layers, found {found}; "
            "choose a model whose layers are one nn.ModuleList"
        )
    return outermost[0]


def _norm_path(model: PreTrainedModel, layers_path: str, head_path: str) -> str | None:
    parent_path, _, layers_name = layers_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    children = [name for name, _ in parent.named_children()]
    ordered = children[children.index(layers_name) + 1 :] + children[: children.index(layers_name)]
    known = quirks.NORM_NAMES.get(model.config.model_type)
    found = next((name for name in ordered if name == known or (not known and _FINAL_NORM.search(name))), None)
    return f"{parent_path}.{found}" if found and parent_path else found
