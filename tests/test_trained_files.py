"""What a trained stage writes: the base's files, bit for bit but for what trained, whatever the base looks like."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_fixtures import edit_config, stored
from training_fixtures import LENGTH, SETTINGS, rows
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import tiny_config, tiny_model

from elo.model.checkpoint import attach_checkpoint, detach_checkpoint
from elo.model.new_rows import VOCABULARY_KEY
from elo.recipes.train import train_checkpoint
from elo.training.bridge import fit_bridge
from elo.training.loop import rows_per_step
from elo.training.methods import METHODS, Method, Options, Setup, find_method
from elo.training.phases import Phase
from elo.training.settings import EloOptions, LisaSettings, LoraSettings

KEPT, NEW_ROW = (0, 3), 50
QUICK = SETTINGS.model_copy(update={"save_steps": 100, "evaluations": 1})
SIDE_FILES = ("LICENSE", "processor_config.json", "README.md", "additional_chat_templates/rag.jinja", "spiece.model")
_TEXT = {"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
_OPTIONS = {
    "lora": [Options(lora=LoraSettings(rank=2, also_train=("norm",)))],
    "lisa": [Options(lisa=LisaSettings(layers=1, period=9))],
    "elo": [
        Options(elo=EloOptions(stand_in="none", also_train=("norm",))),
        Options(elo=EloOptions(stand_in="bridge", embedding_rows="new")),
        Options(elo=EloOptions(stand_in="forward_only", alignment="forward_only")),
    ],
}
CASES = [
    (find_method(name, options), phase)
    for name in METHODS
    for options in _OPTIONS.get(name, [Options()])
    for phase in find_method(name, options).phases
]


def _model(kind: str) -> PreTrainedModel:
    """The embedding is `embed_tokens` or `wte` in all of them, the norm `norm` or `ln_f`."""
    if kind == "wrapper":  # Gemma 3 with a vision tower of as many layers
        text = tiny_config("gemma3_text", **_TEXT).to_dict()
        vision = {**_VISION, "image_size": 28, "patch_size": 14}
        return tiny_model(tiny_config("gemma3", text_config=text, vision_config=vision))
    particular = {"num_key_value_heads": 4} if kind == "deepseek_v3" else {}
    return tiny_model(tiny_config(kind.removesuffix("-tied"), tie_word_embeddings=kind.endswith("-tied"), **particular))


KINDS = ("llama", "wrapper", "mixtral", "gpt2-tied", "llama-tied", "qwen3_moe", "deepseek_v3")
"""mixtral, qwen3_moe and deepseek_v3 store each expert alone, where the model has them in one tensor."""


def write_random_base(folder: Path, kind: str, seed: int) -> Path:
    """A checkpoint of random dtypes, shards and extras, whose config.json says a dtype of its own or none."""
    draw = random.Random(seed)
    _model(kind).save_pretrained(folder, max_shard_size=draw.choice(["20KB", "10MB"]))
    for file in folder.glob("*.safetensors"):
        tensors = {
            name: tensor.to(draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64]))
            for name, tensor in load_file(file).items()
        }
        if file.name in ("model.safetensors", "model-00002-of-00002.safetensors"):
            tensors["mtp.fc.weight"] = torch.randn(3, 5).to(torch.bfloat16)
            tensors["v_head.counts"] = torch.arange(7)
        if kind == "gpt2-tied":  # as on the hub
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": found}))
    said = draw.choice([None, "float16", "bfloat16", "float32"])
    edit_config(folder, dtype=said, **{VOCABULARY_KEY: {"rows": {"start": NEW_ROW, "stop": 60}}})
    for name in SIDE_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    save_file({"draft.weight": torch.ones(2)}, folder / "draft.safetensors")
    return folder


def _part(name: str) -> str:
    """What a tensor in a file is of: a decoder layer by its number, embedding, head, norm, or something else."""
    if name.startswith(("vision", "multi_modal", "mtp", "v_head")):
        return "other"
    if layer := re.search(r"(?:\blayers|^h)\.(\d+)\.", name):
        return layer[1]
    stem = name.split(".")[-2]
    return {"embed_tokens": "embedding", "wte": "embedding", "lm_head": "head", "norm": "norm", "ln_f": "norm"}.get(
        stem, "other"
    )


def _trains(method: Method, phase: Phase, tied: bool) -> set[str]:
    every = {"0", "1", "2", "3", "embedding", "norm", "head", "other"}
    ours = {"0", "1"} if phase.detached else {str(layer) for layer in KEPT}
    if method.name == "embeddings_first" and phase.name == "embeddings":
        return {"embedding", "head"}
    if method.name == "lora":
        return every - {"embedding", "head"}
    if method.name == "frozen" or phase.middle != "computed":
        return ours | set(method.also_train)
    return every


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0].name}-{CASES[n][1].name}-{n}")
@pytest.mark.parametrize("turn", [0, 3])
def test_what_did_not_train_is_bit_identical(number: int, turn: int, tmp_path: Path) -> None:
    method, phase = CASES[number]
    kind = KINDS[(number + turn) % len(KINDS)]
    base = start = write_random_base(tmp_path / "base", kind, seed=100 * turn + number)
    bridge = None
    if phase.needs_bridge:
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        mixture = rows(20)
        bridge = fit_bridge(whole, KEPT, [mixture[index] for index in range(20)])
    if phase.detached:
        detach_checkpoint(base, KEPT, start := tmp_path / "detached")
    seen: dict[str, torch.Tensor] = {}

    def remember(model: PreTrainedModel) -> dict[str, float]:
        seen.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return {"xx": 1.0}

    train_checkpoint(
        start,
        tmp_path / "trained",
        rows=rows(3 * rows_per_step(LENGTH, QUICK)),
        method=method,
        phase=phase,
        setup=Setup(KEPT, bridge, seed=7),
        settings=QUICK,
        scratch=tmp_path / "scratch",
        evaluate=remember,
    )
    before, after = stored(start), stored(tmp_path / "trained")
    assert [(n, t.dtype, t.shape) for n, t in before.items()] == [(n, t.dtype, t.shape) for n, t in after.items()]
    changed = {name for name in before if not torch.equal(_bits(before[name]), _bits(after[name]))}
    trains = _trains(method, phase, kind.endswith("tied"))
    assert {_part(name) for name in changed} <= trains
    assert not any(name.startswith(("mtp", "v_head", "draft")) for name in changed)
    layers = {_part(name) for name in changed} & {"0", "1", "2", "3"}
    assert len(layers) == (1 if method.name == "lisa" else len(trains & {"0", "1", "2", "3"}))
    if method.needs_new_rows or phase.name == "embeddings":
        for name in changed:
            if _part(name) in ("embedding", "head"):
                assert torch.equal(_bits(before[name][:NEW_ROW]), _bits(after[name][:NEW_ROW]))
                assert not torch.equal(before[name][NEW_ROW:], after[name][NEW_ROW:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).state_dict()
    if method.name != "lora":  # whose adapters are merged later
        for name, tensor in seen.items():
            torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=2**-8, msg=name)
    paths = {str(path.relative_to(start)) for path in start.rglob("*")}
    assert paths == {str(path.relative_to(tmp_path / "trained")) for path in (tmp_path / "trained").rglob("*")}
    for name in (*SIDE_FILES, "config.json", "generation_config.json"):
        assert (tmp_path / "trained" / name).read_bytes() == (start / name).read_bytes()
    if phase.detached:  # and it fits the base again
        attach_checkpoint(tmp_path / "trained", base, tmp_path / "attached", include=method.also_train)
        whole, attached = stored(base), stored(tmp_path / "attached")
        for name in whole:
            same = torch.equal(_bits(whole[name]), _bits(attached[name]))
            assert same or _part(name) in {"0", "3", *method.also_train}, name
        assert {str(p.relative_to(base)) for p in base.rglob("*")} <= {
            str(p.relative_to(tmp_path / "attached")) for p in (tmp_path / "attached").rglob("*")
        }
