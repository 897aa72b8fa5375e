"""Detaching from and attaching to checkpoints on disk: what is written, what is kept, what is put back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from surgery_fixtures import assert_same, edit_config, llama, store, stored
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Mamba2Config, Qwen3MoeConfig
from vocabulary_fixtures import tokenizer_of
from zoo import logits_of, tiny_config, tiny_model

from elo.api import attach, chat_vector, detach
from elo.checkpoint.shared_files import copy_shared
from elo.checkpoint.tensor_files import open_checkpoint
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sharded, untied Llama of four layers with small files beside it."""
    folder = tmp_path / "base"
    llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("licence")
    (folder / "consolidated.safetensors").write_bytes(b"not one of the index")
    return folder


def test_detached_checkpoint_is_an_ordinary_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elo.checkpoint.tensor_files.MAX_SHARD_BYTES", 20_000)
    record = detach_checkpoint(base, "first:1,last:1", tmp_path / "detached")
    config = json.loads((tmp_path / "detached" / "config.json").read_text())
    original = json.loads((base / "config.json").read_text())
    assert config.pop("elo_detached") == record
    assert config.pop("num_hidden_layers") == 2
    assert {key: value for key, value in original.items() if key != "num_hidden_layers"} == config
    assert record["layers"] == [0, 3]
    assert record["num_base_layers"] == 4
    assert record["base"] == str(base)
    assert set(record["frozen"]) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert (tmp_path / "detached" / "model.safetensors.index.json").exists()
    names = {path.name for path in (tmp_path / "detached").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "LICENSE"} <= names
    assert "consolidated.safetensors" not in names

    whole, small = stored_without_consolidated(base), stored(tmp_path / "detached")
    for name, tensor in small.items():
        assert torch.equal(tensor, whole[name.replace("layers.1.", "layers.3.")]), name


def test_a_tensor_is_read_in_pieces_that_every_system_accepts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses to read 2 GiB at once."""
    tensor = open_checkpoint(base).tensors["lm_head.weight"]
    whole, pread, sizes = tensor.read(), os.pread, []

    def read(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr("elo.checkpoint.tensor_files.READ_BYTES", 1000)
    monkeypatch.setattr(os, "pread", read)
    assert tensor.read() == whole and len(whole) > 1000
    assert max(sizes) == 1000


def stored_without_consolidated(folder: Path) -> dict[str, torch.Tensor]:
    (folder / "consolidated.safetensors").unlink(missing_ok=True)
    return stored(folder)


def test_attach_rewrites_only_the_files_of_attached_layers(base: Path, tmp_path: Path) -> None:
    detach_checkpoint(base, (0, -1), tmp_path / "detached")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached")
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.add_(1)
    trained.save_pretrained(tmp_path / "trained")
    result = attach_checkpoint(tmp_path / "trained", base, tmp_path / "attached")
    assert result["layers"] == [0, 3]
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    changed = weight_map["model.layers.3.mlp.up_proj.weight"]
    for name in {*weight_map.values(), "config.json", "tokenizer.json", "model.safetensors.index.json"}:
        same = (tmp_path / "attached" / name).read_bytes() == (base / name).read_bytes()
        assert same == (name != changed), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_saved_in_another_dtype_attaches(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(tied=True).to(torch.bfloat16)
    if dtype == torch.float16:  # values that both can hold
        model = model.to(torch.float16).to(torch.bfloat16).to(torch.float16).to(torch.float32)
        model = model.to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 64).round() / 64)
    model.save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached", dtype=dtype)
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.fill_(0.5)
    trained.save_pretrained(tmp_path / "trained", max_shard_size="8KB")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached")
    expected = stored(tmp_path / "base")
    expected["model.layers.0.mlp.up_proj.weight"].fill_(0.5)
    assert_same(stored(tmp_path / "attached"), expected)


def test_an_untouched_half_precision_copy_of_a_float32_base_attaches(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    AutoModelForCausalLM.from_pretrained(tmp_path / "detached", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    attach_checkpoint(tmp_path / "half", tmp_path / "base", tmp_path / "attached")
    whole, attached = stored(tmp_path / "base"), stored(tmp_path / "attached")
    assert torch.equal(attached["lm_head.weight"], whole["lm_head.weight"])
    rounded = whole["model.layers.3.mlp.up_proj.weight"].bfloat16().float()
    assert torch.equal(attached["model.layers.3.mlp.up_proj.weight"], rounded)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5])
def test_scale(scale: float, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached")
    with torch.no_grad():
        for parameter in trained.model.layers.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "trained")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached", scale=scale)
    attached, whole, small = (stored(tmp_path / name) for name in ("attached", "base", "trained"))
    name = "model.layers.3.self_attn.q_proj.weight"
    theta, theta0 = small["model.layers.1.self_attn.q_proj.weight"], whole[name]
    torch.testing.assert_close(attached[name], theta0 + scale * (theta - theta0))
    if scale in (0.0, 1.0):
        assert torch.equal(attached[name], theta if scale else theta0)
    attach_layers(model, trained, scale=scale)
    assert_same(model.state_dict(), attached)


@pytest.mark.parametrize("tied", [False, True])
def test_include_puts_back_embedding_norm_and_head(tied: bool, tmp_path: Path) -> None:
    model = llama(tied=tied)
    model.save_pretrained(tmp_path / "base")
    if tied:  # as some tools store it, both names
        store(tmp_path / "base", {**stored(tmp_path / "base"), "lm_head.weight": model.lm_head.weight.detach().clone()})
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    trained.save_pretrained(tmp_path / "trained")
    groups = ["embedding", "norm", "head"]
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached", include=groups)
    attached, whole = stored(tmp_path / "attached"), stored(tmp_path / "base")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(attached[name], whole[name] + 1)
    attach_layers(model, trained, include=groups)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, attached[name]), name


def test_names_on_disk_may_differ_from_module_names(tmp_path: Path) -> None:
    """Hub-era GPT-2: no `transformer.` in front, and causal-mask buffers that are no longer used."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "base")
    old = {name.removeprefix("transformer."): tensor for name, tensor in stored(tmp_path / "base").items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(4)}
    store(tmp_path / "base", old)

    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    assert "h.1.mlp.c_fc.weight" in stored(tmp_path / "detached")
    trained = GPT2LMHeadModel.from_pretrained(tmp_path / "detached")
    with torch.no_grad():
        trained.transformer.h[1].mlp.c_fc.weight.add_(1)
    trained.save_pretrained(tmp_path / "trained")
    assert "transformer.h.1.mlp.c_fc.weight" in stored(tmp_path / "trained")
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached")
    old["h.3.mlp.c_fc.weight"] = old["h.3.mlp.c_fc.weight"] + 1
    assert_same(stored(tmp_path / "attached"), old)


@pytest.mark.parametrize("fused_on_disk", [False, True])
def test_experts_fused_and_not(fused_on_disk: bool, tmp_path: Path) -> None:
    """The base stores experts in one form, the trained checkpoint comes back in the other."""
    config = tiny_config("qwen3_moe")
    assert isinstance(config, Qwen3MoeConfig)
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "base", save_original_format=not fused_on_disk)
    assert any("gate_up_proj" in name for name in stored(tmp_path / "base")) == fused_on_disk
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "detached")
    with torch.no_grad():
        for parameter in trained.model.layers.parameters():
            parameter.add_(0.5)
    trained.save_pretrained(tmp_path / "trained", save_original_format=fused_on_disk)
    if fused_on_disk:  # transformers would write what it has read: make the other form by a model built anew
        other = AutoModelForCausalLM.from_config(trained.config)
        other.load_state_dict(trained.state_dict())
        other.save_pretrained(tmp_path / "trained")
    assert any("gate_up_proj" in name for name in stored(tmp_path / "trained")) != fused_on_disk
    attach_checkpoint(tmp_path / "trained", tmp_path / "base", tmp_path / "attached")
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    attach_layers(model, trained)
    assert_same(attached.state_dict(), model.state_dict())
    assert stored(tmp_path / "attached").keys() == stored(tmp_path / "base").keys()


def test_extras_stay_behind_and_are_kept(tmp_path: Path) -> None:
    """Multi-token-prediction layers count on from the last layer; a loader ignores them."""
    tiny_model(tiny_config("deepseek_v3", num_key_value_heads=4)).save_pretrained(tmp_path / "base")
    tensors = stored(tmp_path / "base")
    extras = {"model.layers.4.eh_proj.weight": torch.ones(2, 2), "mtp.head.weight": torch.ones(3)}
    store(tmp_path / "base", {**tensors, **extras})
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    assert not any("eh_proj" in name or "mtp" in name for name in stored(tmp_path / "detached"))
    attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "attached")
    assert_same(stored(tmp_path / "attached"), {**tensors, **extras})


def test_nested_configuration_and_a_vision_tower_of_as_many_layers(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = tiny_config("gemma3_text", layer_types=["sliding_attention", *["full_attention"] * 3]).to_dict()
    config = tiny_config("gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    tiny_model(config).save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    written = json.loads((tmp_path / "detached" / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 2
    assert written["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]
    assert written["vision_config"]["num_hidden_layers"] == 4
    attach_checkpoint(tmp_path / "detached", tmp_path / "base", tmp_path / "attached")
    assert_same(stored(tmp_path / "attached"), stored(tmp_path / "base"))


def test_infinities_in_the_configuration_stay_as_they_are(tmp_path: Path) -> None:
    config = tiny_config("mamba2", num_heads=8, state_size=8, n_groups=1)
    assert isinstance(config, Mamba2Config)
    tiny_model(config).save_pretrained(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", (0, -1), tmp_path / "detached")
    original, written = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("base", "detached"))
    assert written["time_step_limit"] == original["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_unknown_configuration_keys_are_kept(base: Path, tmp_path: Path) -> None:
    edit_config(base, something_of_ours={"layers": [1, 2, 3, 4]})
    detach_checkpoint(base, (0, -1), tmp_path / "detached")
    written = json.loads((tmp_path / "detached" / "config.json").read_text())
    assert written["something_of_ours"] == {"layers": [1, 2, 3, 4]}


def test_symlinked_files_are_read_as_in_the_hub_cache(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in base.iterdir():
        (cache / path.name).symlink_to(path)
    detach_checkpoint(cache, (0, -1), tmp_path / "detached")
    attach_checkpoint(tmp_path / "detached", cache, tmp_path / "attached")
    assert not any(path.is_symlink() for path in (tmp_path / "attached").iterdir())
    assert_same(stored(tmp_path / "attached"), stored_without_consolidated(base))


def test_a_model_detached_in_memory_attaches_on_disk(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    small = detach_layers(model, (1, 2))
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight.add_(1)
    small.save_pretrained(tmp_path / "small")
    attach_checkpoint(tmp_path / "small", base, tmp_path / "attached")
    attach_layers(model, small)
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "attached").eval()
    torch.testing.assert_close(logits_of(attached), logits_of(model.eval()), rtol=0, atol=0)


def test_overwrite_replaces_and_a_side_file_of_the_bridge_is_ignored(base: Path, tmp_path: Path) -> None:
    detach_checkpoint(base, (0, 1), tmp_path / "detached")
    detach_checkpoint(base, (0, -1), tmp_path / "detached", overwrite=True)
    (tmp_path / "detached" / "elo_bridge.safetensors").write_bytes(b"a later issue's")
    result = attach_checkpoint(tmp_path / "detached", base, tmp_path / "attached")
    assert result["layers"] == [0, 3]
    assert not (tmp_path / "attached" / "elo_bridge.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A base of 220 MB in one file, more than half of which is copied or changed: neither may be held."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 1000}
    script = (
        "import sys, resource, torch\n"
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        "from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint\n"
        "from elo.surgery.equivalence import build_hollow_causal_lm\n"
        "from elo.checkpoint.tensor_files import NewTensor, write_checkpoint\n"
        "folder = Path(sys.argv[1])\n"
        f"config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, dtype='float32', **{config!r})\n"
        "hollow = build_hollow_causal_lm(config)\n"
        "folder.mkdir()\n"
        "config.save_pretrained(folder)\n"
        "def zeros(size):\n"
        "    return lambda: (bytes(min(1 << 20, size - start)) for start in range(0, size, 1 << 20))\n"
        "new = [NewTensor(n, 'F32', tuple(t.shape), t.numel() * 4, zeros(t.numel() * 4))\n"
        "       for n, t in hollow.state_dict().items()]\n"
        "write_checkpoint(folder, new)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "detach_checkpoint(folder, '0', folder.parent / 'warm')\n"
        "before = peak()\n"
        "detach_checkpoint(folder, '0-4', folder.parent / 'detached')\n"
        "attach_checkpoint(folder.parent / 'detached', folder, folder.parent / 'attached', scale=0.5)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "base")], capture_output=True, text=True, check=True
    )
    size_mb = (tmp_path / "base" / "model.safetensors").stat().st_size / 2**20
    assert size_mb > 200
    assert float(done.stdout.split()[-1]) < 60


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_untouched_files_may_be_links_and_the_base_stays_as_it_is(tmp_path, scale):
    llama(6).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    before = stored(tmp_path / "base")
    detach_checkpoint(tmp_path / "base", [0, -1], tmp_path / "small")
    small = stored(tmp_path / "small")
    store(tmp_path / "small", {name: t + 1 if ".layers." in name else t for name, t in small.items()})
    arguments = {"scale": scale}
    plain = attach_checkpoint(tmp_path / "small", tmp_path / "base", tmp_path / "plain", **arguments)
    linked = attach_checkpoint(tmp_path / "small", tmp_path / "base", tmp_path / "linked", link=True, **arguments)
    assert_same(stored(tmp_path / "plain"), stored(tmp_path / "linked"))
    assert_same(before, stored(tmp_path / "base"))
    assert "linked" not in plain["files"]
    weights = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    shared = {name for name in weights if (tmp_path / "base" / name).samefile(tmp_path / "linked" / name)}
    changed = {
        name for name in weights if (tmp_path / "base" / name).read_bytes() != (tmp_path / "linked" / name).read_bytes()
    }
    assert len(shared) == linked["files"]["linked"] > 1
    assert shared | changed == set(weights)
    assert not shared & changed
    assert not any((tmp_path / "base" / name).samefile(tmp_path / "plain" / name) for name in weights)


def test_what_cannot_be_linked_is_copied(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"weights")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    assert copy_shared(tmp_path / "file", tmp_path / "copy", link=True) in ("cloned", "copied")
    assert (tmp_path / "copy").read_bytes() == b"weights"


def test_text_that_utf8_cannot_hold_stays_in_the_configuration(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    edit_config(tmp_path / "other", note="half a pair \ud800, 강물")
    detach_checkpoint(tmp_path / "other", [0, -1], tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["note"] == "half a pair \ud800, 강물"


def test_writing_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("elo.log.SECONDS_BETWEEN_LINES", -1.0)
    llama(vocab_size=401).save_pretrained(tmp_path / "base")
    tokenizer_of("qwen").save_pretrained(tmp_path / "base")
    capsys.readouterr()
    detach(tmp_path / "base", output=tmp_path / "detached")
    attach(tmp_path / "detached", tmp_path / "base", output=tmp_path / "attached")
    chat_vector(tmp_path / "attached", tmp_path / "base", tmp_path / "base", output=tmp_path / "sum")
    last = {line.split(":")[0]: line for line in capsys.readouterr().err.splitlines()}
    for label, folder in (("detach", "detached"), ("attach", "attached"), ("chat vector", "sum")):
        size = sum(each.numel() * each.element_size() for each in stored(tmp_path / folder).values())
        written = last[label].split(": ")[1].split(" of ")[0]
        assert float(written.split()[0]) == pytest.approx(size / 1000, rel=0.05), last[label]
