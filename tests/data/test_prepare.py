"""elo prepare: what comes out is what went in, whatever happens on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import decoded, make_texts, make_tokenizer, tree, write_jsonl

from elo.data.mixture import build_mixture
from elo.data.prepare import CorpusSource, prepare
from elo.data.shards import PreparedData, TokenCorpus
from elo.errors import EloError, UnfinishedError

KO, EN, HELD = make_texts(60, 1), make_texts(40, 2), make_texts(10, 3)
TOKENIZER = make_tokenizer()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    return {
        "ko": write_jsonl(folder / "ko.jsonl.gz", KO),
        "en": write_jsonl(folder / "en.jsonl", EN),
        "held": write_jsonl(folder / "held.jsonl", HELD),
    }


def run(output: Path, inputs: dict[str, Path], **more: object) -> PreparedData:
    corpora = {"ko": [str(inputs["ko"])], "en": [str(inputs["en"])]}
    options: dict = {"shard_tokens": 200, "progress": False, **more}
    return prepare(TOKENIZER, options.pop("corpora", corpora), output, **options)


def test_every_document_is_in_the_shards_once_framed_and_counted(tmp_path: Path, inputs: dict[str, Path]) -> None:
    prepared = run(tmp_path / "out", inputs, heldout={"ko": str(inputs["held"])}, heldout_share=0)
    assert prepared.languages == ["ko", "en"]
    (ko,) = prepared.train("ko")
    assert len(ko.shards) > 3
    assert decoded(ko, TOKENIZER) == KO
    assert decoded(prepared.heldout("ko"), TOKENIZER) == HELD
    assert decoded(prepared.train("en")[0], TOKENIZER) == EN
    assert ko.document_sizes.tolist() == [len(text.encode()) for text in KO]
    assert ko.num_bytes == sum(len(text.encode()) for text in KO)
    assert ko.num_text_tokens == sum(len(ids) for ids in TOKENIZER.encode_batch(KO)) == ko.num_tokens - 120
    assert prepared.summary()["train"]["ko"]["bytes"] == ko.num_bytes
    assert prepared.manifest["tokenizer"]["sha256"] == TOKENIZER.sha256
    assert prepared.vocab_size == TOKENIZER.vocab_size
    assert [name for name in tree(tmp_path / "out") if ".tmp-" in name] == []
    with pytest.raises(EloError, match="no held-out text for 'en'"):
        prepared.heldout("en")
    with pytest.raises(EloError, match="no language 'ja', only ko, en"):
        prepared.train("ja")


def test_held_out_documents_are_cut_by_their_text_and_copies_stay_together(tmp_path: Path) -> None:
    texts = make_texts(100, 5)
    source = write_jsonl(tmp_path / "copies.jsonl", texts + texts[::-1])
    prepared = prepare(
        TOKENIZER, {"ko": str(source)}, tmp_path / "out", heldout_share=0.2, shard_tokens=300, progress=False
    )
    train, held = decoded(prepared.train("ko")[0], TOKENIZER), decoded(prepared.heldout("ko"), TOKENIZER)
    assert sorted(train + held) == sorted(texts + texts)
    assert not set(train) & set(held)
    assert 5 <= len(set(held)) <= 40
    # However small the share, one document is held out; here it is not clear which before all have been read.
    small = prepare(TOKENIZER, {"ko": str(source)}, tmp_path / "small", heldout_share=1e-9, progress=False)
    assert len(set(decoded(small.heldout("ko"), TOKENIZER))) == 1
    single = write_jsonl(tmp_path / "single.jsonl", ["one"] * 3)
    with pytest.raises(EloError, match="only one document for 'ko'"):
        prepare(TOKENIZER, {"ko": str(single)}, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(EloError, match="all 200 documents were held out; lower heldout_share"):
        prepare(TOKENIZER, {"ko": str(source)}, tmp_path / "all", heldout_share=1 - 1e-12, progress=False)


def texts_of(corpus: TokenCorpus) -> list[str]:
    return [corpus.document_text(index) for index in range(corpus.num_documents)]


def test_validation_text_is_cut_out_of_training_text_and_nowhere_else(tmp_path: Path, inputs: dict[str, Path]) -> None:
    texts = make_texts(400, 5)
    source = write_jsonl(tmp_path / "copies.jsonl", texts + texts[::-1] + HELD[:5])
    options: dict = {"validation_share": 0.01, "shard_tokens": 300, "progress": False}
    prepared = prepare(TOKENIZER, {"ko": str(source)}, tmp_path / "out", heldout_share=0.02, **options)
    train, held, validation = (
        decoded(each, TOKENIZER)
        for each in (prepared.train("ko")[0], prepared.heldout("ko"), prepared.validation("ko"))
    )
    assert sorted(train + held + validation) == sorted(texts + texts + HELD[:5]), "every document is in one of them"
    assert not set(train) & set(validation) and not set(held) & set(validation) and not set(train) & set(held)
    assert len(set(validation)) >= 8, "one in a hundred documents"
    assert texts_of(prepared.heldout("ko")) == held and texts_of(prepared.validation("ko")) == validation
    assert prepared.summary()["validation"]["ko"]["documents"] == len(validation)
    mixture = build_mixture(prepared, "ko", replay_ratio=0, sequence_length=64, seed=3)
    rows = [TOKENIZER.backend.decode(mixture.sequence(index)["input_ids"].tolist()) for index in range(200)]
    begins = [text[:9] for text in validation]
    assert not any(begin in row for begin in begins for row in rows)
    assert any(text[:9] in row for text in train for row in rows), "or nothing would be found at all"
    # Text that was given to be held out is validation text neither, when it is found in training text.
    given = {"ko": str(inputs["held"])}
    prepared = prepare(
        TOKENIZER, {"ko": str(source)}, tmp_path / "given", heldout=given, **{**options, "validation_share": 0.9}
    )
    assert texts_of(prepared.heldout("ko")) == HELD
    assert set(HELD[:5]) <= set(decoded(prepared.train("ko")[0], TOKENIZER))
    assert not set(HELD) & set(texts_of(prepared.validation("ko")))


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (150, 1), (600, 6), (4000, 30)])
def test_validation_text_has_enough_documents_and_leaves_some(tmp_path: Path, count: int, expected: int) -> None:
    source = write_jsonl(tmp_path / "ko.jsonl", make_texts(count, 5, words=3))
    held = {"ko": str(write_jsonl(tmp_path / "held.jsonl", HELD))}
    options: dict = {"validation_share": 1e-9, "progress": False}
    prepared = prepare(TOKENIZER, {"ko": str(source)}, tmp_path / "out", heldout=held, **options)
    assert prepared.summary()["validation"]["ko"]["documents"] == expected
    assert prepared.train("ko")[0].num_documents == count - expected
    if not expected:
        with pytest.raises(EloError, match="no validation text for 'ko'"):
            prepared.validation("ko")


def test_damaged_text_is_found(tmp_path: Path, inputs: dict[str, Path]) -> None:
    output = tmp_path / "out"
    run(output, inputs, heldout={"ko": str(inputs["held"])})
    expected = tree(output)
    (text,) = sorted((output / "ko" / "heldout").rglob("*00000.text"))[:1]
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(UnfinishedError, match=r"\.text: token shard is damaged: it has \d+ bytes, expected \d+"):
        PreparedData.open(output)
    run(output, inputs, heldout={"ko": str(inputs["held"])})
    assert tree(output) == expected
    assert not list((output / "ko" / "train").rglob("*.text")), "training text is not stored a second time"


def test_held_out_documents_in_training_text_are_counted(
    tmp_path: Path, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "leaky.jsonl", KO + HELD[:4])
    prepared = prepare(
        TOKENIZER, {"ko": str(source)}, tmp_path / "out", heldout={"ko": str(inputs["held"])}, progress=True
    )
    assert prepared.manifest["languages"]["ko"]["train"][0]["overlapping"] == 4
    assert "4 training documents are also in held-out text" in capsys.readouterr().err


def test_the_outcome_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elo.data.prepare.BYTES_PER_WORKER", 1)
    monkeypatch.setattr("elo.data.corpora.BATCH_BYTES", 300)
    run(tmp_path / "two", inputs, workers=2)
    monkeypatch.undo()
    run(tmp_path / "one", inputs, workers=1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_finished_data_is_kept_and_new_weights_tokenise_nothing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    output = tmp_path / "out"
    first = run(output, inputs)
    before = {name: (output / name).stat().st_mtime_ns for name in tree(output)}
    assert run(output, inputs, workers=2).fingerprint == first.fingerprint
    assert {name: (output / name).stat().st_mtime_ns for name in tree(output)} == before
    weighed = run(output, inputs, corpora={"ko": CorpusSource(str(inputs["ko"]), weight=3), "en": str(inputs["en"])})
    assert weighed.train("ko")[0].weight == 3 and weighed.fingerprint == first.fingerprint
    changed = [n for n in before if (output / n).stat().st_mtime_ns != before[n]]
    assert changed == ["manifest.json"]


def test_other_inputs_do_not_replace_finished_data_unless_asked_and_then_only_what_changed(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    output = tmp_path / "out"
    run(output, inputs)
    english = output / "en/train/0/00000-00000.tokens"
    before = (english.stat().st_mtime_ns, tree(output))
    write_jsonl(inputs["ko"], KO[:30])
    with pytest.raises(EloError, match="holds finished data made from other inputs or settings"):
        run(output, inputs)
    assert tree(output) == before[1]
    again = run(output, inputs, overwrite=True)
    assert len(decoded(again.train("ko")[0], TOKENIZER)) + again.heldout("ko").num_documents == 30
    assert english.stat().st_mtime_ns == before[0]
    fresh = run(tmp_path / "fresh", inputs)
    assert tree(output) == tree(tmp_path / "fresh") and fresh.fingerprint == again.fingerprint
    run(output, inputs, overwrite=True, corpora={"en": str(inputs["en"])})
    assert not (output / "ko" / "train" / "0").exists()


def test_a_partial_output_of_other_settings_starts_over_and_says_so(
    tmp_path: Path, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(output, inputs)
    (output / "manifest.json").unlink()
    with pytest.raises(UnfinishedError, match="is unfinished"):
        PreparedData.open(output)
    run(output, inputs, shard_tokens=500, progress=True)
    assert "made with a different shard_tokens; starting over" in capsys.readouterr().err
    run(tmp_path / "fresh", inputs, shard_tokens=500)
    assert tree(output) == tree(tmp_path / "fresh")


def test_bad_input_stops_with_file_and_line_leaves_nothing_and_can_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    good = "".join(json.dumps({"text": text}) + "\n" for text in KO)
    bad.write_text('{"text": ""}\n' + good + '{"text": 1}\n{"body": "x"}\n' + '{"text": " "}\n')
    with pytest.raises(EloError, match=r"bad.jsonl:62: column 'text' is number.*on_error: skip"):
        prepare(TOKENIZER, {"ko": str(bad)}, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
    # After some shards are whole, they are kept.
    with pytest.raises(EloError, match=r"bad.jsonl:62"):
        prepare(TOKENIZER, {"ko": str(bad)}, tmp_path / "out", progress=False, shard_tokens=200, heldout_share=0)
    options: dict = {"shard_tokens": 200, "heldout_share": 0}
    kept = tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    prepared = prepare(TOKENIZER, {"ko": str(bad)}, tmp_path / "out", on_error="skip", **options)
    assert not any(name.endswith(".tokens") and tree(tmp_path / "out")[name] != kept[name] for name in kept)
    corpus = prepared.manifest["languages"]["ko"]["train"][0]
    assert (corpus["skipped"], corpus["empty"], corpus["documents"]) == (2, 2, 60)
    said = capsys.readouterr().err
    assert "skipped: " in said and "bad.jsonl:63: no column 'text'" in said
    assert "ko: 2 documents could not be read and were skipped" in said and "2 documents contain no text" in said
    with pytest.raises(EloError, match="holds finished data"):
        prepare(TOKENIZER, {"ko": str(bad)}, tmp_path / "out", progress=False, **options)
    with pytest.raises(EloError, match=r"bad.jsonl:62"):
        prepare(TOKENIZER, {"ko": str(bad)}, tmp_path / "out", progress=False, overwrite=True, **options)


def test_a_failure_before_the_first_shard_removes_nothing_else(tmp_path: Path, inputs: dict[str, Path]) -> None:
    output = tmp_path / "out"
    run(output, inputs)
    for name in ("notes.txt", "ko/notes.txt", "raw/train/text.txt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")
    (output / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(EloError, match=r"bad\.jsonl:1"):
        run(output, inputs, corpora={"ko": str(tmp_path / "bad.jsonl")}, heldout_share=0, overwrite=True)
    left = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert left == ["ko/notes.txt", "notes.txt", "prepare.json", "raw/train/text.txt"]
    assert not (output / "en").exists() and (output / "empty").is_dir()
    run(output, inputs)


def test_foreign_folders_and_wrong_arguments_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    cases: list[tuple[str, dict]] = [
        ("was not made by elo prepare", {"output": foreign}),
        ("is a file", {"output": tmp_path / "file"}),
        ("cannot be written", {"output": tmp_path / "file" / "below"}),
        ("language name '../up': use only", {"corpora": {"../up": [str(inputs["ko"])]}}),
        ("language 'ko': has no corpus", {"corpora": {"ko": []}}),
        ("no corpora", {"corpora": {}}),
        ("no such file or folder", {"corpora": {"ko": ["/nothing/there.jsonl"]}}),
        ("weight must be", {"corpora": {"ko": CorpusSource(str(inputs["ko"]), -1)}}),
        ("no column 'body'; the columns are 'text'", {"corpora": {"ko": CorpusSource(str(inputs["ko"]), 1, "body")}}),
        ("heldout_share must be at least 0 and below 1", {"heldout_share": 1.5}),
        ("validation_share must be at least 0 and below 1", {"validation_share": 1.0}),
        ("on_error must be stop or skip", {"on_error": "ignore"}),
        ("must be at least 1", {"shard_tokens": 0}),
        ("but the model has 7 embedding rows", {"vocab_size": 7}),
    ]
    for said, options in cases:
        output = options.pop("output", tmp_path / "out")
        with pytest.raises(EloError) as caught:
            run(output, inputs, **options)
        assert said in str(caught.value), caught.value
        assert output in (foreign, tmp_path / "file", tmp_path / "file" / "below") or not output.exists(), said
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_token_ids_beyond_the_embedding_name_the_document(tmp_path: Path) -> None:
    from elo.data.tokenizer import wrap_tokenizer

    backend = make_tokenizer().backend
    backend.add_tokens(["<image>"])
    tokenizer = wrap_tokenizer(backend, 0, 1, "with-image")
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", "an <image> here", "fine too"])
    with pytest.raises(EloError, match=r"a.jsonl:2: tokenizer with-image gives token id \d+, but the model has"):
        prepare(
            tokenizer,
            {"ko": str(source)},
            tmp_path / "out",
            vocab_size=tokenizer.vocab_size - 1,
            heldout_share=0,
            progress=False,
        )


def test_damage_to_the_shards_is_found_and_mended(tmp_path: Path, inputs: dict[str, Path]) -> None:
    output = tmp_path / "out"
    whole = tree_of = run(output, inputs)
    expected = tree(output)
    shard = output / "ko/train/0/00000-00001.tokens"
    data = shard.read_bytes()

    shard.write_bytes(data[:-2])
    with pytest.raises(
        UnfinishedError, match=r"00000-00001.tokens: token shard is damaged: it has \d+ bytes, expected \d+"
    ):
        PreparedData.open(output)
    run(output, inputs)
    assert tree(output) == expected

    shard.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])
    moved = tmp_path / "moved"  # a place that no checksum has been verified at
    shutil.copytree(output, moved)
    corpus = PreparedData.open(moved).train("ko")[0]
    with pytest.raises(UnfinishedError, match=r"00000-00001.tokens: .*its checksum differs"):
        [corpus.document(i) for i in range(corpus.num_documents)]
    shard.unlink()
    with pytest.raises(UnfinishedError, match="token shard is missing"):
        PreparedData.open(output)
    assert whole.fingerprint == tree_of.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.update(schema=99),
        lambda m: m.pop("languages"),
        lambda m: m.update(dtype="O"),
        lambda m: m["tokenizer"].update(eos_token_id="1"),
        lambda m: m["languages"]["ko"]["train"][0]["shards"][0].update(name="../../etc/passwd"),
        lambda m: m["languages"]["ko"]["train"][0]["shards"][0].update(documents=-1),
        lambda m: m["languages"]["ko"].pop("heldout"),
    ],
)
def test_a_manifest_is_not_believed_blindly(tmp_path: Path, inputs: dict[str, Path], damage: object) -> None:
    output = tmp_path / "out"
    run(output, inputs)
    manifest = json.loads((output / "manifest.json").read_text())
    damage(manifest)  # type: ignore[operator]
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnfinishedError, match=r"manifest\.json: "):
        PreparedData.open(output)


def test_mixture_from_prepared_data(tmp_path: Path, inputs: dict[str, Path]) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(20, 9))
    corpora = {"ko": [CorpusSource(str(inputs["ko"])), CorpusSource(str(more), weight=2)], "en": str(inputs["en"])}
    prepared = run(tmp_path / "out", inputs, corpora=corpora)
    tokens = [corpus.num_tokens for corpus in prepared.train("ko")]
    mixture = build_mixture(prepared, "ko", "en", 0.25, sequence_length=16, seed=3)
    shares = [source.share for source in mixture.sources]
    total = tokens[0] + 2 * tokens[1]
    assert shares == pytest.approx([0.75 * tokens[0] / total, 0.75 * 2 * tokens[1] / total, 0.25])
    weights = {"ko": {"more": 0.0}}
    assert len(build_mixture(prepared, "ko", "en", 0.25, 16, 3, weights=weights).sources) == 2
    assert [s.language for s in build_mixture(prepared, "ko", "en", 0, 16).sources] == ["ko", "ko"]
    assert [s.language for s in build_mixture(prepared, "ko", "en", 1, 16).sources] == ["en"]
    row = build_mixture(prepared, "ko", "en", 0.1, 16, packing=False).sequence(0)
    assert "attention_mask" in row and np.asarray(row["input_ids"]).shape == (16,)
    seeds = {source.stream.seed for source in mixture.sources}
    assert len(seeds) == 3, "streams of different corpora must not be shuffled alike"
    for said, arguments in {
        "replay_ratio must be between 0 and 1": {"replay_ratio": 1.5},
        "needs a source language": {"source": ()},
        "'ko' is both a target and a source": {"source": "ko"},
        "no language 'ja'": {"source": "ja"},
        "has a weight above 0": {"weights": {"ko": {"ko": 0, "more": 0}}},
        "sequence_length must be": {"sequence_length": 0},
    }.items():
        with pytest.raises(EloError, match=said):
            build_mixture(prepared, **{"target": "ko", "source": "en", "sequence_length": 16, **arguments})


def test_corpora_of_one_language_get_names_that_differ(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "wiki.jsonl", make_texts(5, ord(folder)))
    corpora = {"ko": [str(tmp_path / "a/wiki.jsonl"), str(tmp_path / "b/wiki.jsonl")]}
    prepared = prepare(TOKENIZER, corpora, tmp_path / "out", progress=False, heldout_share=0)
    assert [corpus.name for corpus in prepared.train("ko")] == ["wiki", "wiki-2"]


def test_a_cut_file_is_counted_as_a_file_and_a_lost_one_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", make_texts(30))
    whole = write_jsonl(folder / "b.jsonl.gz", make_texts(3000, 1)).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    options: dict = {"heldout_share": 0, "on_error": "skip"}
    prepared = prepare(TOKENIZER, {"ko": str(folder)}, tmp_path / "out", **options)
    (found,) = prepared.manifest["languages"]["ko"]["train"]
    assert (found["cut_files"], found["skipped"]) == (1, 0) and 1000 < found["documents"] < 2000
    said = capsys.readouterr().err
    assert "b.jsonl.gz:" in said and "it is truncated" in said
    assert "ko: 1 files could not be read to the end; the rest of each was skipped" in said
    with pytest.raises(EloError, match="it is truncated"):  # what was left out is not taken for all of it
        prepare(TOKENIZER, {"ko": str(folder)}, tmp_path / "out", heldout_share=0, overwrite=True)
    (folder / "c.jsonl.zst").write_bytes(b"not zstd")
    with pytest.raises(EloError, match=r"c.jsonl.zst:1: .*on_error: skip applies to documents, not to whole files"):
        prepare(TOKENIZER, {"ko": str(folder)}, tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
