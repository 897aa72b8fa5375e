"""Merges: exact sums, every vocabulary, files of the first model, mergekit's YAML, and a searched weight."""

import json
import math
import shutil

import pytest
import torch
import yaml
from run_fixtures import SOURCE, TARGET, write_base, write_documents
from surgery_fixtures import assert_same, changed, llama, resized, stored, three, tokenized
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_fixtures import KOREAN

from elo.checkpoint.new_rows import VOCABULARY_KEY
from elo.cli import main
from elo.errors import EloError
from elo.merge.merge import RECORD_FILE, Search, merge
from elo.vocab.rows import NewTokens, extend_checkpoint

EMBEDDING = "model.embed_tokens.weight"


def slerp(one, other, t):
    cosine = float(one.flatten() @ other.flatten() / one.norm() / other.norm())
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_is_its_formula_rounded_once(dtype, tmp_path):
    adapted, base, chat = three(tmp_path, dtype)
    ours, theirs, chats = (
        {name: tensor.double() for name, tensor in stored(folder).items()} for folder in (adapted, base, chat)
    )
    expected = {
        "linear": lambda name: 0.75 * ours[name] + 0.25 * chats[name],
        "slerp": lambda name: slerp(ours[name], chats[name], 0.25),
        "task_arithmetic": lambda name: ours[name] + 0.25 * (chats[name] - theirs[name]),
    }
    for method, formula in expected.items():
        given = {"base": base} if method == "task_arithmetic" else {}
        record = merge(adapted, chat, output=tmp_path / method, method=method, weight=0.25, **given)
        assert record["tensors"] == len(ours)
        merged = stored(tmp_path / method)
        for name, tensor in merged.items():
            assert tensor.dtype == dtype
            atol = 0 if method != "slerp" else torch.finfo(dtype).eps * float(formula(name).abs().max())
            torch.testing.assert_close(tensor, formula(name).to(dtype), atol=atol, rtol=0, msg=f"{method} {name}")
    cosines = [float(torch.cosine_similarity(ours[n].flatten(), chats[n].flatten(), 0)) for n in ours]
    assert min(cosines) < 0.9995, "at least one tensor is on the arc"


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_both_ends_are_the_models_bit_for_bit(method, tmp_path):
    adapted, base, _ = three(tmp_path, torch.bfloat16, tied=True)
    merge(adapted, base, output=tmp_path / "none", method=method, weight=0)
    assert_same(stored(tmp_path / "none"), stored(adapted))
    merge(adapted, base, output=tmp_path / "all", method=method, weight=1)
    assert_same(stored(tmp_path / "all"), stored(base))


def test_names_dtypes_and_files_are_the_first_models(tmp_path):
    adapted, base, _ = three(tmp_path, torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    (adapted / "LICENSE").write_text("adapted")
    (adapted / "README.md").write_text("I am the adapted model.")
    (adapted / "notes").mkdir()
    (adapted / "notes" / "x.txt").write_text("x")
    (base / "LICENSE").write_text("base")
    merge(adapted, base, output=tmp_path / "out", weight=0.5)
    assert (tmp_path / "out" / "LICENSE").read_text() == "adapted"
    assert (tmp_path / "out" / "notes" / "x.txt").read_text() == "x"
    assert (tmp_path / "out" / "README_base.md").read_text() == "I am the adapted model."
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Merge of adapted and base" in card and "Weight: 0.5, of base" in card and str(tmp_path) not in card
    assert "adapted's card (README\\_base.md) names no licence. Its terms are in LICENSE." in card
    merged, ours = stored(tmp_path / "out"), stored(adapted)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in merged.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()
    }
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["models"] == [str(adapted), str(base)]
    assert (record["method"], record["weight"], record["search"]) == ("linear", 0.5, None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", [64, 60])
@pytest.mark.parametrize("extended_first", [True, False])
def test_rows_of_new_tokens_are_kept_whichever_model_has_them(tied, first, extended_first, tmp_path):
    _, base, _ = three(tmp_path, tied=tied)
    new = NewTokens(first, [[5, 6], [7], [8]])
    extend_checkpoint(base, tmp_path / "new", new, save_tokenizer=lambda folder: None, pad_to_multiple_of=8)
    adapted = changed(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tmp_path / "adapted2", 3)
    pair = (adapted, base) if extended_first else (base, adapted)
    record = merge(*pair, output=tmp_path / "out", weight=0.5)
    ours, theirs, merged = stored(adapted), stored(base), stored(tmp_path / "out")
    rows = len(ours[EMBEDDING])
    assert record["rows_kept"] + record["rows_added"] == rows - first
    for name in (EMBEDDING, *([] if tied else ["lm_head.weight"])):
        half = 0.5 * ours[name][:first].double() + 0.5 * theirs[name][:first].double()
        assert torch.equal(merged[name], torch.cat([half.float(), ours[name][first:]])), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == rows
    assert getattr(model.config, VOCABULARY_KEY)["rows"] == {"start": first, "stop": first + 3}
    (tmp_path / "out" / RECORD_FILE).unlink()
    again = merge(adapted, adapted, output=tmp_path / "same", weight=0.5)
    assert again["rows_kept"] == 0, "two models with the same new rows are merged in all rows"


def test_a_model_with_fewer_rows_leaves_the_others_as_they_are(tmp_path):
    adapted, _, _ = three(tmp_path)
    small = resized(tmp_path / "small", 60)
    record = merge(adapted, small, output=tmp_path / "out", weight=0.5)
    assert record["rows_kept"] == 4
    assert torch.equal(stored(tmp_path / "out")[EMBEDDING][60:], stored(adapted)[EMBEDDING][60:])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an adapted model with the same tokenizer, one with new pieces, and text of two languages."""
    root = tmp_path_factory.mktemp("merge")
    tokenized(root, "base", "adapted")
    return root


@pytest.mark.parametrize("extended_first", [True, False])
def test_the_tokenizer_is_the_one_with_every_token(world, extended_first, tmp_path):
    pair = (world / "extended", world / "base") if extended_first else (world / "base", world / "extended")
    merge(*pair, output=tmp_path / "out", weight=0.5)
    text = " ".join(KOREAN)
    found, expected = (
        AutoTokenizer.from_pretrained(each)(text)["input_ids"] for each in (tmp_path / "out", world / "extended")
    )
    assert found == expected
    assert found != AutoTokenizer.from_pretrained(world / "base")(text)["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=torch.tensor([found])).logits
    assert torch.isfinite(logits).all()


def test_two_vocabularies_are_refused(world, tmp_path):
    other = shutil.copytree(world / "base", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(other)
    with pytest.raises(EloError, match="no model's tokenizer has every token"):
        merge(world / "extended", other, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    models = [world / "extended", world / "base", other, shutil.copytree(world / "base", tmp_path / "last")]
    listed = [{"model": str(each), "parameters": {"weight": 1}} for each in models]
    path = mergekit_file(tmp_path / "four.yaml", merge_method="linear", models=listed)
    with pytest.raises(EloError, match=r"for example '<\|tool\|>'"):
        merge(path, output=tmp_path / "out")


def mergekit_file(path, **keys):
    path.write_text(yaml.safe_dump(keys))
    return path


def of_every_method(adapted, base, chat):
    """Configurations as mergekit reads them, the usual ones with filters and gradients."""
    curves = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.4}]
    layers = {"layer_range": [0, 4]}
    return {
        "linear": {
            "merge_method": "linear",
            "models": [
                {"model": str(adapted), "parameters": {"weight": 0.5}},
                {"model": str(base), "parameters": {"weight": [{"filter": "mlp", "value": 1.5}, {"value": 1}]}},
                {"model": str(chat), "parameters": {"weight": 2}},
            ],
        },
        "slerp": {
            "merge_method": "slerp",
            "slices": [{"sources": [{"model": str(adapted), **layers}, {"model": str(chat), **layers}]}],
            "base_model": str(chat),
            "parameters": {"t": curves},
        },
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "models": [
                {"model": str(adapted), "parameters": {"weight": 0.75}},
                {"model": str(chat), "parameters": {"weight": [0.1, 0.9]}},
            ],
            "base_model": str(base),
            "parameters": {"lambda": 0.8},
        },
    }


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mergekits_files_give_what_mergekit_gives(method, dtype, tmp_path):
    config = pytest.importorskip("mergekit.config")
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    keys = {**of_every_method(*three(tmp_path))[method], "dtype": dtype}
    merge(mergekit_file(tmp_path / "merge.yaml", **keys), output=tmp_path / "ours")
    run_merge(
        config.MergeConfiguration.model_validate(keys),
        str(tmp_path / "theirs"),
        MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, cuda=False),
    )
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        # mergekit rounds inputs to `dtype` first, and task arithmetic after each step.
        scale = float(tensor.abs().max()) * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, theirs[name], atol=4 * scale, rtol=0, msg=name)


def test_a_file_of_mergekits_form_is_its_formula(tmp_path):
    adapted, base, chat = three(tmp_path, torch.bfloat16)
    files = of_every_method(adapted, base, chat)
    ours, theirs, chats = (
        {name: tensor.double() for name, tensor in stored(folder).items()} for folder in (adapted, base, chat)
    )
    for method in files:
        merge(mergekit_file(tmp_path / f"{method}.yaml", **files[method], dtype="float32"), output=tmp_path / method)
        config = json.loads((tmp_path / method / "config.json").read_text())
        assert config["dtype"] == "float32"
    for name in ours:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        depth = 0 if layer is None else layer / 3
        weight = 1.5 if "mlp" in name else 1
        linear = (0.5 * ours[name] + weight * theirs[name] + 2 * chats[name]) / (2.5 + weight)
        torch.testing.assert_close(stored(tmp_path / "linear")[name], linear.float(), atol=1e-6, rtol=1e-6)
        t = [0, 0.5, 0.3, 1][layer or 0] if "self_attn" in name else 1 - 0.8 * depth if "mlp" in name else 0.4
        expected = slerp(chats[name], ours[name], t)
        torch.testing.assert_close(stored(tmp_path / "slerp")[name], expected.float(), atol=1e-6, rtol=1e-5)
        change = 0.75 * (ours[name] - theirs[name]) + (0.1 + 0.8 * depth) * (chats[name] - theirs[name])
        expected = theirs[name] + 0.8 * change
        torch.testing.assert_close(stored(tmp_path / "task_arithmetic")[name], expected.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_method": "ties"}, "merge_method: 'ties' is not computed by elo merge; write linear, slerp, task_ar"),
        ({"tokenizer_source": "union"}, "tokenizer_source: elo merge does not read this key"),
        ({"parameters": {"density": 0.5}}, "'density' is not a parameter of task_arithmetic"),
        ({"parameters": {"lambda": "much"}}, "lambda: 'much' is not a number"),
        ({"base_model": None}, "base_model is missing"),
        ({"dtype": "int8"}, "dtype"),
        ({"models": [{"model": "{adapted}"}]}, "no weight for"),
        ({"models": [{"model": "{base}"}]}, "1 models"),
        ({"models": None}, "either models or slices"),
        ({"models": None, "slices": [{"sources": [{"model": "{adapted}", "layer_range": [0, 2]}]}]}, "layer_range"),
    ],
)
def test_what_mergekit_would_compute_otherwise_is_refused(change, said, tmp_path):
    adapted, base, chat = three(tmp_path)
    keys = of_every_method(adapted, base, chat)["task_arithmetic"] | change
    text = yaml.safe_dump(keys).replace("{adapted}", str(adapted)).replace("{base}", str(base))
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(EloError, match=said):
        merge(tmp_path / "merge.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "ties"}, "no such method"),
        ({"method": "task_arithmetic"}, "needs the base"),
        ({"base": "base"}, "linear has no base"),
        ({"weight": math.nan}, "must be a number"),
        ({"other": "gone/gone/gone"}, "no such folder"),
        ({"other": None}, "is not a file"),
        ({"search": Search({}, ["ko"])}, "has no text"),
        ({"search": Search({}, [])}, "needs --target"),
        ({"search": Search({"ko": "ko.jsonl"}, ["ko"]), "weight": 0.3}, "--weight 0.3: --search chooses the weight"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, tmp_path):
    adapted, base, _ = three(tmp_path)
    with pytest.raises(EloError, match=said):
        merge(adapted, output=tmp_path / "out", **{"other": base, **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [{"method": "linear"}, {"weight": 0.5}, {"base": "b"}, {"search": Search({}, ["ko"])}], ids=str
)
def test_a_file_excludes_the_settings_of_two_models(given, tmp_path):
    file = mergekit_file(tmp_path / "merge.yaml", **of_every_method(*three(tmp_path))["linear"])
    with pytest.raises(EloError, match=r"merge\.yaml: a YAML file has its own method"):
        merge(file, output=tmp_path / "out", **given)


def test_models_whose_layers_differ_are_refused(tmp_path):
    adapted, base, _ = three(tmp_path)
    llama(layers=3).save_pretrained(base)
    with pytest.raises(EloError, match=r"has model\.layers\.3.*but .*base does not"):
        merge(adapted, base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """A base that predicts the source language, a model that predicts the target language, and text of both."""
    root = tmp_path_factory.mktemp("languages")
    base = write_base(root / "base", dtype=torch.float32)
    corpora = {
        "xx": write_documents(root / "xx.jsonl", TARGET, 12, 1),
        "en": write_documents(root / "en.jsonl", SOURCE, 12, 2),
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    for folder, words in (("base", SOURCE), ("adapted", TARGET)):
        model = AutoModelForCausalLM.from_pretrained(base)
        ids = torch.tensor([tokenizer(" ".join(words))["input_ids"]])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if folder == "adapted":
            shutil.copytree(root / "base", root / "adapted")
        model.save_pretrained(root / folder)
    return root, corpora


def test_the_weight_with_the_best_target_within_the_limit_is_taken(languages, tmp_path, capsys):
    root, corpora = languages
    (tmp_path / ".tmp-out-0123abcd" / "trial").mkdir(parents=True)  # left by a killed search
    command = ["merge", root / "adapted", "--with", root / "base", "-o", tmp_path / "out", "--search", "--target", "xx"]
    command += [f"--corpus={language}={path}" for language, path in corpora.items()]
    main([str(each) for each in [*command, "--weights", "0,0.5,1", "--source-limit", "100"]])
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    tried = {each["weight"]: each["bpb"] for each in record["search"]["tried"]}
    assert list(tried) == [0, 0.5, 1]
    assert record["weight"] == min(tried, key=lambda weight: tried[weight]["xx"])
    assert tried[1] == record["search"]["reference"]["bpb"]
    assert "weight 0.5: bits per byte xx" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| **{record['weight']:g}** | **{tried[record['weight']]['xx']:.3f}** |" in card
    assert tried[0]["en"] > tried[1]["en"]
    main([str(each) for each in [*command, "--weights", "0,1", "--source-limit", "0", "--overwrite"]])
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["weight"] == 1
    assert_same(stored(tmp_path / "out"), stored(root / "base"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no trial is left, not even a killed one's"


def test_no_weight_within_the_limit_is_one_message(languages, tmp_path):
    root, corpora = languages
    with pytest.raises(EloError, match=r"no weight keeps en within it; the nearest is weight 0\.5"):
        merge(
            root / "adapted",
            root / "base",
            output=tmp_path / "out",
            search=Search(corpora, ["xx"], source_limit=0.0, weights=[0, 0.5]),
        )
    assert list(tmp_path.iterdir()) == []
