"""Every family of the zoo round-trips bit for bit and computes what its base computes, or is refused with a reason."""

from pathlib import Path

import pytest
import torch
from surgery_fixtures import assert_same, stored
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, REFUSALS, bypassing, logits_of, tiny_config, tiny_model

from elo.checkpoint.architecture import find_architecture, is_recurrent, layers_of
from elo.errors import UnsupportedArchitectureError
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint


@pytest.mark.parametrize("name", FAMILIES)
def test_detached_logits_are_the_bases_with_the_middle_bypassed(name: str, tmp_path: Path) -> None:
    model_type, particular = FAMILIES[name]
    tiny_model(tiny_config(model_type, **particular)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    in_memory = detach_layers(model, (0, -1)).eval()  # before any forward, which may rescale weights (RWKV)
    whole = logits_of(model)
    with bypassing(model, (0, 3)):
        bypassed = logits_of(model)
    assert torch.isfinite(whole).all()
    assert (whole - bypassed).abs().max() > 1e-3, "the bypassed layers do nothing, so this test would see nothing"

    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    detached, info = AutoModelForCausalLM.from_pretrained(tmp_path / "detached", output_loading_info=True)
    assert not any(info.values()), info
    tolerance = 1e-5 * max(1.0, float(bypassed.abs().max()))
    torch.testing.assert_close(logits_of(detached.eval()), bypassed, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits_of(in_memory), bypassed, rtol=0, atol=tolerance)

    attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "untouched")
    assert_same(stored(tmp_path / "untouched"), stored(tmp_path / "base"))
    assert (tmp_path / "untouched" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached").eval()
    with torch.no_grad():
        for parameter in layers_of(trained).parameters():
            parameter.add_(0.05)
    trained.save_pretrained(tmp_path / "trained")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached")
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "attached").eval()
    with bypassing(attached, (0, 3)):
        found = logits_of(attached)
    torch.testing.assert_close(found, logits_of(trained), rtol=0, atol=max(1e-5, tolerance))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma3", "mamba", "opt", "gpt_neo"])
def test_round_trip_in_memory(name: str) -> None:
    model_type, particular = FAMILIES[name]
    model = tiny_model(tiny_config(model_type, **particular))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    detached = detach_layers(model, (0, -1))
    attach_layers(model, detached)
    assert_same(model.state_dict(), before)

    with torch.no_grad():
        for parameter in layers_of(detached).parameters():
            parameter.add_(1)
    attach_layers(model, detached)
    prefix = find_architecture(model).layers_path
    for key, tensor in model.state_dict().items():
        changed = key.startswith((f"{prefix}.0.", f"{prefix}.3."))
        is_parameter = key in dict(model.named_parameters())
        assert torch.equal(tensor, before[key]) != (changed and is_parameter), key


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    model_type, particular, layers, words = REFUSALS[name]
    model = tiny_model(tiny_config(model_type, **particular))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedArchitectureError, match=words):
        detach_checkpoint(tmp_path / "base", layers, tmp_path / "detached")
    assert not (tmp_path / "detached").exists()
    with pytest.raises(UnsupportedArchitectureError, match=words):
        detach_layers(model, layers)


@pytest.mark.parametrize("name", ["diffllama", "beam", "gpt2-inverse"])
def test_first_layers_of_depth_dependent_families_keep_their_places(name: str, tmp_path: Path) -> None:
    model_type, particular, _, _ = REFUSALS[name]
    model = tiny_model(tiny_config(model_type, **particular))
    detached = detach_layers(model, "first:2").eval()
    with bypassing(model, (0, 1)):
        torch.testing.assert_close(logits_of(detached), logits_of(model), rtol=0, atol=1e-5)


RECURRENT = {"bamba", "falcon_h1", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h", "qwen3_next"}
RECURRENT |= {"recurrent_gemma", "rwkv", "xlstm"}


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_found(name: str) -> None:
    model_type, particular = FAMILIES[name]
    model = build_hollow_causal_lm(tiny_config(model_type, **particular))
    parts = find_architecture(model)
    assert parts.num_layers == len(layers_of(model)) == 4
    assert parts.tied == model.config.get_text_config().tie_word_embeddings
    assert is_recurrent(model) == (name in RECURRENT)
