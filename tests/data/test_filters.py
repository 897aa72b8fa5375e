"""data.filters: what is dropped, counted and shown, equal for any number of workers and after a kill."""

import json
from pathlib import Path

import pytest
from data_fixtures import decoded, make_texts, make_tokenizer, tree, write_jsonl

from elo.config import load_config
from elo.data import corpora
from elo.data.filters import Filters
from elo.data.prepare import prepare
from elo.data.shard_writer import UnitWriter
from elo.errors import EloError

TOKENIZER = make_tokenizer()
GOOD = [f"{text} and so on" for text in make_texts(40, 1)]
SPAM = "buy this now " * 40
ALL = Filters(exact_duplicates=True, min_characters=8, max_characters=2000, max_repetition=0.8)
OPTIONS: dict = {"shard_tokens": 300, "heldout_share": 0.0, "progress": False, "filters": ALL}


def write(folder: Path) -> list[str]:
    """Write two corpora of several files each; return their folders."""
    first = [*GOOD[:20], "short", GOOD[3], SPAM, "long " + "".join(map(str, range(900))), GOOD[5]]
    second = [GOOD[0], *GOOD[20:], "tiny", GOOD[25]]
    for name, texts in (("a", first), ("b", second)):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "1.jsonl", texts[:12])
        write_jsonl(folder / name / "2.jsonl", texts[12:])
    return [str(folder / "a"), str(folder / "b")]


def test_each_filter_drops_counts_and_shows_its_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path / "in")
    prepared = prepare(TOKENIZER, {"ko": paths}, tmp_path / "out", **OPTIONS | {"progress": True})
    assert [text for corpus in prepared.train("ko") for text in decoded(corpus, TOKENIZER)] == GOOD
    one, two = json.loads((tmp_path / "out" / "manifest.json").read_text())["languages"]["ko"]["train"]
    names = ("duplicate", "too_short", "too_long", "repetitive")
    assert [one[name] for name in names] == [2, 1, 1, 1]
    assert [two[name] for name in names] == [2, 1, 0, 0]
    assert one["dropped_examples"]["repetitive"] == [{"place": f"{paths[0]}/2.jsonl:11", "text": SPAM[:200]}]
    assert [each["place"] for each in one["dropped_examples"]["duplicate"]] == [
        f"{paths[0]}/2.jsonl:10",
        f"{paths[0]}/2.jsonl:13",
    ]
    said = capsys.readouterr()
    assert "filters dropped 8 documents: duplicate 4, too_short 2, too_long 1, repetitive 1" in said.out + said.err
    # Nothing is dropped by default, and given held-out text is never filtered.
    plain = prepare(TOKENIZER, {"ko": paths}, tmp_path / "plain", **OPTIONS | {"filters": None})
    assert sum(corpus.num_documents for corpus in plain.train("ko")) == 48
    held = str(write_jsonl(tmp_path / "held.jsonl", ["a", "a", SPAM]))
    kept = prepare(TOKENIZER, {"ko": paths}, tmp_path / "held", heldout={"ko": held}, **OPTIONS)
    assert decoded(kept.heldout("ko"), TOKENIZER) == ["a", "a", SPAM]


def test_the_same_shards_for_any_workers_units_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path / "in")
    monkeypatch.setattr(corpora, "UNIT_BYTES", 1)  # each file is a unit
    monkeypatch.setattr(corpora, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("elo.data.prepare.BYTES_PER_WORKER", 1)
    options = {"heldout_share": 0.1, "validation_share": 0.1, "shard_tokens": 60}
    for workers in (1, 2):
        prepare(TOKENIZER, {"ko": paths}, tmp_path / str(workers), **OPTIONS | options | {"workers": workers})
    assert tree(tmp_path / "1") == tree(tmp_path / "2")

    class KilledError(Exception):
        pass

    for kill_at in (2, 2, 3):
        closed: list[int] = []
        close = UnitWriter._close_segment

        def killing(
            self: UnitWriter,
            *arguments: object,
            closed: list[int] = closed,
            close: object = close,
            kill_at: int = kill_at,
        ) -> None:
            close(self, *arguments)  # type: ignore[operator]
            closed.append(1)
            if len(closed) == kill_at:
                raise KilledError

        with monkeypatch.context() as context:
            context.setattr(UnitWriter, "_close_segment", killing)
            with pytest.raises(KilledError):
                prepare(TOKENIZER, {"ko": paths}, tmp_path / "killed", **OPTIONS | options)
    prepare(TOKENIZER, {"ko": paths}, tmp_path / "killed", **OPTIONS | options)
    assert tree(tmp_path / "killed") == tree(tmp_path / "1")


def test_other_filters_start_over_and_wrong_ones_are_named(tmp_path: Path) -> None:
    paths = write(tmp_path / "in")
    prepare(TOKENIZER, {"ko": paths}, tmp_path / "out", **OPTIONS)
    with pytest.raises(EloError, match="made from other inputs or settings"):
        prepare(TOKENIZER, {"ko": paths}, tmp_path / "out", **OPTIONS | {"filters": Filters(min_characters=9)})
    with pytest.raises(EloError, match="no document with text"):
        prepare(TOKENIZER, {"ko": paths}, tmp_path / "none", **OPTIONS | {"filters": Filters(min_characters=99999)})
    data = {"target": "ko", "source": "en", "corpora": {"ko": "a.jsonl", "en": "b.jsonl"}}
    for filters, problem in {
        '{"min_characters": 9, "max_characters": 3}': "data.filters: max_characters: is 3, below min_characters, 9",
        '{"max_repetition": 2}': "data.filters.max_repetition",
        '{"deduplicate": true}': "unknown key 'data.filters.deduplicate'",
    }.items():
        with pytest.raises(EloError, match=problem):
            load_config({"model": "m", "output": "o", "data": data | {"filters": json.loads(filters)}})
