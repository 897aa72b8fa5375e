"""Generation with early exit against generation and logits of transformers."""

import json

import pytest
import torch
from run_fixtures import TARGET, write_base, write_documents
from test_cli import _elo
from training_fixtures import tiny_llama
from transformers import GenerationConfig
from zoo import FAMILIES, tiny_config, tiny_model

from elo.evaluate.evaluate import evaluate
from elo.generate import EarlyExit
from elo.surgery.in_memory import detach_layers

PROMPT = [3, 14, 15, 9, 2, 6, 5]
LENGTH = 12
NO_TOKEN = -1


def _model(family):
    model_type, particular = FAMILIES[family]
    model = tiny_model(tiny_config(model_type, **{**particular, "tie_word_embeddings": False})).eval()
    with torch.no_grad():  # probabilities that differ between positions
        model.get_output_embeddings().weight.mul_(20)
    return model


def _by_transformers(model, prompt=PROMPT):
    """Tokens that transformers writes greedily."""
    greedy = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([prompt])
    written = model.generate(ids, generation_config=greedy, attention_mask=torch.ones_like(ids))
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama-untied", "gemma3", "gpt2", "cohere2", "deepseek_v3"])
def test_without_an_early_exit_the_text_is_that_of_transformers(family):
    model = _model(family)
    expected = _by_transformers(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    whole = EarlyExit(model, [3]).write(PROMPT, LENGTH, NO_TOKEN)
    assert whole.tokens == expected
    assert whole.exits == [3] * LENGTH
    cut = EarlyExit(model, [0, 1, 3], confidence=1.0).write(PROMPT, LENGTH, NO_TOKEN)
    assert (cut.tokens, cut.exits) == (expected, whole.exits)
    assert cut.layers_run == whole.layers_run == 4 * (len(PROMPT) + LENGTH - 1)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("family", ["llama-untied", "gemma3", "gpt2"])
def test_an_exit_layer_writes_as_the_model_of_the_layers_up_to_it(family):
    model = _model(family)
    early = EarlyExit(model, [1])
    written = early.write(PROMPT, LENGTH, NO_TOKEN)
    assert written.tokens == _by_transformers(detach_layers(model, [0, 1]))
    assert written.layers_run == 2 * (len(PROMPT) + LENGTH - 1)
    assert early.segments[0].get_input_embeddings() is model.get_input_embeddings(), "no second copy in memory"


@pytest.mark.parametrize("family", ["llama-untied", "gemma3"])
def test_each_token_exits_at_the_first_confident_layer_with_the_cache_of_the_whole_model(family):
    """Against the definition: hidden states of the whole model on the whole text, through its norm and head."""
    model = _model(family)
    norm, head = model.model.norm, model.get_output_embeddings()

    def first_confident(ids, confidence):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            for layer in (0, 1, 3):
                logits = states.logits if layer == 3 else head(norm(states.hidden_states[layer + 1]))
                probabilities = logits[0, -1].softmax(-1)
                if probabilities.max() > confidence or layer == 3:
                    return layer, int(probabilities.argmax())

    exits = set()
    ids = torch.arange(1, 60).unsqueeze(0)
    at_first = EarlyExit(model, [0]).forward(input_ids=ids, use_cache=False).logits.softmax(-1).amax(-1)
    for confidence in at_first.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8, 0.95])).tolist():
        early = EarlyExit(model, [0, 1, 3], confidence)
        written = early.write(PROMPT, LENGTH, NO_TOKEN)
        text = list(PROMPT)
        for layer, token in zip(written.exits, written.tokens, strict=True):
            assert first_confident(text, confidence) == (layer, token)
            text.append(token)
        together = early.forward(input_ids=torch.tensor([text[:-1]]), use_cache=False).logits[0, len(PROMPT) - 1 :]
        assert together.argmax(-1).tolist() == written.tokens
        exits |= set(written.exits)
        assert written.layers_run < 4 * (len(PROMPT) + LENGTH - 1) or written.exits[-1] == 3
    assert len(exits) > 1


def test_generation_ends_at_the_end_of_text():
    early = EarlyExit(tiny_llama(), [3])
    tokens = early.write(PROMPT, LENGTH, NO_TOKEN).tokens
    assert early.write(PROMPT, LENGTH, tokens[0]).tokens == tokens[:1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    write_base(root / "base")
    write_documents(root / "xx.jsonl", TARGET, 12, 1)
    return root


def test_the_command_reports_speed_and_quality_by_exit_layer(world, capsys, tmp_path):
    arguments = ["--prompt", "one", "--exit-layer", "1", "--confidence", "0.05", "--max-new-tokens", "5"]
    corpus = ["--corpus", f"xx={world / 'xx.jsonl'}"]
    status, out, err = _elo(capsys, "generate", world / "base", *arguments, *corpus, "-o", tmp_path / "exits.json")
    assert status == 0, err
    found = json.loads((tmp_path / "exits.json").read_text())
    assert [each["exit"] for each in found["exits"]] == ["layer 1", "layer 3", "confidence > 0.05"]
    first, last, confident = found["exits"]
    assert (first["layers_per_position"], last["layers_per_position"]) == (2.0, 4.0)
    assert 2 <= confident["layers_per_position"] <= 4
    assert first["tokens_by_layer"].keys() == {"1"}
    assert all(each["tokens_per_second"] > 0 and each["texts"][0]["prompt"] == "one" for each in found["exits"])
    whole = evaluate(world / "base", corpora={"xx": world / "xx.jsonl"}, progress=False)["bpb"]
    assert last["bpb"] == whole
    assert first["bpb"]["xx"] != whole["xx"]
    assert f"{whole['xx']:.4f}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--prompt", "a", "--confidence", "1.5"], "is not a probability"),
        (["--prompt", "a", "--exit-layer", "4"], "layers 0 to 3"),
        (["--prompt", "a", "--max-new-tokens", "100000"], "max_new_tokens: got 100000"),
    ],
)
def test_mistakes_get_one_message(world, capsys, arguments, message):
    status, _, err = _elo(capsys, "generate", world / "base", *arguments)
    assert status == 2
    assert message in err and err.count("\n") == 1
