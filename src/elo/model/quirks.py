"""What deviates between families, as data. Everything else is found by asking the configuration and the model."""

import re

# --- Configuration keys -------------------------------------------------------------------------------------------

# A list with one entry per decoder layer is selected by index if its name says that it is about layers. Other lists may
# have as many entries by accident (eos_token_id, mrope_section).
PER_LAYER_LIST = re.compile(
    r"layer|_types?$|_pattern$|_per_layer$|intermediate_size|^num_.*heads$|^head_dim$|rope_theta|multipliers?$|_idxs$"
)

# Lists of layer indices (possibly empty, of any length): renumbered.
INDEX_SETS = frozenset(
    {
        "attn_layer_indices",  # Bamba
        "dense_layers",
        "full_attention_layer_ids",
        "global_attn_layers",
        "hybrid_layer_ids",  # Zamba-2
        "local_layer_ids",  # Inkling
        "mlp_only_layers",  # Qwen MoE
        "moe_layers",  # Llama-4
        "ple_layer_ids",
    }
)

# "Layers below this index are different": becomes the number of kept layers below it.
THRESHOLDS = frozenset({"first_k_dense_replace", "num_dense_layers", "max_window_layers"})

# --- Refusals -----------------------------------------------------------------------------------------------------

_INSTEAD = "train the whole model instead (method: full)"

# By model type: why its layers cannot be detached, and what would work.
REFUSED = {
    "zamba": f"its attention layers share one set of weights, so a layer cannot be taken out alone; {_INSTEAD}",
    "zamba2": f"its attention layers share one set of weights, so a layer cannot be taken out alone; {_INSTEAD}",
}

# By a configuration key that is set (not 0, false or empty).
REFUSED_IF_SET = {
    "num_kv_shared_layers": (
        "its upper layers reuse the keys and values of earlier layers, so they cannot compute without them; "
        f"{_INSTEAD}, or choose a checkpoint without shared keys and values"
    ),
}

# BERT-like families: causal only when the configuration says is_decoder.
CAUSAL_ONLY_AS_DECODER = frozenset(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod xlm xlnet reformer".split()
)
