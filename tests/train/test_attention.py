"""`elo_varlen` attends within documents as the model's own masked attention does, or is not used."""

import pytest
import torch
from training_fixtures import LENGTH, SETTINGS, corpus, rows, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    Qwen3Config,
)

from elo.errors import EloError
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.train.arguments import sequences_per_step
from elo.train.attention import VARLEN, choose_attention, document_starts
from elo.train.batches import PackedCollator
from elo.train.loop import train

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
        result = train(
            model,
            rows(6 * sequences_per_step(LENGTH, settings)),
            settings=settings,
            output_dir=tmp_path / name,
            seed=0,
            evaluate=lambda model: {
                "bpb": {"xx": bits_per_byte(model, corpus(9, 5), sequence_length=LENGTH).bits_per_byte}
            },
        )
        assert result.attention == name
        losses.append([point["loss"] for point in result.losses])
        evaluations.append([point["bpb"]["xx"] for point in result.evaluations])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-4), "evaluation must work in the middle of training"
