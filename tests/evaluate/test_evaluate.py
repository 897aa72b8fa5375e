import json
import math

import numpy as np
import pytest
import torch
from evaluation_fixtures import TEXTS, memory_corpus, text_tokenizer, tiny_model, tiny_tokenizer

from elo.errors import EloError
from elo.evaluate.base import mean_error, ratio_error
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.evaluate.evaluate import evaluate
from elo.report.collect import measured

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
    nats, sizes = results["documents_nats"]["en"], results["documents_bytes"]["en"]
    assert results["corpora"]["en"]["standard_error"] * math.log(2) == pytest.approx(ratio_error(nats, sizes))
    assert results["cloze"]["en"]["items"] == 1
    assert results["cloze"]["en"]["chance"] == pytest.approx(1 / 3)
    assert [sample["prompt"] for sample in results["samples"]] == ["산 너머"]
    assert json.loads(output.read_text()) == results
    shown = capsys.readouterr().out
    assert f"{results['bpb']['en']:.4f}" in shown
    assert "33.3%" in shown


def test_the_standard_error_of_a_ratio_is_that_of_resampled_documents():
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 3000, 60)
    nats = sizes * generator.normal(1.0, 0.1, 60) + generator.normal(0, 20, 60)
    drawn = generator.integers(0, 60, (4000, 60))
    resampled = (nats[drawn].sum(1) / sizes[drawn].sum(1)).std()
    assert ratio_error(nats.tolist(), sizes.tolist()) == pytest.approx(resampled, rel=0.06)
    assert ratio_error([1.0, 2.0, 6.0], [2, 2, 2]) == pytest.approx(mean_error([0.5, 1.0, 3.0]))
    assert ratio_error([1.0], [2]) is None


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
    carried = [(each.language, each.name, each.items) for each in measured(results).measures]
    assert carried == [("en", "all", 3), ("en", "river", 2), ("ko", "all", 1)]


def test_model_and_tokenizer_in_memory(corpus):
    model = tiny_model("gpt2", len(TOKENIZER))
    by_file = evaluate(model, TOKENIZER, corpora={"en": corpus}, progress=False)
    assert by_file["sequence_length"] == 48, "no longer than the model's positions"
    by_shards = evaluate(model, corpora={"en": memory_corpus(TEXTS, TOKENIZER)}, progress=False)
    by_wrapped = evaluate(model, text_tokenizer(), corpora={"en": corpus}, progress=False)
    assert by_file["bpb"] == by_shards["bpb"] == by_wrapped["bpb"]


def test_a_long_document_does_not_end_the_sample(checkpoint, tmp_path, capsys):
    """Two documents too long for the sample, before many short ones: every one of them counts with its first bytes."""
    long = "산 너머 마을에는 우물이 하나 있고 그 물은 달다. " * 200
    texts = [TEXTS[0], long, long, *(f"{number}. {TEXTS[4]}" for number in range(37))]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    results = evaluate(checkpoint, corpora={"ko": path}, max_bytes=6000)
    sizes = results["documents_bytes"]["ko"]
    assert results["heldout"]["ko"] == {
        "documents": 40, "tokens": results["corpora"]["ko"]["text_tokens"], "bytes": sum(sizes)
    }  # fmt: skip
    short = sum(len(text.encode()) for text in texts if text is not long)
    room = (6000 - short) // 2
    assert sizes[:3] == [len(TEXTS[0].encode()), *[len(long.encode()[:room].decode(errors="ignore").encode())] * 2]
    assert room - 3 < sizes[1] <= room
    assert sum(results["documents_nats"]["ko"]) == results["corpora"]["ko"]["nats"]
    assert "warning" not in capsys.readouterr().out


def test_few_documents_are_warned_of(checkpoint, corpus, tmp_path, capsys):
    results = evaluate(checkpoint, corpora={"en": corpus})
    (line,) = results["warnings"]
    assert line.startswith("en: measured on 6 held-out documents")
    assert f"warning: {line}" in capsys.readouterr().out.replace("\n", " ")


def test_a_broken_line_is_found_wherever_the_sample_ends(checkpoint, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{json.dumps({'text': TEXTS[0]})}\n" * 600 + "not json\n")
    with pytest.raises(EloError, match=r"broken\.jsonl:601"):
        evaluate(checkpoint, corpora={"en": path}, max_bytes=1000, progress=False)


def test_token_ids_without_text_are_not_cut(checkpoint):
    with pytest.raises(EloError, match="has token ids but no text"):
        evaluate(checkpoint, corpora={"en": memory_corpus(TEXTS * 40, TOKENIZER)}, max_bytes=1000, progress=False)


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
    assert "has no tokenizer" in told(tmp_path / "empty", corpora={"en": corpus})
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
