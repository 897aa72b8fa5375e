"""The text that is measured on: the same bytes for every tokenizer, of enough documents."""

import random

from data_fixtures import make_texts, make_tokenizer, write_jsonl
from evaluation_fixtures import text_tokenizer, tiny_model

from elo.data.heldout import MIN_BYTES, MIN_DOCUMENTS, choose_bytes, cut_corpus, cut_text
from elo.data.prepare import prepare
from elo.evaluate.evaluate import evaluate


def largest_allowance(sizes, max_bytes):
    return max(a for a in range(max(sizes) + 1) if sum(min(size, a) for size in sizes) <= max_bytes)


def test_the_allowance_is_the_largest_that_stays_within():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randrange(1, 60) for _ in range(rng.randrange(1, MIN_DOCUMENTS + 1))]
        max_bytes = rng.randrange(len(sizes), 2 * sum(sizes))
        expected = {i: min(size, largest_allowance(sizes, max_bytes)) for i, size in enumerate(sizes)}
        assert choose_bytes(sizes, max_bytes) == expected
    assert choose_bytes([5, 7], None) == {0: 5, 1: 7}
    assert choose_bytes([], 100) == {}


def test_more_documents_than_there_is_room_for_are_taken_evenly():
    chosen = choose_bytes([5000] * 1000, 200_000)
    assert len(chosen) == 200 and set(chosen.values()) == {MIN_BYTES}
    assert list(chosen)[:3] == [0, 5, 10] and max(chosen) == 995
    short = choose_bytes([100] * 10_000, 200_000)
    assert len(short) == 2000 and sum(short.values()) == 200_000, "short documents whole, so more of them"
    few = choose_bytes([5000] * 1000, 3000)
    assert len(few) == MIN_DOCUMENTS and set(few.values()) == {100}, "never fewer, however little of each"


def test_the_2_document_trap():
    """Two documents that would fill the sample on their own: all 40 are in it, and take no more room than others."""
    chosen = choose_bytes([200_000, 200_000] + [3000] * 38, 100_000)
    assert len(chosen) == 40
    assert chosen[0] == chosen[1] == chosen[2] == 2500


def test_text_is_cut_between_characters():
    text = "가나다abc"
    assert [cut_text(text, size) for size in range(1, 8)] == ["가", "가", "가", "가", "가", "가나", "가나"]
    assert cut_text(text, 100) == text
    assert cut_text("가\n😀", 7) == "가\n"


def test_two_tokenizers_are_measured_on_the_same_bytes_from_a_file_and_from_prepared_data(tmp_path):
    texts = [text * (1 + index % 7) for index, text in enumerate(make_texts(60, 3))]
    path = write_jsonl(tmp_path / "held.jsonl", texts)
    corpora = {"ko": str(write_jsonl(tmp_path / "ko.jsonl", make_texts(20, 4)))}
    measured = []
    for number, tokenizer in enumerate((make_tokenizer(), text_tokenizer())):
        prepared = prepare(
            tokenizer, corpora, tmp_path / str(number), heldout={"ko": str(path)}, shard_tokens=500, progress=False
        )
        heldout = prepared.heldout("ko")
        assert len(heldout.shards) > 1 and heldout.num_bytes > 8000
        model = tiny_model("llama", tokenizer.vocab_size)
        for corpus in (path, heldout):
            measured.append(evaluate(model, tokenizer, corpora={"ko": corpus}, max_bytes=6000, progress=False))
        cut = cut_corpus(heldout, tokenizer, 6000)
        chosen = choose_bytes([len(text.encode()) for text in texts], 6000)
        read = [tokenizer.backend.decode(cut.document(index).tolist()[1:-1]) for index in range(cut.num_documents)]
        assert read == [cut_text(texts[index], size) for index, size in chosen.items()]
    sizes = [each["documents_bytes"]["ko"] for each in measured]
    assert sizes == [sizes[0]] * 4 and len(sizes[0]) == MIN_DOCUMENTS
    assert measured[0]["documents_nats"] == measured[1]["documents_nats"], "file and shards"
    tokens = [each["heldout"]["ko"]["tokens"] for each in measured]
    assert tokens[0] != tokens[2], "the tokenizers must differ for this to mean anything"


def test_what_fits_whole_is_the_prepared_token_ids(tmp_path):
    prepared = prepare(
        make_tokenizer(),
        {"ko": str(write_jsonl(tmp_path / "ko.jsonl", make_texts(40, 4)))},
        tmp_path / "out",
        heldout_share=0.3,
        progress=False,
    )
    heldout = prepared.heldout("ko")
    assert cut_corpus(heldout, make_tokenizer(), heldout.num_bytes) is heldout
    assert cut_corpus(heldout, make_tokenizer(), None) is heldout
