"""`elo_varlen` attends within documents as the model's own masked attention does, or is not used."""

import pytest
import torch
from training_fixtures import LENGTH, SETTINGS, corpus, rows, tiny_llama, train_steps
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    Qwen3Config,
)
from zoo import FAMILIES as ZOO
from zoo import tiny_config, tiny_model

from elo.errors import EloError
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.evaluate.scoring import rope_limit, takes_position_ids
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.train.attention import VARLEN, choose_attention, document_starts, separates_documents
from elo.train.batches import PackedCollator

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
FAMILIES = {
    "qwen3": Qwen3Config(**SIZES),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=4),
    "gemma3, sliding and full": Gemma3TextConfig(**SIZES, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
OTHERS = {
    "gemma2, soft-capped": Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0),
    "gpt-oss, sinks": GptOssConfig(**SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1),
}


COMPRESSED, HEAVILY = "compressed_sparse_attention", "heavily_compressed_attention"
V4 = {"num_key_value_heads": 1, "head_dim": 16, "o_lora_rank": 8, "o_groups": 2, "index_topk": 64}
V4 |= {"compress_rates": {COMPRESSED: 4, HEAVILY: 12}}
# Families that are in the zoo's tests of detaching, and some that do not look where position ids restart.
PACKED = ZOO | {
    "biogpt": ("biogpt", {}),
    "deepseek_v4": ("deepseek_v4", V4 | {"layer_types": [COMPRESSED, HEAVILY] * 2}),
    "deepseek_v4-heavy": ("deepseek_v4", V4 | {"layer_types": [HEAVILY] * 4}),
    "openai-gpt": ("openai-gpt", {}),
}


def _model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float()


def test_document_starts():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    boundaries, longest = document_starts(positions)
    assert boundaries.tolist() == [0, 3, 5, 10]
    assert boundaries.dtype == torch.int32
    assert longest == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_masked_attention_on_packed_rows(family):
    model = _model(FAMILIES[family]).eval()
    packed = [rows(12)[index] for index in range(12)]
    stacked, flat = PackedCollator()(packed), PackedCollator(varlen=True)(packed)
    inputs = {key: stacked[key] for key in ("input_ids", "position_ids")}
    assert (inputs["position_ids"] == 0).sum() > 12, "rows must hold several documents, or the test shows nothing"
    expected = model(**inputs, use_cache=False).logits
    assert choose_attention(model, 512) == VARLEN
    flat.pop("shift_labels")
    got = model(**flat, use_cache=False).logits.view_as(expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_is_not_used_where_the_model_computes_something_else(family):
    model = _model(OTHERS[family])
    before = model.config._attn_implementation
    assert choose_attention(model, 4096) == before
    with pytest.raises(EloError, match="does not support the attention of"):
        choose_attention(model, 4096, VARLEN)
    assert model.config._attn_implementation == before


@torch.no_grad()
def _differs_when_packed(model, length=19):
    """Whether a document's logits change with the document before it; its length is no multiple of a window's."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(1, 2)
    packed = model(ids.view(1, -1), position_ids=positions, use_cache=False).logits[:, length:]
    return (packed - model(ids[1:], use_cache=False).logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", PACKED)
def test_without_weights_packing_is_allowed_exactly_where_it_changes_nothing(name):
    model_type, particular = PACKED[name]
    config = tiny_config(model_type, **particular)
    limit = rope_limit(config)
    allowed = separates_documents(build_hollow_causal_lm(config)) and (limit is None or limit >= 38)
    model = tiny_model(config)
    assert allowed == (takes_position_ids(model) and not _differs_when_packed(model))


def test_short_rows_on_a_cpu_keep_the_mask():
    if torch.cuda.is_available():
        pytest.skip("a CPU's choice")
    assert choose_attention(tiny_llama(), 256) == "sdpa"


def test_unknown_attention_is_a_users_mistake():
    with pytest.raises(EloError, match="cannot use 'flashy'"):
        choose_attention(tiny_llama(), 256, "flashy")


def test_training_gives_the_same_losses(tmp_path):
    losses, evaluations = [], []
    for name in ("sdpa", VARLEN):
        settings = SETTINGS.model_copy(update={"attn_implementation": name})
        model = tiny_llama()
        model.requires_grad_(True)
        result = train_steps(
            model,
            tmp_path / name,
            steps=6,
            settings=settings,
            evaluate=lambda model: {
                "bpb": {"xx": bits_per_byte(model, corpus(9, 5), sequence_length=LENGTH).bits_per_byte}
            },
        )
        assert result.attention == name
        losses.append([point["loss"] for point in result.losses])
        evaluations.append([point["bpb"]["xx"] for point in result.evaluations])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-4), "evaluation must work in the middle of training"
