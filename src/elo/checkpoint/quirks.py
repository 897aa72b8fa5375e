"""Deviations of model families, as data. Everything else is read from the configuration and the model."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# --- Configuration keys -------------------------------------------------------------------------------------------

# Key of the decoder's layer count, if it is not num_hidden_layers.
LAYER_COUNT_KEY = {
    **dict.fromkeys(
        ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"],
        "decoder_layers",  # num_hidden_layers is the encoder's
    ),
    "whisper": "decoder_layers",
    "prophetnet": "num_decoder_layers",
    "longcat_flash": "num_layers",  # num_hidden_layers counts attention sub-layers, two per layer
}

# Other names under which a configuration may repeat the count.
LAYER_COUNT_COPIES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")

# A list with one entry per decoder layer is selected by index if its name matches. Other lists may have the same length
# by chance (eos_token_id, mrope_section, ssm_multipliers).
PER_LAYER_LIST = re.compile(r"layer|_types?$|_pattern$|intermediate_size|^num_.*heads$|^head_dim$|rope_theta")

# Lists of layer indices, of any length: kept indices are renumbered.
INDEX_SETS = frozenset(
    {
        "attn_layer_indices",  # Bamba
        "full_attn_idxs",  # LFM-2
        "local_layer_ids",  # Inkling
        "mlp_only_layers",  # Qwen MoE
        "moe_layers",  # Llama-4
    }
)

# An index below which layers differ from the others: becomes the number of kept layers below it.
THRESHOLDS = frozenset({"first_k_dense_replace", "num_dense_layers", "max_window_layers"})


@dataclass(frozen=True)
class Rule:
    """A layer is of one of two kinds, depending on `holds(index, *values of keys)`.

    For a detached model, values are searched that give each kept layer its kind at its new index.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]


def _every(index: int, period: int, offset: int) -> bool:
    return offset < period and index % period == offset


RULES: dict[str, tuple[Rule, ...]] = {
    "jamba": (
        Rule(("attn_layer_period", "attn_layer_offset"), _every),
        Rule(("expert_layer_period", "expert_layer_offset"), _every),
    ),
    "ernie4_5_moe": (
        Rule(
            ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
            lambda i, interval, start, end: (i + 1) % interval == 0 and start <= i <= end,
        ),
    ),
}

# A short list that repeats over the layers: becomes the kept layers' own entries.
REPEATED_LISTS = {"recurrent_gemma": "block_types"}

# A factor that layers divide by the square root of the layer count: rescaled, so that the quotient stays the same.
OVER_ROOT_DEPTH = {"minicpm3": "scale_depth"}

# A layer of kind `borrower` uses the result of the nearest earlier layer of kind `lender`; both must be kept.
LENDERS = {"indexer_types": ("shared", "full")}

# --- Names --------------------------------------------------------------------------------------------------------

# A layer's own index, which changes when it moves. Values computed from it are in other attributes.
INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})

# Attributes that differ by depth without an effect. In Gemma 4 the layer stores keys and values for later layers;
# models with such later layers are refused (REFUSED_IF_SET).
WITHOUT_EFFECT = frozenset({"store_full_length_kv"})

# Name of the norm between the last layer and the head, if the usual pattern does not match it.
NORM_NAMES = {"lfm2": "embedding_norm", "lfm2_moe": "embedding_norm", "lfm3": "embedding_norm"}

# --- Refusals -----------------------------------------------------------------------------------------------------

_INSTEAD = "train the whole model instead (method: full)"

# Why the layers of a model type cannot be detached, and what to do instead.
REFUSED = {
    **dict.fromkeys(
        ["zamba", "zamba2"],
        f"its attention layers share one set of weights, so a layer cannot be detached alone; {_INSTEAD}",
    ),
    "zaya": f"each layer's router reads the router state of the layer before it; {_INSTEAD}",
    "inkling2_text": f"each layer attends over the outputs of all layers before it; {_INSTEAD}",
    "hrm_text": f"its layers run several times, in two stacks that feed each other; {_INSTEAD}",
    "blt": f"its layers are in three stacks (local encoder, global, local decoder), not one; {_INSTEAD}",
    "reformer": f"its layers are reversible and share one pass over two streams; {_INSTEAD}",
    "xlnet": "it is a permutation language model; choose a causal one",
    "xlm": "its layers are not separate modules, and it is causal only with an option; choose another base",
}

# Refused if the configuration key is set (not 0, false or empty).
REFUSED_IF_SET = {
    "num_kv_shared_layers": (
        "its upper layers reuse the keys and values of earlier layers, so they cannot be separated; "
        f"{_INSTEAD}, or choose a checkpoint without shared keys and values"
    ),
    "ple_layer_ids": f"some layers have n-gram embedding tables that transformers converts while loading; {_INSTEAD}",
}

# BERT-like families, which are causal only if the configuration sets is_decoder.
CAUSAL_ONLY_AS_DECODER = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *(
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
    }
)
