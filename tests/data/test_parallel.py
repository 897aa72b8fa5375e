"""Parallel text: documents that end in the counted language, in shards, configuration and translation."""

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_fixtures import decoded, make_texts, make_tokenizer, write_jsonl
from evaluation_fixtures import text_tokenizer, tiny_model
from run_fixtures import write_world

from elo.config import load_config
from elo.data.corpora import CorpusTask, DocumentReader
from elo.data.filters import FILTERS, Filters
from elo.data.parallel import Parallel, template_problem
from elo.data.prepare import CorpusSource, prepare
from elo.data.shard_writer import Position
from elo.data.sources import list_inputs
from elo.errors import EloError
from elo.evaluate import translation as measure_file
from elo.evaluate.base import Subject
from elo.evaluate.translation import Translation

PAIRS = [(f"the lamp {number}", f"등불 {number}") for number in range(10)]
INTO_KO = Parallel(("e", "k"), ("en", "ko"))
INTO_EN = Parallel(("k", "e"), ("ko", "en"))
COLUMNS = {"en": "e", "ko": "k"}


def write_pairs(path, pairs=PAIRS):
    path.write_text("".join(json.dumps({"e": e, "k": k}, ensure_ascii=False) + "\n" for e, k in pairs), "utf-8")
    return path


def read(path, parallel, on_error="stop", start=0):
    """Documents, and where reading goes on after each."""
    files = list_inputs(str(path))
    task = CorpusTask("ko", "train", 0, "made", 1.0, "text", tuple(files), parallel=parallel)
    reader = DocumentReader(task, files, on_error, frozenset(), lambda line: None)
    found = [
        (text.decode(), at.record)
        for batch in reader.batches(Position(0, start))
        for text, at in zip(batch.texts, batch.positions, strict=True)
    ]
    return found, reader.counts


def test_a_document_ends_in_the_language_that_counts_it_and_templates_take_turns(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl")
    assert read(path, INTO_KO)[0][0] == ("en: the lamp 0\nko: 등불 0", 1)
    assert read(path, INTO_EN)[0][9] == ("ko: 등불 9\nen: the lamp 9", 10)
    both = Parallel(("e", "k"), ("en", "ko"), ("{source} = {target}", "{{{target_language}}} {source}: {target}"))
    assert [text for text, _ in read(path, both)[0][:3]] == [
        "the lamp 0 = 등불 0",
        "{ko} the lamp 1: 등불 1",
        "the lamp 2 = 등불 2",
    ]


def test_rows_are_joined_code_switched_ones_alternate_and_reading_resumes_after_any_document(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl")
    parallel = Parallel(("e", "k"), ("en", "ko"), ("{source} = {target}",), pairs=3, code_switched=0.5)
    found, _ = read(path, parallel)
    assert [text for text, _ in found] == [
        "the lamp 0 = 등불 0\nthe lamp 1 = 등불 1\nthe lamp 2 = 등불 2",
        "등불 3\nthe lamp 4\n등불 5",
        "the lamp 6 = 등불 6\nthe lamp 7 = 등불 7\nthe lamp 8 = 등불 8",
        "등불 9",
    ]
    for number, (_, start) in enumerate(found):
        assert read(path, parallel, start=start)[0] == found[number + 1 :]


def test_rows_without_a_side_are_left_out_and_broken_ones_are_counted_wherever_they_are_in_a_group(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [*PAIRS[:4], ("alone", " "), *PAIRS[5:]])
    lines = path.read_text("utf-8").splitlines()
    lines[2], lines[5] = '{"e": "no Korean"}', '{"e": 3, "k": "등불"}'
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(EloError, match=r"pairs.jsonl:3: no column 'k'; the columns are 'e'; set columns"):
        read(path, INTO_KO)
    parallel = Parallel(("e", "k"), ("en", "ko"), ("{target}",), pairs=3)
    found, counts = read(path, parallel, "skip")
    assert [text for text, _ in found] == ["등불 0\n등불 1", "등불 3", "등불 6\n등불 7\n등불 8", "등불 9"]
    assert counts[0] == 2
    for number, (_, start) in enumerate(found):
        assert read(path, parallel, "skip", start)[0] == found[number + 1 :]


def test_parquet_gives_the_same_documents(tmp_path):
    jsonl = write_pairs(tmp_path / "pairs.jsonl")
    table = pyarrow.table({"k": [k for _, k in PAIRS], "e": [e.encode() for e, _ in PAIRS]})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    assert read(tmp_path / "pairs.parquet", INTO_KO)[0] == read(jsonl, INTO_KO)[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{source} {target", "unpaired brace"),
        ("{source.__class__} {target}", "unknown field"),
        ("{source!r} {target}", "unknown field"),
        ("{target} {source}", "end with {target}"),
        ("{target}", "must hold"),
    ],
)
def test_bad_templates_are_explained(template, message):
    assert message in (template_problem(template) or "")


def test_each_direction_counts_whole_for_the_language_it_ends_in(tmp_path):
    tokenizer = make_tokenizer()
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    text = str(write_jsonl(tmp_path / "en.jsonl", make_texts(40)))
    corpora = {
        "ko": [CorpusSource(pairs, parallel=INTO_KO)],
        "en": [CorpusSource(pairs, parallel=INTO_EN), text],
    }
    heldout = {"ko": str(write_jsonl(tmp_path / "ko.jsonl", make_texts(5, 1)))}

    def prepared(weight):
        corpora["en"][0] = CorpusSource(pairs, weight, parallel=INTO_EN)
        return prepare(tokenizer, corpora, tmp_path / "out", heldout=heldout, heldout_share=0.2, validation_share=0.1)

    data = prepared(1.0)
    assert decoded(data.train("ko")[0], tokenizer) == [text for text, _ in read(pairs, INTO_KO)[0]]
    english, ordinary = data.train("en")
    assert decoded(english, tokenizer) == [text for text, _ in read(pairs, INTO_EN)[0]]
    assert data.train("ko")[0].num_bytes == english.num_bytes, "half of all bytes each, whatever the sides' lengths"
    held = data.heldout("en").num_documents + data.validation("en").num_documents
    assert held + ordinary.num_documents == 40 and held, "only ordinary text is held out"
    again = prepared(3.0)
    assert [each.weight for each in again.train("en")] == [3.0, 1.0]
    del corpora["en"][1]
    with pytest.raises(EloError, match="'en' has only parallel corpora, which are never held out"):
        prepare(tokenizer, corpora, tmp_path / "other", heldout=heldout)


def test_filters_drop_and_count_whole_documents(tmp_path):
    """A pair alone is too short, and pairs that come again in another document are no duplicate."""
    path = write_pairs(tmp_path / "pairs.jsonl", [PAIRS[at] for at in (0, 1, 2, 3, 0, 1, 1, 0)] + [("a", "b")] * 2)
    documents = [text for text, _ in read(path, replace(INTO_KO, pairs=2))[0]]
    filters = Filters(exact_duplicates=True, min_characters=len(documents[0]))
    heldout = {"ko": str(write_jsonl(tmp_path / "ko.jsonl", make_texts(5, 1)))}
    corpora = {"ko": CorpusSource(str(path), parallel=replace(INTO_KO, pairs=2))}
    data = prepare(make_tokenizer(), corpora, tmp_path / "out", heldout=heldout, filters=filters)
    assert decoded(data.train("ko")[0], make_tokenizer()) == [documents[0], documents[1], documents[3]]
    (counts,) = data.manifest["languages"]["ko"]["train"]
    assert {name: counts[name] for name in FILTERS if counts[name]} == {"duplicate": 1, "too_short": 1}
    assert [each["place"] for each in counts["dropped_examples"]["duplicate"]] == [f"{path}:5"]


def test_the_configuration_is_checked(tmp_path):
    config = write_world(tmp_path)
    pairs = {"path": str(write_pairs(tmp_path / "pairs.jsonl")), "kind": "parallel", "columns": {"en": "e", "xx": "k"}}
    config["data"]["corpora"]["xx"] = [config["data"]["corpora"]["xx"], pairs]
    corpus = load_config(config).data.corpora["xx"][1]
    assert corpus.parallel("xx").languages == ("en", "xx")
    assert corpus.parallel("en").columns == ("k", "e")
    for change, message in (
        ({"kind": "text"}, "belong to kind: parallel"),
        ({"columns": {"xx": "k"}}, "name the columns of two languages"),
        ({"columns": {"en": "e", "ko": "k"}}, "columns has no 'xx', only en and ko"),
        ({"code_switched": 0.5}, "set pairs to 2 or more"),
        ({"templates": ["{target}"]}, "must hold"),
    ):
        config["data"]["corpora"]["xx"][1] = {**pairs, **change}
        with pytest.raises(EloError, match=message):
            load_config(config)
    config["data"]["corpora"]["xx"][1] = pairs
    config["evaluation"]["translation"] = {"path": pairs["path"], "columns": pairs["columns"]}
    with pytest.raises(EloError, match="is also a training corpus"):
        load_config(config)


def test_translation_is_scored_in_both_directions(tmp_path):
    pytest.importorskip("sacrebleu")
    tokenizer = text_tokenizer()
    pairs = [("the river", "산 너머"), ("the mill", "우물이 하나"), ("salt and water", "비가 온다"), ("a", "물은 달다")]
    path = str(write_pairs(tmp_path / "pairs.jsonl", pairs))
    model = tiny_model("llama", tokenizer.vocab_size)
    asked = Translation(path=path, columns=COLUMNS, shots=1, max_new_tokens=24)
    subject = Subject(model, tokenizer)
    before = {value.language: value for value in asked.measure(subject).values}
    assert set(before) == {"en", "ko"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.div_(15.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    documents = []
    for layout, turned in ((INTO_KO, False), (INTO_EN, True)):
        each = [pair[::-1] if turned else pair for pair in pairs]
        shot = layout.example(*each[0], measure_file.DEFAULT_TEMPLATE) + "\n"
        documents += [shot + layout.example(*pair, measure_file.DEFAULT_TEMPLATE) + "\n" for pair in each[1:]]
    for _ in range(80):
        for document in documents:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.backend.encode(document).ids]])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {value.language: value for value in asked.measure(subject).values}
    for language, value in after.items():
        assert value.items == 3 and value.unit == "number" and value.standard_error is not None
        assert value.value > before[language].value + 30
        assert value.value > 90


def test_translation_names_what_is_missing(tmp_path, monkeypatch):
    path = str(write_pairs(tmp_path / "pairs.jsonl", PAIRS[:3]))
    asked = Translation(path=path, columns=COLUMNS, shots=3)
    monkeypatch.setattr(measure_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EloError, match=r"evaluation.translation: sacrebleu is not installed; run: pip install"):
        asked.check("evaluation.translation")
    monkeypatch.setattr(measure_file.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(EloError, match="has 3 pairs, all of them examples"):
        asked.check("evaluation.translation")
    with pytest.raises(EloError, match=r"translation: s3://b/x\.jsonl: is in object storage; download it"):
        asked.model_copy(update={"path": "s3://b/x.jsonl"}).check("evaluation.translation")
