"""Count a model's parameters and matrix products from its config, without reading weights.

The model is built on PyTorch's meta device, where tensors have shapes but no memory. Counts are therefore exact for
every family that transformers can build.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from elo.checkpoint.architecture import PLAIN_LINEAR, find_architecture, modules_in
from elo.checkpoint.download import fetch_checkpoint
from elo.checkpoint.footprint import Footprint, LayerFootprint, ModuleFootprint
from elo.checkpoint.local_names import require_path_or_id
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.reading import auto_class, require_pad_row
from elo.errors import EloError
from elo.store.remote import is_remote

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-]+[\w.-]*")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_NOT_SCORES = ("linear", "lightning", "delta", "mamba", "rwkv", "recurrent")


def read_config(source: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config from a checkpoint folder, a config.json or a Hugging Face id, without reading weights.

    Raises:
        EloError: the config is missing or unreadable, or the installed transformers does not know its model_type.
    """
    if is_remote(source):
        source = fetch_checkpoint(str(source), trust_remote_code, weights=False)
    source = str(source).removeprefix("hf://")
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise EloError(f"{path}: has no config.json; give a checkpoint folder, a config.json or a Hugging Face id")
    local = path.exists()
    remedy = "give a checkpoint folder, a config.json or a Hugging Face id"
    require_path_or_id(source, remedy, "file or folder")
    if not local and (path.suffix == ".json" or not _HUB_ID.fullmatch(source)):
        raise EloError(f"model: {source}: no such file or folder; {remedy}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(path) if local else source, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a family's config class can raise any type for inconsistent values
        reason = str(error).strip().split("\n")[0]
        remedy = "give a valid transformers config" if local else "give a local folder or an id that exists on the hub"
        raise EloError(f"model: {source}: its config cannot be read ({reason}); {remedy}") from None
    require_pad_row(config, source)
    return config


def read_decoder_config(source: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the decoder's part of a model's config, like `read_config`."""
    return text_config_of(read_config(source, trust_remote_code=trust_remote_code))


def build_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of `config` without memory for its weights; `config` is not changed.

    For a multimodal wrapper, build the decoder alone if transformers has a class for it, otherwise the whole model.

    Raises:
        EloError: transformers has no causal language model for this config, or its values are inconsistent.
    """
    part = text_config_of(config)
    config = copy.deepcopy(part if type(part) in AutoModelForCausalLM._model_mapping else config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
            return model
    except Exception as error:  # a family's modeling code can raise any type for inconsistent values
        reason = str(error).strip().split("\n")[0]
        raise EloError(
            f"model: no causal language model can be built from this {config.model_type!r} config ({reason}); "
            "give the config of a causal LM"
        ) from None


def footprint(model: PreTrainedModel | PretrainedConfig, *, trust_remote_code: bool = False) -> Footprint:
    """Count a model's parameters by part. A config is built on the meta device first; a model is not changed.

    Raises:
        EloError: no causal language model can be built from the config.
        UnsupportedArchitectureError: a part of the model cannot be found.
    """
    if isinstance(model, PretrainedConfig):
        model = build_on_meta(model, trust_remote_code=trust_remote_code)
    config = text_config_of(model.config)
    seen: set[int] = set()

    def count(parameters: Iterable[nn.Parameter]) -> int:
        new = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in seen}
        seen.update(new)
        return sum(new.values())

    architecture = find_architecture(model)
    embedding_module, head_module, layer_modules = (
        model.get_submodule(path)
        for path in (architecture.embedding_path, architecture.head_path, architecture.layers_path)
    )
    embedding = count(embedding_module.parameters())
    head = count(head_module.parameters())
    assert isinstance(layer_modules, nn.ModuleList)
    layers = tuple(_layer_footprint(module, config, index) for index, module in enumerate(layer_modules))
    seen.update(id(parameter) for parameter in layer_modules.parameters())
    norm = count(model.get_submodule(architecture.norm_path).parameters()) if architecture.norm_path else 0
    head_weight = head_module.weight
    assert isinstance(head_weight, nn.Parameter)
    return Footprint(
        model_type=config.model_type,
        hidden_size=int(config.hidden_size),
        vocab_size=int(head_weight.shape[0]),
        tied=architecture.tied,
        embedding=embedding,
        head=head,
        head_matmul=head_weight.numel(),
        norm=norm,
        other=count(model.parameters()),
        layers=layers,
        softcaps=getattr(config, "final_logit_softcapping", None) is not None,
    )


def _first(config: PretrainedConfig, names: Iterable[str]) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _layer_footprint(layer: nn.Module, config: PretrainedConfig, index: int) -> LayerFootprint:
    experts = _first(config, _EXPERT_COUNTS)
    share = min(1.0, (_first(config, _EXPERTS_PER_TOKEN) or experts) / experts) if experts else 1.0
    embeddings = {id(module.weight) for module in layer.modules() if isinstance(module, nn.Embedding)}
    linear = {id(module.weight) for module in layer.modules() if type(module) in PLAIN_LINEAR}
    kinds: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    part_of = {id(each): kind for kind in kinds for module in modules_in(layer, kind) for each in module.parameters()}
    parts = dict.fromkeys(kinds, ModuleFootprint())
    parameters = active = matmul = active_matmul = lora_width = widest = 0
    for name, parameter in layer.named_parameters():
        size = parameter.numel()
        # Routed experts are one stacked tensor or a list of modules named `experts`.
        stacked = (
            parameter.ndim >= 2 and parameter.shape[0] == experts and ("expert" in name.lower() or parameter.ndim == 3)
        )
        listed = "experts" in name.split(".") and any(part.isdigit() for part in name.split("."))
        routed = experts > 0 and (stacked or listed) and "shared" not in name
        used = round(size * share) if routed else size
        parameters += size
        active += used
        multiplied = 0
        width = sum(parameter.shape) if id(parameter) in linear else 0
        # A stacked tensor of two dimensions holds the experts' biases, which are added, not multiplied.
        if parameter.ndim >= 2 and id(parameter) not in embeddings and not (stacked and routed and parameter.ndim == 2):
            matmul += size
            multiplied = used
            widest = max(widest, round(max(parameter.shape[-2:]) * (share * experts if routed else 1)))
        active_matmul += multiplied
        lora_width += width
        if kind := part_of.get(id(parameter)):
            own = parts[kind]
            parts[kind] = ModuleFootprint(own.parameters + size, own.active_matmul + multiplied, own.lora_width + width)
    score_width, window = _scores(layer, config, index)
    return LayerFootprint(parameters, active, active_matmul, matmul, lora_width, score_width, widest, window, **parts)


def _scores(layer: nn.Module, config: PretrainedConfig, index: int) -> tuple[int, int | None]:
    def softmax(module: nn.Module) -> bool:
        name = type(module).__name__.lower()
        return "attention" in name and not any(word in name for word in _NOT_SCORES)

    attention = next((module for module in layer.modules() if softmax(module)), None)
    heads = getattr(config, "num_attention_heads", None)
    if attention is None or not isinstance(heads, int) or heads < 1:
        return 0, None
    nope, rope, value = (getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if nope is not None and rope is not None and value is not None:  # latent attention (DeepSeek)
        width = heads * (nope + rope + value)
    else:
        head_width = (
            getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
        )
        width = 2 * heads * int(head_width)
    types = getattr(config, "layer_types", None)
    chunked = types is not None and "chunked" in types[index]
    slides = types is None or chunked or "sliding" in types[index]
    window = getattr(attention, "sliding_window", None)
    if chunked:  # an upper bound: a token attends within its chunk, on average to half of it
        window = getattr(config, "attention_chunk_size", None)
    elif window is None and slides:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return width, window if isinstance(window, int) and window > 0 and slides else None
