"""A phase on disk, by every method, on all rows of the vocabulary and on some: killed, resumed, whole again."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from data_fixtures import make_texts, make_tokenizer, write_jsonl
from method_fixtures import CASES, FIRST_NEW_ROW, case_id
from surgery_fixtures import stored
from training_fixtures import LENGTH, SETTINGS, VOCAB, corpus, rows, supervision, tiny_llama

from elo.data.prepare import prepare
from elo.errors import EloError, StoppedBySignalError
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.train.arguments import sequences_per_step
from elo.train.phase import train_checkpoint
from elo.train.vocabulary_cut import CutSequences, VocabularyCut, choose_rows

WHOLE = 96
"""Rows of the models' vocabulary; the text uses the first VOCAB of them."""
USED = [*range(VOCAB), 70, 71, 90]
STEPS = 5
QUICK = SETTINGS.model_copy(update={"save_steps": 2, "weight_decay": 0.1, "evaluations": 0})


def _train(case, folder, name, *, kept=None, tie=False, settings=QUICK, before_step=None, evaluate=None):
    """Train the case's model on disk; `kept` rows of the vocabulary, or all. Returns its tensors and the record."""
    base = folder / f"base-{tie}"
    if not base.exists():
        case.start(tie=tie, vocab=WHOLE).save_pretrained(base)
    if kept is not None:
        (folder / "rows.json").write_text(json.dumps(kept))

    def prepare(model):
        prepared = case.method.prepare(model, case.phase, case.setup(tie=tie, vocab=WHOLE))
        if before_step is None:
            return prepared

        def both(step, forget):
            before_step(step)
            if prepared.before_step:
                prepared.before_step(step, forget)

        return replace(prepared, before_step=both)

    record = train_checkpoint(
        base,
        folder / name,
        rows=rows(STEPS * sequences_per_step(LENGTH, settings)),
        prepare=prepare,
        seed=5,
        settings=settings,
        scratch=folder / f"{name}-checkpoints",
        vocabulary=None if kept is None else folder / "rows.json",
        evaluate=evaluate,
    )
    return stored(folder / name), record


@pytest.mark.parametrize("kept", [None, USED], ids=["all", "corpus"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_killed_and_resumed_equals_uninterrupted_and_the_rest_stays(tmp_path, case, kept):
    whole, _ = _train(case, tmp_path, "whole", kept=kept)

    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedBySignalError):
        _train(case, tmp_path, "stopped", kept=kept, before_step=stop)
    assert not (tmp_path / "stopped").exists()
    resumed, _ = _train(case, tmp_path, "stopped", kept=kept)
    base = stored(tmp_path / "base-False")
    may_change = case.may_change(case.start(vocab=WHOLE))
    assert whole.keys() == resumed.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.equal(whole[name], resumed[name]), f"{name}: killed and resumed it is another"
        assert whole[name].shape == tensor.shape
        if name not in may_change:
            assert torch.equal(whole[name], tensor), f"{name}: does not train"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        left_out = sorted(set(range(WHOLE)) - set(kept or range(WHOLE)))
        assert torch.equal(whole[name][left_out], base[name][left_out]), f"{name}: rows that are left out"
        if name in may_change and case.method.needs_new_rows:
            assert torch.equal(whole[name][:FIRST_NEW_ROW], base[name][:FIRST_NEW_ROW])
            assert not torch.equal(whole[name][FIRST_NEW_ROW:], base[name][FIRST_NEW_ROW:])
    if case.method.name != "lisa" and not case.stochastic:
        assert {name for name in base if not torch.equal(base[name], whole[name])} == may_change


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("elo", "full", "frozen-half", "lora", "lisa-window")], ids=case_id
)
def test_deep_supervision_learns_at_the_internal_layer_and_resumes(tmp_path, case):
    settings = QUICK.model_copy(update={"deep_supervision": supervision([0])})
    plain, without = _train(case, tmp_path, "plain")
    whole, record = _train(case, tmp_path, "whole", settings=settings)
    assert all(point.keys() == {"tokens", "seconds", "loss", "internal"} for point in record["losses"])
    assert "internal" not in without["losses"][0]
    first, last = (record["losses"][at] for at in (0, -1))
    assert first["loss"] == without["losses"][0]["loss"], "the logged loss is the main one"
    assert first["internal"]["0"] > last["internal"]["0"]
    assert any(not torch.equal(plain[name], tensor) for name, tensor in whole.items())

    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedBySignalError):
        _train(case, tmp_path, "stopped", settings=settings, before_step=stop)
    resumed, again = _train(case, tmp_path, "stopped", settings=settings)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert [point["internal"] for point in again["losses"]] == [point["internal"] for point in record["losses"]]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head_loss", ["chunked", "plain", "model"])
def test_with_every_row_kept_a_cut_changes_nothing(tmp_path, tie, head_loss):
    case = next(case for case in CASES if case.name == "full")
    settings = QUICK.model_copy(update={"head_loss": head_loss})
    expected, plain = _train(case, tmp_path, "all", tie=tie, settings=settings)
    found, cut = _train(case, tmp_path, "cut", kept=list(range(WHOLE)), tie=tie, settings=settings)
    assert [point["loss"] for point in cut["losses"]] == pytest.approx([p["loss"] for p in plain["losses"]], abs=1e-6)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    assert ("lm_head.weight" in found) == (not tie)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_training_on_some_rows_is_training_a_model_that_has_no_others(tmp_path, tie):
    """The same as a model whose embedding and head were cut by hand: the softmax is over the kept rows."""
    case = next(case for case in CASES if case.name == "full")
    _, record = _train(case, tmp_path, "cut", kept=list(range(VOCAB)), tie=tie)
    model = case.start(tie=tie, vocab=WHOLE)
    model.resize_token_embeddings(VOCAB)
    model.config.tie_word_embeddings = tie
    model.save_pretrained(tmp_path / "small" / f"base-{tie}")
    _, expected = _train(case, tmp_path / "small", "all", tie=tie)
    assert [p["loss"] for p in record["losses"]] == pytest.approx([p["loss"] for p in expected["losses"]], abs=1e-5)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["full", "elo", "lora-with ends"])
def test_what_is_measured_during_training_is_measured_on_all_rows(tmp_path, tie, name):
    case = next(case for case in CASES if case.name == name)
    seen = []

    def evaluate(model):
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert len(embedding) == len(head) == WHOLE
        assert (embedding is head) == tie
        bpb = bits_per_byte(model, corpus(9, 10), sequence_length=LENGTH).bits_per_byte
        seen.append((bpb, embedding.detach().cpu().clone()))
        return {"bpb": {"xx": bpb}}

    settings = QUICK.model_copy(update={"evaluations": 5})
    final, record = _train(case, tmp_path, "cut", kept=USED, tie=tie, settings=settings, evaluate=evaluate)
    assert [point["bpb"]["xx"] for point in record["evaluations"]] == [bpb for bpb, _ in seen]
    assert len(seen) == STEPS
    assert not torch.equal(seen[0][1], seen[-1][1]), "with the values that training has given the rows by then"
    assert torch.equal(seen[-1][1], final["model.embed_tokens.weight"])
    undisturbed, _ = _train(case, tmp_path, "quiet", kept=USED, tie=tie)
    for key, tensor in undisturbed.items():
        assert torch.equal(tensor, final[key]), f"{key}: to measure changes nothing"


def test_a_cut_model_computes_with_the_rows_that_are_kept(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(USED))
    model = tiny_llama(vocab=WHOLE).eval()
    model.get_input_embeddings().padding_idx = 70
    ids = torch.tensor([[3, 70, 5]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cut = VocabularyCut(model, tmp_path / "rows.json")
        assert model.get_input_embeddings().padding_idx == VOCAB
        logits = model(input_ids=cut.renumber(ids), use_cache=False).logits
        torch.testing.assert_close(logits, whole[..., USED])
        cut.restore()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)
    assert model.get_input_embeddings().padding_idx == 70
    assert cut.first_row(VOCAB) == VOCAB and cut.first_row(75) == VOCAB + 2
    labels = torch.tensor([3, -100, 71])
    assert cut.renumber(labels).tolist() == [3, -100, VOCAB + 1]
    with pytest.raises(EloError, match="tokens that were not counted"):
        cut.renumber(torch.tensor([80]))
    sequences = CutSequences([{"input_ids": ids[0].numpy(), "shift_labels": labels.numpy(), "position_ids": 1}], cut)
    assert sequences[0]["input_ids"].tolist() == [3, VOCAB, 5]
    assert len(sequences) == sequences[0]["position_ids"] == 1


def test_rows_of_a_checkpoint_with_code_of_its_own_are_those_of_the_training_text(tmp_path):
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass Own(PreTrainedConfig):\n    model_type = 'own_rows'\n"
    )
    described = {
        "model_type": "own_rows",
        "auto_map": {"AutoConfig": "own.Own"},
        "vocab_size": 420,
        "pad_token_id": 410,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    text = str(write_jsonl(tmp_path / "xx.jsonl", make_texts(20)))
    data = prepare(make_tokenizer(), {"xx": text}, tmp_path / "data", progress=False)
    (trained,) = data.train("xx")
    used = {int(token) for index in range(trained.num_documents) for token in trained.document(index)} | {0, 1, 410}
    assert 3 < len(used) < 300
    rows = choose_rows(data, tmp_path, sample=0, seed=1, trust_remote_code=True).tolist()
    assert rows == sorted(used)
    more = choose_rows(data, tmp_path, sample=4, seed=1, trust_remote_code=True).tolist()
    assert len(more) == len(rows) + 4 and set(more) > used


@pytest.mark.parametrize("kept", [[], [0, WHOLE]])
def test_rows_that_the_model_does_not_have(tmp_path, kept):
    (tmp_path / "rows.json").write_text(json.dumps(kept))
    with pytest.raises(EloError, match=r"rows\.json: lists no rows, or rows beyond"):
        VocabularyCut(tiny_llama(vocab=WHOLE), tmp_path / "rows.json")
