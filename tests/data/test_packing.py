"""Packing and shuffling: no token lost, none crosses a document, any row at random access."""

import pickle
from collections import Counter

import numpy as np
import pytest
from data_fixtures import EOS, PREFIX, make_corpus

from elo.data.packing import IGNORE_INDEX, PackedStream, PaddedStream, shuffled
from elo.data.shards import TokenCorpus
from elo.errors import EloError

LENGTHS = [[3, 2, 40, 7, 2], [2, 2, 9], [64, 5], [1 + 32, 16, 17, 15]]


@pytest.mark.parametrize("T", [1, 2, 7, 16, 100, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_token_once_and_nothing_crosses_a_document(T: int, shuffle: bool) -> None:
    corpus = make_corpus(LENGTHS)
    stream = PackedStream(corpus, T, seed=3, shuffle=shuffle)
    total = corpus.num_tokens
    assert stream.sequences_per_epoch == total / T
    rows = [stream.sequence(i) for i in range(2 * total // T + 2)]
    inputs = np.concatenate([row.input_ids for row in rows])
    labels = np.concatenate([row.shift_labels for row in rows])
    positions = np.concatenate([row.position_ids for row in rows])
    documents = sorted(tuple(corpus.document(i).tolist()) for i in range(corpus.num_documents))
    for epoch in range(2):
        ids = inputs[epoch * total : (epoch + 1) * total].tolist()
        targets = labels[epoch * total : (epoch + 1) * total].tolist()
        found, current, expected_targets = [], [], []
        for token in ids:
            current.append(token)
            if token == EOS:
                found.append(tuple(current))
                expected_targets += [*current[1:], IGNORE_INDEX]
                current = []
        assert not current
        assert sorted(found) == documents
        assert targets == expected_targets
    position = 0
    for where, token in enumerate(inputs.tolist()):
        if where % T == 0 or token == PREFIX:
            position = 0
        assert positions[where] == position
        position += 1


def test_the_end_of_the_corpus_is_not_read_past_and_goes_on_with_the_next_epoch() -> None:
    corpus = make_corpus([[5]])
    row = PackedStream(corpus, 12, seed=0).sequence(0)
    document = corpus.document(0).tolist()
    assert row.input_ids.tolist() == (document * 3)[:12]
    assert row.shift_labels.tolist() == ([*document[1:], IGNORE_INDEX] * 3)[:12]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_without_shuffling_the_order_is_the_corpus_order() -> None:
    corpus = make_corpus(LENGTHS)
    everything = np.concatenate([corpus.document(i) for i in range(corpus.num_documents)])
    stream = PackedStream(corpus, 10, seed=0, shuffle=False)
    assert np.concatenate([stream.sequence(i).input_ids for i in range(11)]).tolist() == everything[:110].tolist()


def test_rows_depend_on_seed_and_epoch_only_and_not_on_what_was_read_before() -> None:
    corpus = make_corpus(LENGTHS)
    sequential = [PackedStream(corpus, 16, seed=1).sequence(i) for i in range(60)]
    stream = PackedStream(corpus, 16, seed=1)
    for i in np.random.default_rng(0).permutation(60).tolist():
        for one, other in zip(stream.sequence(i)[:3], sequential[i][:3], strict=True):
            assert (one == other).all()
    other_seed = PackedStream(corpus, 16, seed=2)
    assert any((other_seed.sequence(i).input_ids != sequential[i].input_ids).any() for i in range(5))
    first = np.concatenate([sequential[i].input_ids for i in range(28)])
    total = corpus.num_tokens
    assert first[: 448 - total].tolist() != first[total:448].tolist(), "the second epoch must be in another order"


def test_a_stream_travels_to_another_process_by_pickle() -> None:
    corpus = make_corpus(LENGTHS)
    stream = PackedStream(corpus, 16, seed=1)
    row = stream.sequence(5)
    again = pickle.loads(pickle.dumps(stream)).sequence(5)
    assert (row.input_ids == again.input_ids).all()


@pytest.mark.parametrize("T", [1, 2, 7, 16, 32, 1000])
def test_unpacked_rows_hold_every_target_once_and_one_document_each(T: int) -> None:
    corpus = make_corpus(LENGTHS)
    stream = PaddedStream(corpus, T, seed=5)
    rows = [stream.sequence(i) for i in range(int(stream.sequences_per_epoch))]
    expected: Counter[int] = Counter()
    for i in range(corpus.num_documents):
        expected.update(corpus.document(i)[1:].tolist())
    found: Counter[int] = Counter()
    for row in rows:
        assert row.attention_mask is not None
        used = int(row.attention_mask.sum())
        assert (row.attention_mask[:used] == 1).all()
        assert (row.input_ids[used:] == EOS).all() and (row.shift_labels[used:] == IGNORE_INDEX).all()
        assert PREFIX not in row.input_ids[1:used]
        targets = row.shift_labels[row.shift_labels != IGNORE_INDEX]
        assert (row.shift_labels[: used - 1] == row.input_ids[1:used]).all()
        found.update(targets.tolist())
    assert found == expected
    again = [
        stream.sequence(i + int(stream.sequences_per_epoch)).input_ids.tolist()
        for i in range(int(stream.sequences_per_epoch))
    ]
    assert sorted(again) == sorted(row.input_ids.tolist() for row in rows)


def test_shuffled_is_a_permutation_that_never_changes() -> None:
    assert sorted(shuffled(1000, 1, 2).tolist()) == list(range(1000))
    assert shuffled(8, 42, 0).tolist() == shuffled(8, 42, 0).tolist()
    assert shuffled(1000, 1, 2).tolist() != shuffled(1000, 2, 1).tolist()


@pytest.mark.parametrize("stream", [PackedStream, PaddedStream])
def test_bad_arguments_are_named(stream: type) -> None:
    with pytest.raises(EloError, match="sequence_length must be at least 1, got 0"):
        stream(make_corpus(LENGTHS), 0)
    with pytest.raises(EloError, match="corpus 'nothing': has no documents"):
        stream(TokenCorpus((), "nothing"), 4)
    with pytest.raises(IndexError):
        stream(make_corpus(LENGTHS), 4).sequence(-1)
