"""Where a model keeps its embedding, decoder layers, final norm and head: found by asking the model."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from elo.checkpoint import quirks
from elo.checkpoint.model_config import num_layers_of
from elo.errors import UnsupportedArchitectureError

# Token mixers that carry a state along the sequence: position ids cannot keep packed documents apart in them.
_RECURRENT = re.compile(
    r"mamba|(?-i:SSM)|rwkv|xlstm|mlstm|deltanet|deltarule|linearattention|lightningattention|shortconv|rglru|recurrent"
    r"|retention|conv1d",
    re.IGNORECASE,
)
_PLAIN_CONV = {"Conv1D"}  # transformers' name for a transposed linear layer (GPT-2)
_FINAL_NORM = re.compile(r"^(?!.*emb)(.*norm.*|ln|ln_f|ln_out|ln_post)$", re.IGNORECASE)


@dataclass(frozen=True)
class Architecture:
    """Dotted module paths, as `model.get_submodule` takes them."""

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
        UnsupportedArchitectureError: a part cannot be told apart.
    """
    model_type = model.config.model_type
    num_layers = num_layers_of(model.config)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = _ask(model, "get_input_embeddings"), _ask(model, "get_output_embeddings")
    if embedding is None or id(embedding) not in names:
        raise UnsupportedArchitectureError(f"model type {model_type!r}: the model does not name its token embedding")
    if head is None or id(head) not in names:
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: {type(model).__name__} has no language-model head"
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
    """The model's decoder layers."""
    layers = model.get_submodule(find_architecture(model).layers_path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def modules_of(model: PreTrainedModel, parts: Collection[str]) -> list[nn.Module]:
    """The modules of these parts outside the decoder layers: "embedding", "norm", "head"; those that the model has."""
    found = find_architecture(model)
    paths = {"embedding": found.embedding_path, "norm": found.norm_path, "head": found.head_path}
    return [model.get_submodule(path) for part in parts if (path := paths[part]) is not None]


def tensor_groups(model: PreTrainedModel) -> dict[str, str]:
    """The tensors of the "embedding", "head" and "norm" by their names in the model's state dict.

    A tensor that is shared with one of these parts, but is called otherwise, belongs to it as well. For names in files
    see elo.checkpoint.naming.NameMap.group.
    """
    parts = find_architecture(model)
    paths = {"embedding": parts.embedding_path, "head": parts.head_path, "norm": parts.norm_path}
    state = model.state_dict(keep_vars=True)
    groups = {name: group for name in state for group, path in paths.items() if path and name.startswith(f"{path}.")}
    shared = {id(state[name]): group for name, group in groups.items()}
    return {name: groups.get(name) or shared[id(t)] for name, t in state.items() if name in groups or id(t) in shared}


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a decoder layer mixes tokens other than by attention (state space, linear attention, convolution).

    Such layers see across document boundaries in a packed row, whatever the position ids say.
    """
    return any(
        type(module).__name__ not in _PLAIN_CONV
        and (_RECURRENT.search(type(module).__name__) or isinstance(module, nn.Conv1d))
        for module in layers_of(model).modules()
    )


def _ask(model: PreTrainedModel, method: str) -> nn.Module | None:
    # Families without a part leave its getter out or let it fail; None lets the caller say what is missing.
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
    decoder = _ask(model, "get_decoder")
    inside = next((name for name, module in model.named_modules() if name and module is decoder), "")
    lists = [name for name in lists if name.startswith(f"{inside}.")] or lists  # else a vision tower's are among them
    # Lists within a decoder layer (experts, heads) are not the layers.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UnsupportedArchitectureError(
            f"model type {model.config.model_type!r}: its {num_layers} decoder layers are not one list of modules "
            f"(lists of that length: {found}), so they cannot be detached one by one"
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
