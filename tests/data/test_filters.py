"""data.filters: what is dropped, counted and shown, equal for any number of workers and after a kill."""

import json
from pathlib import Path

import pytest
from data_fixtures import decoded, make_texts, make_tokenizer, tree, write_jsonl

from elo.config import load_config
from elo.data import corpora
from elo.data.filters import Filters
from elo.data.language import share_in
from elo.data.parallel import Parallel
from elo.data.prepare import CorpusSource, prepare
from elo.data.shard_writer import UnitWriter
from elo.errors import EloError
from elo.run import run

TOKENIZER = make_tokenizer()
GOOD = [f"{text} and so on" for text in make_texts(40, 1)]
SPAM = "buy this now " * 40
ALL = Filters(exact_duplicates=True, min_characters=8, max_characters=2000, max_repetition=0.8)
TEXTS = {
    "ko": [
        "어제는 하루 종일 비가 내렸다. 우리는 창가에 앉아 따뜻한 차를 마시며 오래된 이야기를 나누었다.",
        "시장에 가면 제철 과일과 갓 구운 빵 냄새가 난다. 할머니는 늘 같은 가게에서 두부를 사셨다.",
    ],
    "en": [
        "It rained all day yesterday. We sat by the window, drank hot tea and told each other old stories.",
        "The market smells of fresh bread and ripe fruit. My grandmother always bought tofu in the same shop.",
    ],
    "ja": [
        "昨日は一日中雨が降っていた。私たちは窓のそばに座り、温かいお茶を飲みながら昔の話をした。",
        "市場に行くと、旬の果物と焼きたてのパンの匂いがする。祖母はいつも同じ店で豆腐を買っていた。",
    ],
    "eu": [
        "Atzo egun osoan euria egin zuen. Leihoaren ondoan eseri ginen, te beroa edan eta istorio zaharrak kontatu.",
        "Azokara joaten zarenean, ogi egin berriaren eta sasoiko frutaren usaina dago. Amonak denda berean erosten du.",
    ],
}
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


@pytest.mark.parametrize("language", TEXTS)
def test_documents_in_another_language_are_dropped(tmp_path: Path, language: str) -> None:
    texts = [text for each in TEXTS.values() for text in each]
    path = str(write_jsonl(tmp_path / "mixed.jsonl", [*texts, "0123 4567 = 89; " * 20]))
    options = OPTIONS | {"filters": Filters(min_language_share=0.5)}
    prepared = prepare(TOKENIZER, {language: path}, tmp_path / "out", **options)
    assert decoded(prepared.train(language)[0], TOKENIZER) == TEXTS[language]
    corpus = prepared.manifest["languages"][language]["train"][0]
    assert corpus["other_language"] == 7
    first = next(text for text in texts if text not in TEXTS[language])
    assert corpus["dropped_examples"]["other_language"][0]["text"] == first.encode()[:200].decode(errors="ignore")


def test_the_share_of_a_document_in_its_language_is_that_of_its_pieces() -> None:
    korean, english = " ".join(TEXTS["ko"] * 20), " ".join(TEXTS["en"] * 20)
    assert share_in("ko", korean) == 1 == share_in("en", english)
    half = korean + english[: len(korean)]
    assert abs(share_in("ko", half) - 0.5) <= 1 / 8
    assert Filters(min_language_share=0.9).reason(half.encode(), "ko") == "other_language"
    assert Filters(min_language_share=0.3).reason(half.encode(), "ko") is None


def test_parallel_text_is_not_filtered_by_language(tmp_path: Path) -> None:
    rows = [{"en": en, "ko": ko} for en, ko in zip(TEXTS["en"], TEXTS["ko"], strict=True)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = CorpusSource(str(path), parallel=Parallel(("en", "ko"), ("en", "ko")))
    plain = str(write_jsonl(tmp_path / "ko.jsonl", TEXTS["ko"]))
    options = OPTIONS | {"filters": Filters(min_language_share=1)}
    prepared = prepare(TOKENIZER, {"ko": [pairs, plain]}, tmp_path / "out", **options)
    assert [corpus.num_documents for corpus in prepared.train("ko")] == [2, 2]


def test_the_language_filter_needs_codes_and_py3langid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"target": "ko", "source": "english", "corpora": {"ko": "a.jsonl", "english": "b.jsonl"}}
    raw = {"model": "m", "output": str(tmp_path / "run"), "data": data | {"filters": {"min_language_share": 0.5}}}
    with pytest.raises(
        EloError, match=r"min_language_share: 'english' is not a language code .* such as ko, or remove"
    ):
        run(raw)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EloError, match=r"filters.min_language_share: py3langid is not installed; run: pip install"):
        run(raw)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
