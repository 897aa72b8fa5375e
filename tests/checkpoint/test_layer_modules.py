"""Attention and feed-forward part of a decoder layer, in every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, tiny_config

from elo.checkpoint.architecture import layers_of, modules_in, require_module
from elo.checkpoint.counting import footprint
from elo.errors import EloError

WITHOUT_MLP = {"falcon_mamba", "mamba", "mamba2"}
"""Families whose layers are one token mixer."""


def hollow(name):
    model_type, particular = FAMILIES[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **particular))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_matrix_of_a_layer_is_in_one_part(name):
    """What is in neither is a norm: vectors and no matrix."""
    model = hollow(name)
    for layer in layers_of(model):
        parts = {
            kind: {id(each) for module in modules_in(layer, kind) for each in module.parameters()}
            for kind in ("attention", "mlp")
        }
        assert not parts["attention"] & parts["mlp"]
        rest = [each for each in layer.parameters() if id(each) not in parts["attention"] | parts["mlp"]]
        assert all(each.ndim == 1 for each in rest)
        one_mixer = len(list(layer.children())) == 2  # nemotron_h has one of both in each layer
        assert one_mixer or (parts["attention"] and parts["mlp"])
        assert modules_in(layer, "layer") == [layer]
    if name in WITHOUT_MLP:
        with pytest.raises(EloError, match=r"method\.module: mlp: .* have no such part; write layer"):
            require_module(model, "mlp", "method.module")
    else:
        require_module(model, "mlp", "method.module")


@pytest.mark.parametrize("name", ["llama-untied", "qwen3_moe", "gemma3", "gpt2"])
def test_the_parts_are_counted(name):
    model = hollow(name)
    for layer, counted in zip(layers_of(model), footprint(model).layers, strict=True):
        norms = sum(
            each.numel()
            for module_name, module in layer.named_modules()
            if module_name and "." not in module_name and ("norm" in module_name or "ln" in module_name)
            for each in module.parameters()
        )
        assert counted.parameters == counted.attention.parameters + counted.mlp.parameters + norms
        assert counted.active_matmul == counted.attention.active_matmul + counted.mlp.active_matmul
        assert counted.lora_width == counted.attention.lora_width + counted.mlp.lora_width
