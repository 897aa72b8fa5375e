"""Text that a tokenizer loses, and special tokens that documents spell: measured, reported, refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import decoded, make_backend, make_texts, make_tokenizer, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elo.data.prepare import prepare
from elo.data.shards import PreparedData
from elo.data.text_loss import judge_loss
from elo.data.tokenizer import TextTokenizer, wrap_tokenizer
from elo.data.tokenizing import lost_bytes
from elo.errors import EloError, UnfinishedError
from elo.evaluate.evaluate import evaluate
from elo.vocab.vocabulary import measure_vocabulary

ENGLISH = [text.encode("ascii", "ignore").decode() for text in make_texts(60)]
KOREAN = ["강과 돌과 등불이 푸르다", "천천히 걷는다 그리고 노래한다"]


def unigram() -> Tokenizer:
    """Without byte fallback, learnt on English: each other word is one unknown token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "end": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_pairs_that_spell_eos() -> Tokenizer:
    """Merges lead to `</s>`, as a conversion from SentencePiece may make them."""
    letters = ["<", "/", "s", ">", "e", "n", "d", " ", "t", "h"]
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *letters, "</", "</s"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))


def byte_level_with_added_tokens() -> Tokenizer:
    tokenizer = Tokenizer.from_str(make_backend().to_str())
    tokenizer.add_special_tokens(["</s>", AddedToken("<|user|>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("      ", special=False), AddedToken("riverstone", special=False)])
    return tokenizer


def wrapped(backend: Tokenizer, **changes: Any) -> TextTokenizer:
    tokenizer = wrap_tokenizer(backend, None, backend.token_to_id("</s>"), "made")
    return TextTokenizer(**{**vars(tokenizer), **changes})


BACKENDS = [unigram, word_level, byte_pairs_that_spell_eos, byte_level_with_added_tokens]


@pytest.mark.parametrize("make", BACKENDS)
def test_a_special_token_in_text_is_text_unless_asked_otherwise(make) -> None:
    backend = make()
    eos = backend.token_to_id("</s>")
    texts = ["the end </s> the end", "</s>", "the</s>end", "the end"]
    split, kept = wrapped(backend), wrapped(backend, split_special_tokens=False)
    assert not any(eos in ids[1:-1] for ids in split.encode_documents(texts))
    expected = [0 if make is word_level and "</s>" not in text.split() else text.count("</s>") for text in texts]
    assert [ids[1:-1].tolist().count(eos) for ids in kept.encode_documents(texts)] == expected
    for tokenizer in (split, kept):
        _, counts = tokenizer.encode_and_check(texts)
        assert counts[:, 0].tolist() == [1, 1, 1, 0]
    assert split.encode_documents(texts)[3].tolist() == kept.encode_documents(texts)[3].tolist()
    assert split.sha256 == kept.sha256


def test_ordinary_added_tokens_stay_tokens_and_all_ids_stay(tmp_path: Path) -> None:
    backend = byte_level_with_added_tokens()
    tokenizer = wrapped(backend)
    texts = [*make_texts(50), "a riverstone      b", "x" * 600_000]
    for mine, theirs in zip(tokenizer.encode_batch(texts), backend.encode_batch(texts), strict=True):
        assert mine.tolist() == theirs.ids
    assert backend.token_to_id("riverstone") in tokenizer.encode_batch(texts)[50]


def test_white_space_beside_a_token_that_strips_it_is_lost_only_as_a_token() -> None:
    backend = byte_level_with_added_tokens()
    text = "the code is" + " " * 40 + "<|user|>" + "\n" * 40 + "and then"
    _, counts = wrapped(backend).encode_and_check([text])
    assert counts.tolist() == [[1, len(text), 0]]
    _, counts = wrapped(backend, split_special_tokens=False).encode_and_check([text])
    assert counts.tolist() == [[1, len(text), 80]]


def test_unknown_tokens_and_dropped_characters_are_lost() -> None:
    _, counts = wrapped(unigram()).encode_and_check([KOREAN[0], "river stone", "강 river"])
    assert counts[:, 2].tolist() == [len(KOREAN[0].replace(" ", "").encode()), 0, 3]
    dropping = Tokenizer.from_str(make_backend().to_str())
    state = json.loads(dropping.to_str())
    state["model"]["vocab"] = {
        ("lost" if token == "ê" else token): index for token, index in state["model"]["vocab"].items()
    }
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "ê" not in "".join(pair)]
    dropping = Tokenizer.from_str(json.dumps(state))  # the first byte of 강 has no token and there is no <unk>
    tokenizer = wrap_tokenizer(dropping, 0, 1, "made")
    _, counts = tokenizer.encode_and_check(["강 river"])
    assert counts.tolist() == [[0, 9, 3]]


def test_composition_and_added_white_space_are_no_loss_but_case_is() -> None:
    decomposed = "\u1100\u1161"  # which NFC composes to one syllable
    assert lost_bytes(decomposed, "가") == lost_bytes("가", decomposed) == 0
    assert lost_bytes(decomposed, "") == 6
    assert lost_bytes("ab", " a b") == 0
    assert lost_bytes("Ab", "ab") == 1
    assert lost_bytes("a\nb", "a b") == 1
    assert lost_bytes("a b", "ab", ignore_space=True) == 0
    composing = Tokenizer.from_str(make_backend().to_str())
    composing.normalizer = normalizers.NFC()
    tokenizer = wrap_tokenizer(composing, 0, 1, "made")
    _, counts = tokenizer.encode_and_check([decomposed])
    assert counts.tolist() == [[0, 6, 0]]


def test_a_tokenizer_without_a_decoder_gets_the_one_that_fits() -> None:
    backend = Tokenizer.from_str(make_backend().to_str())
    state = json.loads(backend.to_str()) | {"decoder": None}
    tokenizer = wrap_tokenizer(Tokenizer.from_str(json.dumps(state)), 0, 1, "made")
    _, counts = tokenizer.encode_and_check(make_texts(20))
    assert counts[:, 2].sum() == 0
    _, counts = wrapped(word_level()).encode_and_check(["the end\nthe end", "the stone"])
    assert counts[:, 2].tolist() == [0, 5]


def test_a_long_document_is_checked_by_its_beginning() -> None:
    _, counts = wrapped(unigram()).encode_and_check(["river stone " * 10_000 + "강" * 10_000])
    assert counts.tolist() == [[0, 1 << 16, 0]]


def test_the_limits() -> None:
    assert judge_loss("x", "t", 1, 1000, allowed=False, key="k") is None
    assert "loses 0.20% of the text" in (judge_loss("x", "t", 2, 1000, allowed=False, key="k") or "")
    assert judge_loss("x", "t", 50, 1000, allowed=False, key="k") is not None
    with pytest.raises(EloError, match=r"x: tokenizer t loses 5.10% .* accept the loss with k"):
        judge_loss("x", "t", 51, 1000, allowed=False, key="k")
    assert (judge_loss("x", "t", 51, 1000, allowed=True, key="k") or "").startswith("warning: x")


def write_model(folder: Path, backend: Tokenizer) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_prepare_measures_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = wrapped(unigram())
    korean = str(write_jsonl(tmp_path / "ko.jsonl", KOREAN * 20))
    english = str(write_jsonl(tmp_path / "en.jsonl", ENGLISH))
    options: dict[str, Any] = {"heldout_share": 0.1}
    with pytest.raises(EloError, match=r"ko.jsonl \(ko\): tokenizer made loses 9\d.*data.allow_lost_text: true"):
        prepare(tokenizer, {"ko": korean, "en": english}, tmp_path / "out", **options)
    with pytest.raises(UnfinishedError):
        PreparedData.open(tmp_path / "out")
    prepared = prepare(tokenizer, {"ko": korean, "en": english}, tmp_path / "out", allow_lost_text=True, **options)
    assert "warning: " + korean in capsys.readouterr().err
    found = prepared.manifest["languages"]["ko"]["train"][0]
    assert found["checked_bytes"] == sum(len(text.encode()) for text in KOREAN * 20)
    assert prepared.summary()["train"]["ko"]["lost_text"] == found["lost_bytes"] / found["checked_bytes"] > 0.8
    assert prepared.summary()["train"]["en"]["lost_text"] == 0
    with pytest.raises(EloError, match="loses"):  # what is finished is judged again
        prepare(tokenizer, {"ko": korean, "en": english}, tmp_path / "out", **options)


def test_prepare_reports_special_tokens_and_keeps_them_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*make_texts(30), "it ends <eos> here", "<bos>and<eos>twice<eos>"]
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    tokenizer = make_tokenizer()
    text = prepare(tokenizer, {"ko": source}, tmp_path / "text", heldout_share=0)
    assert "ko: 4 special tokens occur in the text; they were tokenised as text" in capsys.readouterr().err
    assert text.manifest["languages"]["ko"]["train"][0]["special_tokens"] == 4
    assert decoded(text.train("ko")[0], tokenizer) == texts
    kept = prepare(tokenizer, {"ko": source}, tmp_path / "kept", heldout_share=0, split_special_tokens=False)
    assert kept.manifest["tokenizer"]["split_special_tokens"] is False
    assert [int((each.arrays.tokens == 1).sum()) for corpus in kept.train("ko") for each in corpus.shards] == [32 + 3]
    assert [int((each.arrays.tokens == 1).sum()) for corpus in text.train("ko") for each in corpus.shards] == [32]
    with pytest.raises(EloError, match="made from other inputs or settings"):
        prepare(tokenizer, {"ko": source}, tmp_path / "text", heldout_share=0, split_special_tokens=False)


def test_evaluate_and_vocab_measure_report_and_refuse(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", unigram())
    corpora = {
        "ko": str(write_jsonl(tmp_path / "ko.jsonl", KOREAN * 5)),
        "en": str(write_jsonl(tmp_path / "en.jsonl", [*ENGLISH, "the </s> end"])),
    }
    for measure in (evaluate, measure_vocabulary):
        with pytest.raises(EloError, match=r"ko.jsonl.*loses 9\d.\d\d% of the text.*--allow-lost-text"):
            measure(model, corpora=corpora)
    measured = evaluate(model, corpora=corpora, allow_lost_text=True)["corpora"]
    assert measured["ko"]["lost_text"] > 0.8 and measured["en"]["lost_text"] < 0.01
    assert (measured["ko"]["special_tokens"], measured["en"]["special_tokens"]) == (0, 1)
    kept = evaluate(model, corpora={"en": corpora["en"]}, split_special_tokens=False)["corpora"]["en"]
    assert kept["text_tokens"] < measured["en"]["text_tokens"] and kept["bytes"] == measured["en"]["bytes"]
    table = measure_vocabulary(model, corpora, allow_lost_text=True)
    assert table["languages"]["ko"]["lost_text"] > 0.8
    assert "ko.jsonl" in table["warnings"][0]


def test_a_resumed_prepare_measures_the_same_documents(tmp_path: Path) -> None:
    from elo.data.corpora import CHECKED_EVERY, FIRST_CHECKED, CorpusTask, DocumentReader, Position
    from elo.data.sources import InputFile

    assert FIRST_CHECKED % CHECKED_EVERY == 0
    lines = 3 * FIRST_CHECKED

    def checked(folder: Path, start: Position) -> dict[tuple[int, int], bool]:
        files = tuple(InputFile(str(folder / name), 1) for name in ("a.jsonl", "b.jsonl"))
        task = CorpusTask("ko", "train", 0, "a", 1.0, "text", files)
        reader = DocumentReader(task, list(files), "stop", frozenset(), print)
        return {
            (position.file, position.record): was
            for batch in reader.batches(start)
            for position, was in zip(batch.positions, batch.checked, strict=True)
        }

    for file in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / file, [f"text {number}" for number in range(lines)])
    everything = checked(tmp_path, Position())
    assert len(everything) == 2 * lines
    resumed = checked(tmp_path, Position(0, 300))
    assert resumed == {place: was for place, was in everything.items() if place > (0, 300)}
    share = np.mean([was for (file, _), was in everything.items() if file == 1])
    assert share == 1 / CHECKED_EVERY
