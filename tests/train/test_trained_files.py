"""What a trained stage writes: the base's files, bit for bit but for what trained, whatever the base looks like."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_fixtures import edit_config, llama, store, stored
from training_fixtures import LENGTH, SETTINGS, rows
from transformers import AutoModelForCausalLM, Llama4Config, Llama4ForConditionalGeneration, PreTrainedModel
from zoo import tiny_config, tiny_model

from elo.checkpoint.folder import copy_side_files
from elo.checkpoint.naming import map_names
from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.errors import EloError, UnsupportedArchitectureError
from elo.evaluate.loading import load_model
from elo.methods.base import METHODS, Method, Phase, Setup
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint
from elo.surgery.scale_change import scale_change
from elo.train.arguments import sequences_per_step
from elo.train.bridge import fit_bridge
from elo.train.phase import save_checkpoint, train_checkpoint
from elo.train.trained_files import TrainedFiles

KEPT, NEW_ROW = (0, 3), 50
QUICK = SETTINGS.model_copy(update={"save_steps": 100, "evaluations": 1})
SIDE_FILES = ("LICENSE", "processor_config.json", "README.md", "additional_chat_templates/rag.jinja", "spiece.model")
_TEXT = {"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
VARIANTS = {
    "lora": [
        {"rank": 2, "also_train": ("norm",)},
        {"rank": 2, "also_train": ("embedding", "head"), "embedding_rows": "new"},
    ],
    "lisa": [{"layers": 1, "period": 9}],
    "elo": [
        {"middle": "removed", "also_train": ("norm",)},
        {"middle": "bridged", "embedding_rows": "new"},
        {"middle": "bridged", "alignment": "lora", "alignment_rank": 2},
        {"middle": "bridged", "alignment": "lora", "alignment_rank": 2, "embedding_rows": "new"},
    ],
    "frozen": [{"backward_share": 0.5}, {"module": "attention"}],
    "full": [{}, {"module": "mlp"}],
}
_OF_MODULE = {"attention": r"attn|attention", "mlp": r"mlp|experts|moe|gate|router|feed_forward"}
PHASES = [
    (method, phase)
    for name in METHODS
    for method in (METHODS[name](**settings) for settings in VARIANTS.get(name, [{}]))
    for phase in method.phases
]


def _model(kind: str) -> PreTrainedModel:
    """The embedding is `embed_tokens` or `wte` in all of them, the norm `norm` or `ln_f`."""
    if kind == "wrapper":  # Gemma 3 with a vision tower of as many layers
        text = tiny_config("gemma3_text", **_TEXT).to_dict()
        vision = {**_VISION, "image_size": 28, "patch_size": 14}
        return tiny_model(tiny_config("gemma3", text_config=text, vision_config=vision))
    if kind == "another wrapper":  # Llama 4 with a vision tower, of which AutoModelForCausalLM loads the decoder alone
        vision = {**_VISION, "vision_output_dim": 16, "image_size": 28, "patch_size": 14}
        config = Llama4Config(text_config=tiny_config("llama4_text").to_dict(), vision_config=vision)
        torch.manual_seed(0)
        return Llama4ForConditionalGeneration(config)
    particular = {"num_key_value_heads": 4} if kind == "deepseek_v3" else {}
    return tiny_model(tiny_config(kind.removesuffix("-tied"), tie_word_embeddings=kind.endswith("-tied"), **particular))


KINDS = (
    "llama", "wrapper", "mixtral", "gpt2-tied", "llama-tied", "another wrapper", "qwen3_moe", "deepseek_v3",
)  # fmt: skip
"""mixtral, qwen3_moe and deepseek_v3 store each expert alone, where the model has them in one tensor."""


def write_random_base(folder: Path, kind: str, seed: int) -> Path:
    """A checkpoint of random dtypes, shards and extras, whose config.json says a dtype of its own or none."""
    draw = random.Random(seed)
    _model(kind).save_pretrained(folder, max_shard_size=draw.choice(["20KB", "10MB"]))
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = {
            name: tensor.to(draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64]))
            for name, tensor in load_file(file).items()
        }
        if number == 0:
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
    if phase.middle == "adapted":
        return (every - {"embedding", "head", "norm"}) | set(phase.also_train)
    if phase.middle in ("removed", "bridged", "frozen") and method.name != "lisa":
        return ours | set(phase.also_train)
    return every


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


CASES = [(number, KINDS[(number + turn) % len(KINDS)]) for number in range(len(PHASES)) for turn in (0, 3)]
CASES += [(0, "wrapper"), (2, "wrapper")]  # detached, with a bridge and without


@pytest.mark.parametrize(
    ("number", "kind"), CASES, ids=lambda each: each if isinstance(each, str) else f"{PHASES[each][0].name}-{each}"
)
def test_what_did_not_train_is_bit_identical(number: int, kind: str, tmp_path: Path) -> None:
    method, phase = PHASES[number]
    base = start = write_random_base(tmp_path / "base", kind, seed=100 * number + KINDS.index(kind))
    bridge = None
    if phase.middle == "bridged":
        whole = load_model(str(base), device="cpu", dtype=torch.float32)
        mixture = rows(20)
        bridge = fit_bridge(whole, KEPT, [mixture[index] for index in range(20)])
    if phase.detached:
        detach_checkpoint(base, KEPT, start := tmp_path / "detached")
    seen: dict[str, torch.Tensor] = {}

    def remember(model: PreTrainedModel) -> dict[str, Any]:
        seen.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return {"bpb": {"xx": 1.0}}

    train_checkpoint(
        start,
        tmp_path / "trained",
        rows=rows(3 * sequences_per_step(LENGTH, QUICK)),
        prepare=lambda model: method.prepare(model, phase, Setup(KEPT, bridge, seed=7)),
        seed=7,
        settings=QUICK,
        scratch=tmp_path / "scratch",
        evaluate=remember,
    )
    before, after = stored(start), stored(tmp_path / "trained")
    assert [(n, t.dtype, t.shape) for n, t in before.items()] == [(n, t.dtype, t.shape) for n, t in after.items()]
    changed = {name for name in before if not torch.equal(_bits(before[name]), _bits(after[name]))}
    trains = _trains(method, phase, kind.endswith("tied"))
    assert {_part(name) for name in changed} <= trains
    if method.module != "layer":
        inside = [name for name in changed if _part(name).isdigit()]
        assert inside and all(re.search(_OF_MODULE[method.module], name) for name in inside)
    assert not any(name.startswith(("mtp", "v_head", "draft")) for name in changed)
    layers = {_part(name) for name in changed} & {"0", "1", "2", "3"}
    assert len(layers) == (1 if method.name == "lisa" else len(trains & {"0", "1", "2", "3"}))
    if method.needs_new_rows or phase.name == "embeddings":
        for name in changed:
            if _part(name) in ("embedding", "head"):
                assert torch.equal(_bits(before[name][:NEW_ROW]), _bits(after[name][:NEW_ROW]))
                assert not torch.equal(before[name][NEW_ROW:], after[name][NEW_ROW:])
    loaded = load_model(str(tmp_path / "trained"), device="cpu", dtype=torch.float32).state_dict()
    if phase.middle != "adapted":  # whose adapters are merged later
        for name, tensor in seen.items():
            torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=2**-8, msg=name)
    paths = {str(path.relative_to(start)) for path in start.rglob("*")}
    assert paths == {str(path.relative_to(tmp_path / "trained")) for path in (tmp_path / "trained").rglob("*")}
    for name in (*SIDE_FILES, "config.json", "generation_config.json"):
        assert (tmp_path / "trained" / name).read_bytes() == (start / name).read_bytes()
    scale_change(start, tmp_path / "trained", tmp_path / "half", 0.5)
    half = stored(tmp_path / "half")
    assert not [n for n in before if n not in changed and not torch.equal(_bits(before[n]), _bits(half[n]))]
    assert paths == {str(path.relative_to(tmp_path / "half")) for path in (tmp_path / "half").rglob("*")}
    if phase.detached:  # and it fits the base again
        attach_checkpoint(tmp_path / "trained", base, tmp_path / "attached", include=phase.also_train)
        whole, attached = stored(base), stored(tmp_path / "attached")
        for name in whole:
            same = torch.equal(_bits(whole[name]), _bits(attached[name]))
            assert same or _part(name) in {"0", "3", *phase.also_train}, name
        assert {str(p.relative_to(base)) for p in base.rglob("*")} <= {
            str(p.relative_to(tmp_path / "attached")) for p in (tmp_path / "attached").rglob("*")
        }


def _trained_by(base: Path, change: Any) -> tuple[PreTrainedModel, TrainedFiles]:
    """A model loaded from `base`, all of whose parameters train, after `change`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    files = TrainedFiles(base, model)
    files.set_trained(model)
    with torch.no_grad():
        change(model)
    return model, files


@pytest.mark.parametrize("said", ["float16", "bfloat16", None])
def test_what_config_json_says_of_the_dtype_changes_nothing(said: str | None, tmp_path: Path) -> None:
    """3e-9 is zero in float16, which a merge's config.json may say of bfloat16 weights."""
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tensors = stored(tmp_path / "base")
    tensors["model.layers.1.mlp.up_proj.weight"][0] = 3e-9
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() * 1.0001
    store(tmp_path / "base", tensors)
    edit_config(tmp_path / "base", dtype=said)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    model, files = _trained_by(tmp_path / "base", lambda model: model.model.layers[3].mlp.up_proj.weight.add_(1))
    save_checkpoint(model, None, files, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == size
    after = stored(tmp_path / "out")
    name = "model.layers.3.mlp.up_proj.weight"
    assert {each for each in tensors if not torch.equal(tensors[each], after[each])} == {name}
    assert torch.equal(after[name], (tensors[name].float() + 1).bfloat16())


def test_a_head_stored_beside_the_embedding_it_is_tied_to_follows_it(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "base")
    tensors = stored(tmp_path / "base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    store(tmp_path / "base", tensors)
    model, files = _trained_by(tmp_path / "base", lambda model: model.model.embed_tokens.weight.add_(1))
    save_checkpoint(model, None, files, tmp_path / "out")
    after = stored(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[name], tensors[name] + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_elements_that_did_not_change_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also those that the fp32 of training cannot hold, and negative zeros that a sum makes positive."""
    llama().to(dtype).save_pretrained(tmp_path / "base")
    tensors = stored(tmp_path / "base")
    name = "model.embed_tokens.weight"
    tensors[name][5] = -0.0
    store(tmp_path / "base", tensors)

    def change(model: PreTrainedModel) -> None:
        weight = model.get_input_embeddings().weight
        weight.add_(torch.zeros_like(weight))
        weight[3] += 1

    model, files = _trained_by(tmp_path / "base", change)
    save_checkpoint(model, None, files, tmp_path / "out")
    before, after = tensors[name], stored(tmp_path / "out")[name]
    others = torch.arange(len(before)) != 3
    assert torch.equal(_bits(before[others]), _bits(after[others]))
    assert torch.equal(after[3], (before[3].float() + 1).to(dtype))


CUT: list[tuple[str, dict[str, Any], str]] = [
    *(("full", {}, kind) for kind in ("llama", "llama-tied", "gpt2-tied", "wrapper", "mixtral")),
    ("elo", {"middle": "removed", "also_train": ("embedding", "head")}, "llama"),
    ("elo", {"middle": "removed", "also_train": ()}, "another wrapper"),
    ("lora", {"rank": 2, "also_train": ("embedding", "head")}, "llama-tied"),
    ("lora", {"rank": 2}, "llama"),
    ("embeddings_first", {}, "llama"),
    ("frozen", {"embedding_rows": "new"}, "deepseek_v3"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CUT, ids=[f"{name}-{kind}" for name, _, kind in CUT])
def test_rows_that_training_computes_without_keep_their_bits(
    name: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """vocabulary: corpus: embedding and head train with some of their rows, and whole they are what is written."""
    method = METHODS[name](**settings)
    phase = method.phases[0]
    base = start = write_random_base(tmp_path / "base", kind, seed=len(name) + KINDS.index(kind))
    if phase.detached:
        detach_checkpoint(base, KEPT, start := tmp_path / "detached")
    sequences = rows(2 * sequences_per_step(LENGTH, QUICK))
    used = {int(i) for number in range(len(sequences)) for i in sequences[number]["input_ids"]}
    chosen = sorted(used | {62})
    (tmp_path / "rows.json").write_text(json.dumps(chosen))
    train_checkpoint(
        start,
        tmp_path / "trained",
        rows=sequences,
        prepare=lambda model: method.prepare(model, phase, Setup(KEPT, None, seed=7)),
        seed=7,
        settings=QUICK,
        scratch=tmp_path / "scratch",
        vocabulary=tmp_path / "rows.json",
    )
    before, after = stored(start), stored(tmp_path / "trained")
    trains = _trains(method, phase, kind.endswith("tied"))
    cut = [each for each in before if _part(each) in ("embedding", "head")]
    assert cut
    for each in cut:
        changed = {row for row in range(64) if not torch.equal(_bits(before[each][row]), _bits(after[each][row]))}
        assert changed <= set(chosen), each
        assert bool(changed) == (_part(each) in trains), each
        if method.needs_new_rows or phase.name == "embeddings":
            assert min(changed) >= NEW_ROW, each
    others = {_part(n) for n in before if n not in cut and not torch.equal(_bits(before[n]), _bits(after[n]))}
    assert others <= trains and (others or phase.name == "embeddings")
    assert [(n, t.dtype, t.shape) for n, t in before.items()] == [(n, t.dtype, t.shape) for n, t in after.items()]


def test_values_that_the_stored_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    llama().to(torch.float16).save_pretrained(tmp_path / "base")
    model, files = _trained_by(tmp_path / "base", lambda model: model.lm_head.weight.fill_(1e5))
    with pytest.raises(EloError, match=r"lm_head.weight has values after training that exceed torch.float16"):
        save_checkpoint(model, None, files, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_trained_tensors_that_did_not_arrive_are_an_error(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model, files = _trained_by(tmp_path / "base", lambda model: None)
    part = {name: t for name, t in model.state_dict().items() if name != "model.norm.weight"}
    with pytest.raises(EloError, match=r"model.norm.weight was trained, but is missing"):
        save_checkpoint(model, iter([part]), files, tmp_path / "out")


def test_what_cannot_be_converted_back_is_found_before_training(tmp_path: Path, monkeypatch: Any) -> None:
    _model("mixtral").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    files = TrainedFiles(tmp_path / "base", model)
    monkeypatch.setattr("elo.checkpoint.naming.revert_weight_conversion", lambda model, tensors: tensors)
    with pytest.raises(UnsupportedArchitectureError, match="cannot convert it back"):
        files.set_trained(model)
    for layer in model.model.layers:  # what is not trained is not converted
        layer.mlp.experts.requires_grad_(False)
    files.set_trained(model)


def test_what_lies_beside_the_weights_and_what_does_not_come_along(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    carried = {"LICENSE", "preprocessor_config.json", "additional_chat_templates/rag.jinja", "assets/logo.png"}
    left = {
        "adapter_model.safetensors", "consolidated.safetensors", "pytorch_model.bin",
        "trainer_state.json", ".gitattributes", "modeling_ours.py", "checkpoint-5/optimizer.pt",
        "checkpoint-5/config.json", "model.gguf",
    }  # fmt: skip
    for name in carried | left:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    save_file({"draft.weight": torch.ones(1)}, tmp_path / "base" / "mtp.safetensors")
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "base" / "old.safetensors")  # the same tensor
    model = llama()
    save_checkpoint(model, None, TrainedFiles(tmp_path / "base", model), tmp_path / "out")
    own = {path.name for path in (tmp_path / "base").glob("*-of-*.safetensors")} | {
        "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == own | carried | {"mtp.safetensors"}
    (tmp_path / "trusted").mkdir()
    copy_side_files(tmp_path / "base", tmp_path / "trusted", python=True)
    assert (tmp_path / "trusted" / "modeling_ours.py").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_file_are_known_by_what_they_become(kind: str, tmp_path: Path) -> None:
    base = write_random_base(tmp_path / "base", kind, seed=1)
    model = load_model(str(base), device="cpu", dtype=torch.float32)
    tensors = {name: tensor.to("meta") for name, tensor in stored(base).items()}
    names = map_names(model, tensors)
    outside = {"embedding", "norm", "head"}
    assert {name: names.group(name) for name in tensors if names.group(name)} == {
        name: _part(name) for name in tensors if _part(name) in outside
    }
    assert {"mtp.fc.weight", "v_head.counts", "draft.weight"} <= names.unknown.keys()
    linked = [name for link in names.links for name in link.stored]
    assert sorted([*linked, *names.unknown]) == sorted(tensors)
    loaded = {name for link in names.links for name in link.loaded}
    assert loaded | {"lm_head.weight"} == model.state_dict().keys() | {"lm_head.weight"}
    for link in names.links:
        for name, tensor in names.revert(link, {each: model.state_dict()[each] for each in link.loaded}).items():
            assert torch.equal(tensor, stored(base)[name].float()), name
