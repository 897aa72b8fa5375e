"""Rotary embeddings that follow the longest sequence of a batch: each document is measured and trained as if alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import make_corpus
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel
from zoo import tiny_config, tiny_model

from elo.data.packing import PaddedStream
from elo.errors import EloError
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.evaluate.cloze import ClozeItem, cloze_accuracy
from elo.evaluate.scoring import rope_limit, rope_regime
from elo.train.attention import require_own_positions

LIMIT = 32
SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=256,
        original_max_position_embeddings=LIMIT,
        pad_token_id=0,
        rope_parameters={**rope, "rope_theta": 10000.0},
    )
    return Phi3ForCausalLM(config).eval()


def dynamic() -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=rope)).eval()


def alone(model: PreTrainedModel, documents: list[np.ndarray], sequence_length: int) -> float:
    """Nats of all text tokens, each piece of each document in a forward pass of its own."""
    nats = 0.0
    for ids in documents:
        for start in range(0, len(ids) - 2, sequence_length):
            stop = min(start + sequence_length, len(ids) - 2)
            with torch.no_grad():
                logits = model(torch.tensor(ids[None, start:stop].astype(np.int64)), use_cache=False).logits[0]
            labels = torch.tensor(ids[start + 1 : stop + 1].astype(np.int64))
            nats += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
    return nats


def sparse() -> PreTrainedModel:
    """Attention to the best `index_topk` tokens, many of them equally good: the place in a row decides."""
    return tiny_model(tiny_config("glm_moe_dsa", num_key_value_heads=4, vocab_size=512, index_topk=LIMIT)).eval()


def blocks() -> PreTrainedModel:
    """Attention to the best blocks of keys, which begin at the start of a row, not of a document."""
    types = ["full_attention", "minimax_m3_sparse"] * 2
    sizes = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": LIMIT, "index_topk_blocks": 2}
    config = tiny_config("minimax_m3_vl_text", vocab_size=512, max_position_embeddings=256, layer_types=types, **sizes)
    return tiny_model(config).eval()


def test_blocks_of_keys_do_not_follow_documents() -> None:
    model = blocks()
    assert rope_limit(model.config) == LIMIT
    ids = torch.randint(3, 500, (2, LIMIT), generator=torch.Generator().manual_seed(0))
    places = torch.arange(LIMIT).repeat(1, 2)
    with torch.no_grad():
        single = torch.cat([model(row[None], use_cache=False).logits[0] for row in ids])
        packed = model(ids.view(1, -1), position_ids=places, use_cache=False).logits[0]
    assert (packed - single)[LIMIT:].abs().max() > 0.01, "packing is right: the limit can go"
    with pytest.raises(EloError, match="depends on the whole batch"):
        require_own_positions(model.config, 2 * LIMIT, packed=True, batch_size=1)


@pytest.mark.parametrize("make", [longrope, dynamic, sparse, blocks])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_bits_per_byte_is_that_of_each_document_alone(make, batch_size) -> None:
    model = make()
    sequence_length = min(128, model.config.max_position_embeddings)
    corpus = make_corpus([[10, 20, 33, 34, 35, 36, 12, 100, 8]])
    documents = [corpus.document(index) for index in range(corpus.num_documents)]
    measured = bits_per_byte(model, corpus, sequence_length=sequence_length, batch_size=batch_size)
    expected = alone(model, documents, sequence_length)
    assert math.isclose(measured.nats, expected, rel_tol=1e-6)
    if make is longrope:  # the long document would have changed the others
        padded = torch.zeros(2, 98, dtype=torch.int64)
        padded[0, :8], padded[1] = (torch.tensor(documents[i][:-2].astype(np.int64)) for i in (0, 7))
        with torch.no_grad():
            together, single = model(padded).logits[0, :8], model(padded[:1, :8]).logits[0]
        assert (together - single).abs().max() > 0.01


def test_cloze_choices_are_scored_as_if_alone() -> None:
    from data_fixtures import make_tokenizer

    model, tokenizer = longrope(), make_tokenizer()
    short = [ClozeItem("river ", (f"stone {i}", f"lamp {i}"), 0) for i in range(6)]
    long = [ClozeItem("river stone lamp " * 12, ("stone", "lamp"), 1)]
    assert max(len(ids) for ids in tokenizer.encode_batch([long[0].prompt])) > LIMIT
    together = cloze_accuracy(model, tokenizer, [*short, *long])
    apart = [cloze_accuracy(model, tokenizer, [item]).predictions[0] for item in [*short, *long]]
    assert together.predictions == tuple(apart)


def test_regimes() -> None:
    long, dyn = longrope().config, dynamic().config
    assert [rope_regime(long, length) for length in (1, LIMIT, LIMIT + 1, 200)] == [0, 0, 1, 1]
    assert [rope_regime(dyn, length) for length in (1, LIMIT, LIMIT + 1, 200)] == [0, 0, LIMIT + 1, 200]
    assert rope_limit(long) == rope_limit(dyn) == LIMIT
    plain = LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0})
    assert rope_limit(plain) is None and rope_regime(plain, 10**6) == 0
    layered = PreTrainedConfig(max_position_embeddings=LIMIT)
    layered.rope_parameters = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0},
        "sliding_attention": {"rope_type": "default"},
    }
    assert rope_limit(layered) == LIMIT


def test_a_padded_row_ends_at_its_document_and_mixed_rows_are_refused() -> None:
    row = PaddedStream(make_corpus([[10]]), 64).sequence(0)
    assert row.position_ids.max() == 9
    config = longrope().config
    require_own_positions(config, LIMIT, packed=True, batch_size=8)
    require_own_positions(config, LIMIT + 1, packed=False, batch_size=1)
    with pytest.raises(EloError, match=rf"data.packing: beyond {LIMIT} positions .* write data.packing: false, or"):
        require_own_positions(config, LIMIT + 1, packed=True, batch_size=1)
    with pytest.raises(EloError, match=r"full.per_device_train_batch_size: 1, or data.sequence_length: 32 or less"):
        require_own_positions(config, LIMIT + 1, packed=False, batch_size=2, section="full")


def test_a_run_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    from run_fixtures import write_world

    from elo.run import run

    config = write_world(tmp_path)
    longrope().save_pretrained(tmp_path / "longrope")
    for file in (tmp_path / "base").glob("tokenizer*"):
        (tmp_path / "longrope" / file.name).write_bytes(file.read_bytes())
    config = {**config, "model": str(tmp_path / "longrope"), "output": str(tmp_path / "run")}
    config["data"] = {**config["data"], "sequence_length": 64}
    overrides = ["training.per_device_train_batch_size=1", "training.tokens_per_step=128"]
    with pytest.raises(EloError, match=r"data.packing: beyond 32 positions"):
        run(config, overrides=overrides)
    assert not (tmp_path / "run" / "prepared").exists()
