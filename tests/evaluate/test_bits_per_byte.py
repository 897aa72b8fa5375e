import math

import pytest
import torch
from evaluation_fixtures import SIZES, TEXTS, memory_corpus, tiny_model, tiny_tokenizer
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from elo.errors import EloError
from elo.evaluate.bits_per_byte import bits_per_byte, isolates_documents
from elo.evaluate.scoring import takes_position_ids, token_nats

TOKENIZER = tiny_tokenizer()
CORPUS = memory_corpus(TEXTS, TOKENIZER)


def reference_nats(model, sequence_length, texts=TEXTS):
    """One document at a time, cut by hand, one forward pass a piece, no packing, no padding, no cache."""
    total, count = 0.0, 0
    for text in texts:
        ids = [TOKENIZER.eos_token_id] + TOKENIZER(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - 1, sequence_length):
            piece = ids[start : start + sequence_length + 1]
            with torch.no_grad():
                logits = model(torch.tensor([piece[:-1]]), use_cache=False).logits[0].double()
            log_probabilities = torch.log_softmax(logits, dim=-1)
            for position, token in enumerate(piece[1:]):
                total -= log_probabilities[position, token].item()
                count += 1
    return total, count


@pytest.mark.parametrize("model_type", SIZES)
def test_value_is_that_of_documents_one_by_one(model_type):
    model = tiny_model(model_type, len(TOKENIZER))
    longest = max(len(CORPUS.document(index)) for index in range(CORPUS.num_documents)) - 2
    sequence_length = 24
    assert longest > 2 * sequence_length, "a document must be cut for this test to mean anything"
    expected, count = reference_nats(model, sequence_length)
    result = bits_per_byte(model, CORPUS, sequence_length=sequence_length, batch_size=3)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (result.text_tokens, result.bytes, result.documents) == (count, num_bytes, len(TEXTS))
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "isolates"),
    [("llama", True), ("gpt2", True), ("gemma3_text", True), ("mamba", False), ("bloom", False)],
)
def test_isolation_is_asked_of_the_model(model_type, isolates):
    model = tiny_model(model_type, len(TOKENIZER))
    with torch.no_grad():
        found = isolates_documents(model, torch.device("cpu"))
    assert found is isolates


def test_neither_batching_nor_order_matters():
    model = tiny_model("llama", len(TOKENIZER))
    results = [
        bits_per_byte(model, memory_corpus(texts, TOKENIZER), sequence_length=32, batch_size=batch_size).nats
        for texts in (TEXTS, TEXTS[::-1])
        for batch_size in (1, 2, None)
    ]
    assert results == pytest.approx([results[0]] * 6, rel=1e-6)


def test_context_counts_and_neighbours_do_not():
    model = tiny_model("llama", len(TOKENIZER))
    long = bits_per_byte(model, CORPUS, sequence_length=128).nats
    short = bits_per_byte(model, CORPUS, sequence_length=8).nats
    assert abs(long - short) > 2e-4 * long
    one, two = memory_corpus(TEXTS[:1], TOKENIZER), memory_corpus(TEXTS[1:2], TOKENIZER)
    both = memory_corpus(TEXTS[:2], TOKENIZER)
    apart = sum(bits_per_byte(model, corpus, sequence_length=128).nats for corpus in (one, two))
    assert bits_per_byte(model, both, sequence_length=128).nats == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_each_documents_nats_are_those_of_it_alone_and_sum_to_the_whole(model_type):
    model = tiny_model(model_type, len(TOKENIZER))
    result = bits_per_byte(model, CORPUS, sequence_length=24, batch_size=3)
    alone = [
        bits_per_byte(model, memory_corpus([text], TOKENIZER), sequence_length=24).nats
        for text in TEXTS  # one of which is cut into pieces, which are packed into different rows
    ]
    assert result.document_nats == pytest.approx(alone, rel=1e-5)
    assert result.document_bytes == tuple(len(text.encode()) for text in TEXTS)
    assert sum(result.document_nats) == result.nats
    assert sum(result.document_bytes) == result.bytes


def test_model_is_left_as_it_was():
    model = tiny_model("llama", len(TOKENIZER)).train()
    model.config.use_cache = True
    bits_per_byte(model, CORPUS, sequence_length=16)
    assert model.training
    assert model.config.use_cache
    assert torch.is_grad_enabled()


def test_attention_that_only_training_can_feed_steps_aside():
    def needs_more(*_, cu_seq_lens_q, **__):
        raise AssertionError("called without its arguments")

    AttentionInterface.register("elo_test", needs_more)
    AttentionMaskInterface.register("elo_test", lambda *_, **__: None)
    model = tiny_model("llama", len(TOKENIZER))
    expected = bits_per_byte(model, CORPUS, sequence_length=32).nats
    model.set_attn_implementation("elo_test")
    with pytest.raises(TypeError):
        model(torch.tensor([[1, 2, 3]]))
    assert bits_per_byte(model, CORPUS, sequence_length=32).nats == expected
    assert model.config._attn_implementation == "elo_test"


def test_a_wrapped_forward_does_not_hide_position_ids():
    model = tiny_model("llama", len(TOKENIZER))
    original = model.forward
    model.forward = lambda **inputs: original(**inputs)
    assert takes_position_ids(model)


def test_autocast_computes_in_its_dtype():
    model = tiny_model("llama", len(TOKENIZER))
    exact = bits_per_byte(model, CORPUS, sequence_length=64).nats
    rough = bits_per_byte(model, CORPUS, sequence_length=64, autocast_dtype=torch.bfloat16).nats
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_token_nats_in_chunks(monkeypatch):
    logits, labels = torch.randn(2, 9, 50), torch.randint(50, (2, 9))
    labels[0, 3] = -100
    whole = token_nats(logits, labels)
    monkeypatch.setattr("elo.evaluate.scoring._CHUNK_BYTES", 4 * 50 * 4)
    assert torch.equal(whole, token_nats(logits, labels))
    assert whole[0, 3] == 0
    assert whole[1, 8].item() == pytest.approx(-torch.log_softmax(logits[1, 8], -1)[labels[1, 8]].item(), rel=1e-5)


def test_mistakes_are_told():
    model = tiny_model("gpt2", len(TOKENIZER))
    with pytest.raises(
        EloError, match=r"sequence_length: got 49; the model has 48 positions; write a number from 1 to 48"
    ):
        bits_per_byte(model, CORPUS, sequence_length=49)
    with pytest.raises(EloError, match="the corpus to evaluate has no text"):
        bits_per_byte(model, memory_corpus([""], TOKENIZER), sequence_length=8)
    small = tiny_model("llama", 100)
    with pytest.raises(EloError, match=r"token id \d+ is beyond the model's embedding \(100 rows\)"):
        bits_per_byte(small, CORPUS, sequence_length=8)
