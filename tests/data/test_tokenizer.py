"""The tokenizer and the processes that run it."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import EOS, PREFIX, make_backend, make_texts, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elo.data import tokenizing
from elo.data.shards import token_dtype
from elo.data.tokenizer import load_tokenizer, wrap_tokenizer
from elo.data.tokenizing import TextChecker, TokenizerPool, WorkerDied, encode_long, read_frame, write_frame
from elo.errors import EloError


def save(folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=make_backend(), **special).save_pretrained(folder)
    return folder


def test_prefix_is_bos_where_there_is_one_and_eos_otherwise(tmp_path: Path) -> None:
    both = load_tokenizer(save(tmp_path / "both", bos_token="<bos>", eos_token="<eos>"))
    assert (both.prefix_token_id, both.eos_token_id) == (0, 1)
    assert both.vocab_size == make_backend().get_vocab_size() and both.dtype == np.dtype("<u2")
    only_eos = load_tokenizer(str(save(tmp_path / "eos", eos_token="<eos>")))
    assert (only_eos.prefix_token_id, only_eos.eos_token_id) == (1, 1)
    only_bos = load_tokenizer(save(tmp_path / "bos", bos_token="<bos>"))
    assert (only_bos.prefix_token_id, only_bos.eos_token_id) == (0, 0)
    assert both.sha256 == only_eos.sha256 != wrap_tokenizer(Tokenizer(models.BPE()), 0, 0, "x").sha256
    with pytest.raises(EloError, match="neither a bos nor an eos token"):
        load_tokenizer(save(tmp_path / "none"))


def test_documents_are_framed_and_truncation_and_templates_of_the_tokenizer_do_not_apply(tmp_path: Path) -> None:
    folder = save(tmp_path / "it", bos_token="<bos>", eos_token="<eos>")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    texts = make_texts(20)
    plain = make_backend().encode_batch(texts, add_special_tokens=False)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [encoding.ids for encoding in plain]
    framed = [ids.tolist() for ids in tokenizer.encode_documents(texts)]
    assert framed == [[PREFIX, *encoding.ids, EOS] for encoding in plain]


def test_what_cannot_serve_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(EloError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(EloError, match="no such folder"):
        load_tokenizer(tmp_path / "nothing")
    damaged = save(tmp_path / "damaged", eos_token="<eos>")
    (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(EloError, match="damaged: its tokenizer"):
        load_tokenizer(damaged)
    tokenizer = make_tokenizer()
    tokenizer.check_embedding(tokenizer.vocab_size)
    with pytest.raises(EloError, match=r"token ids up to \d+, but the model has 100 embedding rows"):
        tokenizer.check_embedding(100)


def test_dtype_follows_the_vocabulary() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == (np.dtype("<u2"), np.dtype("<u4"))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_back_in_order_from_any_number_of_workers(workers: int) -> None:
    backend = make_backend()
    batches = [[text.encode() for text in make_texts(7, seed)] for seed in range(12)]
    checker = TextChecker(backend, ["<bos>", "<eos>"])
    with TokenizerPool(backend, PREFIX, EOS, np.dtype("<u2"), workers, checker) as pool:
        found = list(pool.map(batches, lambda batch: batch, lambda batch: [True] * 6 + [False]))
    assert [batch for batch, _ in found] == batches
    for batch, (tokens, lengths, counts) in found:
        assert counts.tolist() == [[0, len(text), 0] for text in batch[:6]] + [[0, 0, 0]]
        encodings = backend.encode_batch([text.decode() for text in batch], add_special_tokens=False)
        expected = [id for encoding in encodings for id in (PREFIX, *encoding.ids, EOS)]
        assert tokens.tolist() == expected
        assert lengths.tolist() == [len(encoding.ids) + 2 for encoding in encodings]


def test_a_worker_that_is_killed_is_noticed_and_none_is_left_behind() -> None:
    with (
        pytest.raises(WorkerDied, match=f"status -{signal.SIGKILL.value}"),
        TokenizerPool(make_backend(), PREFIX, EOS, np.dtype("<u2"), 2, TextChecker(make_backend(), [])) as pool,
    ):
        processes = list(pool._processes)
        os.kill(processes[0].pid, signal.SIGKILL)
        list(pool.map([[b"text"]] * 8, lambda batch: batch))
    assert all(process.returncode is not None for process in processes)


def test_a_frame_that_a_killed_worker_did_not_finish_counts_as_none() -> None:
    stream = io.BytesIO()
    write_frame(stream, b"tokens", b"", b"counts")
    whole = stream.getvalue()
    assert read_frame(io.BytesIO(whole)) == [b"tokens", b"", b"counts"]
    assert all(read_frame(io.BytesIO(whole[:size])) == [] for size in range(len(whole)))


def test_a_tokenizer_is_read_from_its_address_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elo.store.remote.WAITS_S", ())
    with pytest.raises(EloError, match=r"^hf://buckets/owner/name/model: the storage cannot be reached"):
        load_tokenizer("hf://buckets/owner/name/model")


def test_a_long_text_is_cut_only_where_that_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    text = "\n".join(make_texts(400))
    whole = backend.encode(text, add_special_tokens=False).ids
    calls = []
    find = tokenizing._find_cut
    monkeypatch.setattr(tokenizing, "_find_cut", lambda *a, **k: calls.append(find(*a, **k)) or calls[-1])
    assert encode_long(backend, text, piece=1000).tolist() == whole
    assert len(calls) > 10

    # A tokenizer that puts a space before every start of text is cut where there is a space.
    spaced = Tokenizer.from_str(backend.to_str())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    metaspace = Tokenizer.from_str(backend.to_str())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    for each in (spaced, metaspace, backend):
        for long in (text, "no line end " * 1000):
            calls.clear()
            assert encode_long(each, long, piece=500).tolist() == each.encode(long, add_special_tokens=False).ids
            assert len(calls) > 10


def test_a_long_text_without_a_place_to_cut_is_cut_all_the_same() -> None:
    spaced = Tokenizer.from_str(make_backend().to_str())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "강돌" * 5000
    ids = encode_long(spaced, text, piece=1000).tolist()
    assert len(ids) < 1.01 * len(spaced.encode(text, add_special_tokens=False).ids)
    assert spaced.decode(ids).replace(" ", "") == text
