import json
import math

import pytest
import torch
from evaluation_fixtures import TEXTS, memory_corpus, text_tokenizer, tiny_model, tiny_tokenizer

from elo.errors import EloError
from elo.evaluation.bits_per_byte import bits_per_byte
from elo.recipes.evaluate import evaluate
from elo.recipes.results import _evaluation
from elo.reporting.results import Measurement

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def cloze(tmp_path):
    path = tmp_path / "cloze.jsonl"
    path.write_text(json.dumps({"prompt": "The river", "choices": [" runs", " a", "s"], "answer": 0}) + "\n")
    return path


def test_everything_of_a_checkpoint(checkpoint, corpus, cloze, tmp_path, capsys):
    output = tmp_path / "deep" / "evaluation.json"
    results = evaluate(
        checkpoint,
        corpora={"en": corpus},
        cloze={"en": cloze},
        prompts={"ko": ["산 너머"]},
        sequence_length=32,
        max_new_tokens=5,
        output=output,
    )
    model = tiny_model("llama", len(TOKENIZER))
    expected = bits_per_byte(model, memory_corpus(TEXTS, TOKENIZER), sequence_length=32)
    assert results["bpb"]["en"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert results["corpora"]["en"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert results["cloze"]["en"]["items"] == 1
    assert results["cloze"]["en"]["chance"] == pytest.approx(1 / 3)
    assert [sample["prompt"] for sample in results["samples"]] == ["산 너머"]
    assert json.loads(output.read_text()) == results
    shown = capsys.readouterr().out
    assert f"{results['bpb']['en']:.4f}" in shown
    assert "33.3%" in shown


def test_cloze_accuracy_by_group(checkpoint, tmp_path):
    item = {"prompt": "The river", "choices": [" runs", " a"]}
    # The same question with either answer: exactly one is right.
    items = [{**item, "answer": answer, "group": "river"} for answer in (0, 1)] + [{**item, "answer": 0}]
    path, plain = tmp_path / "cloze.jsonl", tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in items))
    plain.write_text(json.dumps(items[2]) + "\n")
    output = tmp_path / "evaluation.json"
    results = evaluate(checkpoint, cloze={"en": path, "ko": plain}, output=output, progress=False)
    assert results["cloze"]["en"]["groups"] == {"river": {"accuracy": 0.5, "items": 2}}
    assert results["cloze"]["en"]["items"] == 3
    assert results["cloze"]["ko"]["groups"] == {}
    assert json.loads(output.read_text())["cloze"] == results["cloze"]
    carried = Measurement.model_validate(_evaluation(results))
    assert carried.cloze["en"].groups["river"].items == 2
    assert carried.cloze["ko"].groups == {}


def test_model_and_tokenizer_in_memory(corpus):
    model = tiny_model("gpt2", len(TOKENIZER))
    by_file = evaluate(model, TOKENIZER, corpora={"en": corpus}, progress=False)
    assert by_file["sequence_length"] == 48, "no longer than the model's positions"
    by_shards = evaluate(model, corpora={"en": memory_corpus(TEXTS, TOKENIZER)}, progress=False)
    by_wrapped = evaluate(model, text_tokenizer(), corpora={"en": corpus}, progress=False)
    assert by_file["bpb"] == by_shards["bpb"] == by_wrapped["bpb"]


def test_max_tokens_reads_no_further_than_needed(checkpoint, tmp_path):
    path = tmp_path / "long.jsonl"
    lines = [json.dumps({"text": TEXTS[0]})] * 600
    path.write_text("\n".join(lines) + "\nnot json\n")
    tokens = len(TOKENIZER(TEXTS[0], add_special_tokens=False)["input_ids"])
    results = evaluate(checkpoint, corpora={"en": path}, max_tokens=10 * tokens + 1, progress=False)
    assert results["corpora"]["en"]["documents"] == 10
    with pytest.raises(EloError, match=r"long\.jsonl:601"):
        evaluate(checkpoint, corpora={"en": path}, progress=False)


def test_half_precision_checkpoint_runs_in_fp32_on_a_cpu(tmp_path, corpus):
    tiny_model("llama", len(TOKENIZER)).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    TOKENIZER.save_pretrained(tmp_path / "half")
    results = evaluate(tmp_path / "half", corpora={"en": corpus}, device="cpu", progress=False)
    assert results["model"]["dtype"] == "float32"


def test_mistakes_are_told(checkpoint, corpus, tmp_path):
    def told(*args, **kwargs):
        with pytest.raises(EloError) as caught:
            evaluate(*args, **{"progress": False, **kwargs})
        return str(caught.value)

    assert "no such folder" in told(tmp_path / "none", corpora={"en": corpus})
    (tmp_path / "empty").mkdir()
    assert "no tokenizer there" in told(tmp_path / "empty", corpora={"en": corpus})
    assert "no config.json" in told(tmp_path / "empty", TOKENIZER, corpora={"en": corpus})
    assert "no such file" in told(checkpoint, corpora={"en": tmp_path / "none.jsonl"})
    assert "is a folder; name the file" in told(checkpoint, corpora={"en": corpus}, output=tmp_path)
    small = tmp_path / "small"
    tiny_model("llama", 300).save_pretrained(small)
    TOKENIZER.save_pretrained(small)
    assert "has 300 embedding rows" in told(small, corpora={"en": corpus})
    assert "sequence_length: got 99999" in told(checkpoint, corpora={"en": corpus}, sequence_length=99999)


def test_pickled_and_incomplete_weights_are_refused(checkpoint, corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((checkpoint / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(EloError, match=r"weights are pickled"):
        evaluate(pickled, TOKENIZER, corpora={"en": corpus}, progress=False)
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EloError, match=r"1 tensors are missing \(first model\.layers\.1\.mlp\.up_proj\.weight\)"):
        evaluate(partial, TOKENIZER, corpora={"en": corpus}, progress=False)
    (partial / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(EloError, match="header is damaged"):
        evaluate(partial, TOKENIZER, corpora={"en": corpus}, progress=False)


def test_nothing_is_written_when_logits_are_not_finite(checkpoint, corpus, tmp_path):
    model = tiny_model("llama", len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(EloError, match="not finite"):
        evaluate(model, TOKENIZER, corpora={"en": corpus}, output=tmp_path / "out.json", progress=False)
    assert not (tmp_path / "out.json").exists()
