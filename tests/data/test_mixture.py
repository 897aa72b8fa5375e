"""Mixtures: shares hold in every prefix, rows at random access, weights without tokenising."""

import pickle

import numpy as np
import pytest
from data_fixtures import make_corpus

from elo.data.mixture import Mixture, corpus_weights
from elo.data.packing import PackedStream, PaddedStream
from elo.errors import EloError

T = 8


def stream(tokens: int = 4000, seed: int = 0) -> PackedStream:
    return PackedStream(make_corpus([[20] * (tokens // 20)]), T, seed)


def languages(mixture: Mixture, rows: int) -> list[str]:
    return [mixture.sources[mixture.find(i)[0]].language for i in range(rows)]


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_keeps_the_replay_ratio_to_a_row(ratio: float, seed: int) -> None:
    mixture = Mixture([("ko", 1 - ratio, stream()), ("en", ratio, stream())], seed)
    replayed = np.cumsum([language == "en" for language in languages(mixture, 5000)])
    assert (np.abs(replayed - ratio * np.arange(1, 5001)) < 1 + 1e-6).all()


def test_corpora_keep_their_shares_within_their_language_and_streams_are_read_in_order() -> None:
    shares = [0.5, 0.3, 0.1, 0.07, 0.03]
    names = ["ko", "ko", "ko", "en", "en"]
    mixture = Mixture([(name, share, stream()) for name, share in zip(names, shares, strict=True)], seed=7)
    found = [mixture.find(i) for i in range(20_000)]
    for source, share in enumerate(shares):
        rows = [inside for which, inside in found if which == source]
        assert rows == list(range(len(rows))), "each stream must be read from its start without a gap"
        counts = np.cumsum([which == source for which, _ in found])
        assert (np.abs(counts - share * np.arange(1, 20_001)) < 2).all()


def test_another_seed_begins_elsewhere_but_the_same_seed_never_changes() -> None:
    starts = {tuple(languages(Mixture([("a", 0.7, stream()), ("b", 0.3, stream())], seed), 40)) for seed in range(10)}
    assert len(starts) > 2
    assert "".join(languages(Mixture([("a", 0.75, stream()), ("b", 0.25, stream())], 3), 8)).count("b") == 2


def test_rows_are_those_of_the_streams_and_a_dataset_is_a_window_on_them() -> None:
    one, other = stream(seed=1), stream(seed=2)
    mixture = Mixture([("ko", 0.8, one), ("en", 0.2, other)], 0)
    row = mixture.sequence(11)
    which, inside = mixture.find(11)
    assert mixture.sequences(11, 12).language(0) == ("ko", "en")[which]
    expected = (one, other)[which].sequence(inside)
    assert (np.asarray(row["input_ids"]) == expected.input_ids).all()
    dataset = mixture.sequences(5, 25)
    assert len(dataset) == 20
    again = pickle.loads(pickle.dumps(dataset))
    for i in range(20):
        assert set(dataset[i]) == {"input_ids", "shift_labels", "position_ids"}
        assert all(array.dtype == np.int64 and array.shape == (T,) for array in dataset[i].values())
        assert (dataset[i]["input_ids"] == mixture.sequence(5 + i)["input_ids"]).all()
        assert (again[i]["shift_labels"] == dataset[i]["shift_labels"]).all()
        assert dataset.language(i) == mixture.sequences(0, 25).language(5 + i)
    with pytest.raises(IndexError):
        dataset[20]


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.5])
def test_as_many_rows_of_each_language_whatever_the_replay_ratio(ratio: float) -> None:
    mixture = Mixture([("ko", 1 - ratio, stream()), ("en", ratio, stream(seed=1))], seed=3)
    found = mixture.sequences_by_language(11, 4)
    assert {language: len(rows) for language, rows in found.items()} == ({"en": 4, "ko": 4} if ratio else {"ko": 4})
    for language, rows in found.items():
        indices = [i for i in range(11, 2000) if mixture.sequences(i, i + 1).language(0) == language][:4]
        for index, row in zip(indices, rows, strict=True):
            assert np.array_equal(row["input_ids"], mixture.sequence(index)["input_ids"])


def test_unpacked_rows_carry_their_attention_mask() -> None:
    mixture = Mixture([("ko", 1.0, PaddedStream(make_corpus([[5, 30]]), T))])
    assert set(mixture.sequence(0)) == {"input_ids", "shift_labels", "position_ids", "attention_mask"}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4])
def test_epoch_rows_read_as_much_as_there_is(ratio: float) -> None:
    corpora = [("ko", (1 - ratio) * share, stream(count)) for share, count in ((0.75, 600), (0.25, 200))]
    mixture = Mixture([*corpora, ("en", ratio, stream(100_000))][: 3 if ratio else 2], 5)
    rows = mixture.epoch_sequences("ko")
    assert rows == pytest.approx(sum(each.sequences_per_epoch for _, _, each in corpora) / (1 - ratio), abs=1)
    read = [which for which, _ in map(mixture.find, range(rows))]
    for index, (_, _, each) in enumerate(corpora):
        assert read.count(index) == pytest.approx(each.sequences_per_epoch, abs=2)
    with pytest.raises(EloError, match="'ja' has no share"):
        mixture.epoch_sequences("ja")


def test_a_tiny_corpus_beside_a_large_one_does_not_cut_the_epoch_short() -> None:
    parts = [(stream(100_000), 100_000), (stream(25), 25)]
    total = sum(size for _, size in parts)
    mixture = Mixture([("ko", size / total, each) for each, size in parts], 3)
    assert mixture.epoch_sequences("ko") == pytest.approx(parts[0][0].sequences_per_epoch, rel=0.01)


def test_shares_and_lengths_are_checked() -> None:
    with pytest.raises(EloError, match="sum to 1"):
        Mixture([("ko", 0.5, stream())])
    with pytest.raises(EloError, match="same sequence length"):
        Mixture([("ko", 0.5, stream()), ("en", 0.5, PackedStream(make_corpus([[20]]), 4))])


def test_weights_are_checked() -> None:
    corpora = [make_corpus([[5]], "wiki", 2.0), make_corpus([[5]], "news")]
    assert corpus_weights(corpora, "ko", {}) == [2.0, 1.0]
    assert corpus_weights(corpora, "ko", {"news": 0.5}) == [2.0, 0.5]
    with pytest.raises(EloError, match="'ko' corpus 'blogs': no such corpus; choose among wiki, news"):
        corpus_weights(corpora, "ko", {"blogs": 1})
    with pytest.raises(EloError, match="weight of 'ko' corpus 'news' must be a number of at least 0, got -1"):
        corpus_weights(corpora, "ko", {"news": -1})
