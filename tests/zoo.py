"""The checkpoint zoo: tiny configurations of decoder-only families, four layers of width 32 each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elo.checkpoint.architecture import layers_of

# Keys are taken where a family has them.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 4),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"], 8),
    **dict.fromkeys(["q_lora_rank", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["index_topk", "mamba_d_state", "chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "vocab_size"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "index_n_heads", "mamba_expand"], 2),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"], 1),
    **dict.fromkeys(["sliding_window", "attention_window_size", "linear_num_value_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["linear_conv_kernel_dim", "mamba_d_conv"], 4),
    "mamba_d_head": 16,
    "num_dense_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_MIXED = {"layer_types": [_SLIDING, _FULL, _FULL, _SLIDING]}
_MLA = {"num_key_value_heads": 4}

# Name -> (model type, what is particular). Types of layers are laid so that (0, -1) is not a prefix of the pattern.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "apertus": ("apertus", {}),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3]}),
    "bloom": ("bloom", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", _MIXED),
    "deepseek_v2": ("deepseek_v2", _MLA),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "dots1": ("dots1", {}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 2}),
    "exaone4": ("exaone4", _MIXED),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64}),
    "falcon_mamba": ("falcon_mamba", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _MIXED),
    "gemma3": ("gemma3_text", _MIXED),
    "gemma4": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "layer_types": [_SLIDING, _FULL] * 2},
    ),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "glm_moe_dsa": ("glm_moe_dsa", {**_MLA, "indexer_types": ["full", "shared", "full", "full"]}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", _MIXED),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "granite": ("granite", {}),
    "granite_swa": ("granite_swa", {"layer_rope_theta": [1e4, 1e3, 1e2, 1e5]}),
    "granitemoe": ("granitemoe", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 8},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", _FULL, _FULL, "conv"]}),
    "llama4": (
        "llama4_text",
        {"no_rope_layers": [1, 0, 1, 0], "moe_layers": [1, 3], "attention_chunk_size": 4, "intermediate_size_mlp": 48},
    ),
    "longcat_flash": ("longcat_flash", {**_MLA, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "state_size": 8, "n_groups": 1}),
    "minicpm3": ("minicpm3", _MLA),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", _FULL, "mamba"],
            "mamba_num_heads": 4,
            "n_groups": 1,
            "mamba_head_dim": 16,
        },
    ),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _MIXED),
    "olmoe": ("olmoe", {}),
    "opt": ("opt", {"word_embed_proj_dim": 16}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2_moe": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    "qwen3_next": ("qwen3_next", {"layer_types": [_LINEAR, _FULL, _FULL, _LINEAR]}),
    "recurrent_gemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention", "attention"]}),
    "rwkv": ("rwkv", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "xglm": ("xglm", {}),
    "xlstm": ("xlstm", {"num_blocks": 4, "num_heads": 2}),
}

# Name -> (model type, what is particular, selection, words that the refusal must contain).
REFUSALS: dict[str, tuple[str, dict[str, Any], Sequence[int], str]] = {
    "beam": ("beam", {}, (0, -1), "residual_add_idx"),
    "bert": ("bert", {}, (0, -1), "attends in both directions"),
    "diffllama": ("diffllama", {}, (0, -1), "lambda_init"),
    "gemma3n": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 2,
            "intermediate_size": 48,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "layer_types": [_SLIDING, _FULL] * 2,
        },
        (0, -1),
        "reuse the keys and values",
    ),
    "gemma4-last": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "layer_types": [_SLIDING, _FULL] * 2},
        (1, 2),
        "layer_types",
    ),
    "gpt2-inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, (0, -1), "scaling"),
    "hy_v4-shared": ("hy_v4", {**_MLA, "indexer_types": ["full", "shared", "full", "shared"]}, (0, -1), "layer 2"),
    "minimax": ("minimax", {}, (0, -1), "decay has other values"),
    "rwkv": ("rwkv", {}, (1, 2), "pre_ln"),
    "zaya": ("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}, (0, -1), "router state"),
    "zamba2": (
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "adapter_rank": 4,
        },
        (0, -1),
        "share one set of weights",
    ),
}


def tiny_config(model_type: str, **particular: Any) -> PretrainedConfig:
    """A small configuration of a family."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = {**dict.fromkeys(config_class.attribute_map), **vars(default)}
    keys = {key: value for key, value in _SMALL.items() if key in known}
    return config_class(**{**keys, **particular})


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of that configuration in fp32 evaluation mode, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape))
    return model


@contextmanager
def bypassing(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """Within, every layer not in `kept` hands on its input: what detaching must be equal to."""

    def hand_on(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        return type(output)([hidden_BTD, *output[1:]]) if isinstance(output, (tuple, list)) else hidden_BTD

    layers = layers_of(model)
    hooks = [
        layer.register_forward_hook(hand_on, with_kwargs=True)
        for index, layer in enumerate(layers)
        if index not in kept
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits_of(model: PreTrainedModel, tokens: int = 20) -> torch.Tensor:
    """Logits on fixed random tokens, no cache."""
    input_ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits
