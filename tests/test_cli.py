"""The command line as a user meets it: exit status 2 and one message for a mistake, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_fixtures import SOURCE, write_base, write_documents, write_world

from elo.cli import main
from elo.config import load_config


def _elo(capsys, *arguments) -> tuple[int, str, str]:
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    config = write_world(root)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "empty.jsonl").write_text("")
    (root / "labelled.jsonl").write_text("".join(json.dumps({"text": t, "label": t}) + "\n" for t in "ab"))
    damaged = write_base(root / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    return root


def test_detach_attach_evaluate(world, capsys, tmp_path):
    status, out, _ = _elo(capsys, "detach", world / "base", "--layers", "0,-1", "--output", tmp_path / "detached")
    assert (status, out) == (0, f"{tmp_path / 'detached'}: layers 0, 3 of 4\n")
    status, out, _ = _elo(
        capsys, "attach", tmp_path / "detached", "--base", world / "base", "--output", tmp_path / "attached"
    )
    assert (status, out) == (0, f"{tmp_path / 'attached'}: layers 0, 3 of 4 attached\n")
    results = tmp_path / "results.json"
    corpora = ["--corpus", f"en={world / 'en.jsonl'}", "--corpus", f"xx={world / 'xx.jsonl'}"]
    status, out, err = _elo(capsys, "evaluate", tmp_path / "attached", *corpora, "--output", results)
    assert status == 0, err
    measured = json.loads(results.read_text())["bpb"]
    assert measured.keys() == {"en", "xx"}
    assert f"{measured['xx']:.3f}" in out


def test_evaluate_continues_prompts(world, capsys, tmp_path):
    results = tmp_path / "results.json"
    prompts = ["--prompt", "xx=one=two", "--prompt", "xx=three"]
    status, out, err = _elo(capsys, "evaluate", world / "base", *prompts, "--output", results)
    assert status == 0, err
    found = json.loads(results.read_text())
    assert [(each["language"], each["prompt"]) for each in found["samples"]] == [("xx", "one=two"), ("xx", "three")]
    assert found["generation"]["xx"]["characters"] == sum(len(each["text"]) for each in found["samples"])
    assert "three" in out


def test_plan_reads_a_runs_configuration(world, capsys):
    status, out, err = _elo(capsys, "plan", world / "config.yaml")
    assert status == 0, err
    assert "4 layers" in out


def test_config_writes_a_file_that_is_a_configuration(world, capsys, tmp_path):
    path = tmp_path / "new.yaml"
    assert _elo(capsys, "config", world / "base", "-o", path)[0] == 0
    assert load_config(path).model == str(world / "base")
    status, _, err = _elo(capsys, "config", "-o", path)
    assert (status, err) == (2, f"elo: --output {path}: exists already; choose another file\n")
    status, out, _ = _elo(capsys, "config", "--schema")
    assert (status, json.loads(out)["title"]) == (0, "RunConfig")


def test_run_until_a_stage(world, capsys, tmp_path):
    arguments = ["run", world / "config.yaml", "--set", f"output={tmp_path / 'run'}", "--until"]
    assert _elo(capsys, *arguments, "detach")[0] == 0
    assert (tmp_path / "run" / "detach" / "config.json").is_file()
    assert not (tmp_path / "run" / "elo_pretraining").exists()
    status, _, err = _elo(capsys, *arguments, "align")
    assert status == 2
    assert "--until align: method elo has no such stage; write one of prepare, detach, elo_pretraining, attach" in err


@pytest.mark.parametrize("verb", ["pretrain", "align"])
def test_verbs_that_are_gone(world, capsys, verb):
    status, _, err = _elo(capsys, verb, world / "config.yaml")
    assert status == 2
    assert f"No such command '{verb}'" in err


def test_report_of_a_run(world, capsys):
    assert _elo(capsys, "run", world / "config.yaml", "--set", "tokens=256")[0] == 0
    (world / "run" / "report.html").unlink()
    status, out, _ = _elo(capsys, "report", world / "run")
    assert status == 0
    assert (world / "run" / "report.html").is_file()
    assert "report.html" in out


MISTAKES = {
    "no such command": (["trian"], "No such command 'trian'"),
    "no configuration": (["run", "{tmp}/none.yaml"], "none.yaml: no such configuration file"),
    "unknown option": (["run", "{world}/config.yaml", "--sett", "a=b"], "No such option"),
    "unknown key": (["run", "{world}/config.yaml", "--set", "data.replay=1"], "did you mean 'replay_ratio'?"),
    "bad layers": (["run", "{world}/config.yaml", "--set", "layers=0,9"], "names layer 9, but the model has 4"),
    "all layers": (["detach", "{world}/base", "--layers", "0-3", "-o", "{tmp}/out"], "selects all 4 layers"),
    "no such corpus": (["run", "{world}/config.yaml", "--set", "data.corpora.xx={tmp}/no.jsonl"], "no.jsonl"),
    "no such model": (["run", "{world}/config.yaml", "--set", "model={tmp}/no"], "no: no such folder"),
    "empty model folder": (["detach", "{tmp}", "-o", "{tmp}/out"], "config.json"),
    "output is there": (["detach", "{world}/base", "-o", "{here}"], "already exists"),
    "base to attach": (["attach", "{world}/base", "--base", "{world}/base", "-o", "{tmp}/out"], "detach"),
    "nothing to evaluate on": (["evaluate", "{world}/base"], "nothing to measure"),
    "no language": (["evaluate", "{world}/base", "--corpus", "{world}/en.jsonl"], "write LANGUAGE=FILE"),
    "language twice": (["evaluate", "{world}/base", "--corpus", "a=b", "--corpus", "a=c"], "'a' is given twice"),
    "corpus missing": (["evaluate", "{world}/base", "--corpus", "en={tmp}/none.jsonl"], "none.jsonl"),
    "no results": (["report", "{tmp}"], "results.json"),
    "plan below a file": (["plan", "{world}/base", "-o", "{world}/en.jsonl/plan.json"], "choose another output"),
    "plan for no number": (["plan", "{world}/base", "--tokens", "nan"], "--tokens: got nan"),
    "plan without an end": (["plan", "{world}/base", "--tokens", "inf"], "--tokens: got inf"),
    "plan of a run for no number": (["plan", "{world}/config.yaml", "--tokens", "nan"], "--tokens: got nan"),
    "too many pieces": (
        ["vocab", "measure", "{world}/base", "--corpus=en={world}/en.jsonl", "--target=en", "--pieces", "1" + "0" * 20],
        "each from 1 to 10,000,000",
    ),
    "pieces without a target": (
        ["vocab", "measure", "{world}/base", "--corpus", "en={world}/en.jsonl", "--pieces", "100"],
        "--pieces belongs to --target",
    ),
    "benchmark options without tasks": (
        ["evaluate", "{world}/base", "--corpus", "en={world}/en.jsonl", "--batch-size", "4", "--limit", "9"],
        "--limit, --batch-size belong to --tasks",
    ),
    "search options without a search": (
        ["merge", "{world}/base", "--with", "{world}/base", "-o", "{tmp}/out", "--target=xx", "--source-limit=0.02"],
        "merge: --target, --source-limit belong to --search; add --search, or remove them",
    ),
    "other search options without a search": (
        ["merge", "{world}/base", "--with", "{world}/base", "-o", "{tmp}/out", "--weights=1", "--max-bytes=2000"],
        "merge: --weights, --max-bytes belong to --search",
    ),
    "search without text": (
        ["merge", "{world}/base", "--with", "{world}/base", "-o", "{tmp}/out", "--search", "--target", "xx"],
        "merge: --search needs text; give --corpus LANGUAGE=FILE",
    ),
    "a folder that is not there": (
        ["evaluate", "{world}/base", "--corpus", "en=data/train"],
        "there is no folder data",
    ),
    "overwriting what is no checkpoint": (
        ["detach", "{world}/base", "-o", "{here}", "--overwrite"],
        "not a checkpoint",
    ),
    "scale beyond reason": (
        ["attach", "{world}/base", "--base", "{world}/base", "-o", "{tmp}/out", "--scale", "1e39"],
        "write a number from -100 to 100",
    ),
    "empty corpus": (["run", "{world}/config.yaml", "--set", "data.corpora.xx={world}/empty.jsonl"], "empty"),
    "unknown reporter": (
        ["run", "{world}/config.yaml", "--set", "training.report_to=nowhere", "--set", "method=full"],
        "nowhere",
    ),
    "bad training argument": (
        ["run", "{world}/config.yaml", "--set", "training.training_arguments={{fsdp: wat}}"],
        "training: transformers rejects",
    ),
    "damaged weights": (["run", "{world}/config.yaml", "--set", "model={world}/damaged"], "model.safetensors"),
    "scale is no number": (
        ["attach", "{world}/base", "--base", "{world}/base", "-o", "{tmp}/out", "--scale", "nan"],
        "scale: got nan",
    ),
    "unknown device": (["plan", "{world}/base", "--device", "H1000"], "H1000"),
    "step does not divide": (
        ["run", "{world}/config.yaml", "--set", "training.tokens_per_step=100"],
        "training.tokens_per_step: 100 is not a multiple",
    ),
    "cloze missing": (["run", "{world}/config.yaml", "--set", "evaluation.cloze.xx={tmp}/n"], "n: no such file"),
}

IN_STORAGE = {
    "evaluate": ["evaluate", "{world}/base", "--corpus", "en={world}/en.jsonl", "-o", "s3://b/x.json"],
    "generate": ["generate", "{world}/base", "--prompt", "a", "-o", "gs://b/x.json"],
    "fewshot": [
        "fewshot",
        "{world}/base",
        "--train",
        "{world}/labelled.jsonl",
        "--test",
        "{world}/labelled.jsonl",
        "-o",
        "s3://b/x.json",
    ],
    "plan": ["plan", "{world}/base", "-o", "s3://b/x.json"],
    "config": ["config", "{world}/base", "-o", "s3://b/x.yaml"],
    "vocab measure": [
        "vocab",
        "measure",
        "{world}/base",
        "--corpus",
        "en={world}/en.jsonl",
        "-o",
        "hf://datasets/a/b/c",
    ],
    "cloze items": ["evaluate", "{world}/base", "--cloze", "en=s3://b/x.jsonl"],
    "conversations": ["evaluate", "{world}/base", "--chat", "en=s3://b/x.jsonl"],
    "examples": ["fewshot", "{world}/base", "--train", "s3://b/x.jsonl", "--test", "b"],
    "cloze items of a run": ["run", "{world}/config.yaml", "--set", "evaluation.cloze.xx=s3://b/x.jsonl"],
}
MISTAKES |= {f"{what} in storage": (arguments, "is in object storage; ") for what, arguments in IN_STORAGE.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_message(mistake, world, tmp_path, capsys):
    arguments, said = MISTAKES[mistake]
    arguments = [argument.format(world=world, tmp=tmp_path, here=Path(__file__).parent) for argument in arguments]
    if arguments[0] == "run" and len(arguments) > 2 and arguments[2] == "--set":
        arguments += ["--set", f"output={tmp_path / 'run'}"]
    status, _, err = _elo(capsys, *arguments)
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]


def test_broken_line_is_named_by_file_and_line(world, tmp_path, capsys):
    broken = write_documents(tmp_path / "xx.jsonl", SOURCE, 5, 1)
    broken.write_text(broken.read_text() + '{"text": "half\n')
    overrides = ["--set", f"data.corpora.xx={broken}", "--set", f"output={tmp_path / 'run'}"]
    status, _, err = _elo(capsys, "prepare", world / "config.yaml", *overrides)
    assert status == 2
    assert "xx.jsonl:6" in err


def test_tokenizer_beyond_the_embedding(tmp_path, world, capsys):
    base = write_base(tmp_path / "base", vocab_size=300)
    overrides = ["--set", f"model={base}", "--set", f"output={tmp_path / 'run'}"]
    status, _, err = _elo(capsys, "run", world / "config.yaml", *overrides)
    assert status == 2, err
    assert "300" in err
    assert "embedding" in err


def test_a_bug_is_not_dressed_up_as_a_mistake():
    code = "import elo.cli, elo.run as r\nr.run = lambda *a, **k: 1 / 0\nelo.cli.main(['run', 'x.yaml'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
