"""Benchmarks of lm-eval over local files: the same values as its own command line, and one message for a mistake."""

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from evaluation_fixtures import text_tokenizer, tiny_model, tiny_tokenizer

from elo.cli import main
from elo.config import load_config
from elo.errors import EloError
from elo.evaluate import lm_eval as measure_file
from elo.evaluate.evaluate import evaluate
from elo.evaluate.lm_eval import SUITES, Tasks, benchmark_tasks
from elo.report.collect import measured

TASK = """\
task: {name}
tag: river_tasks
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/dev.jsonl, test: {folder}/test.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
doc_to_text: "{field}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
Tagged = type("Tagged", (yaml.SafeLoader,), {})
Tagged.add_constructor("!function", lambda loader, node: node.value)
DATA = {"target": "ko", "source": "en", "corpora": {"ko": "a.txt", "en": "b.txt"}}
WORDS = ["river", "mill", "grain", "lamp", "bread", "salt", "bell", "ferryman"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    tiny_model("llama", len(tiny_tokenizer())).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    draw = random.Random(0)
    for split, count in (("dev", 8), ("test", 24)):
        lines = []
        for _ in range(count):
            choices = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(4)]
            item = {"question": f"Who saw the {draw.choice(WORDS)}?", "choices": choices, "answer": draw.randrange(4)}
            lines.append(json.dumps(item) + "\n")
        (root / f"{split}.jsonl").write_text("".join(lines))
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "river.yaml").write_text(TASK.format(name="river", folder=root, field="{{question}} Answer:"))
    (tasks / "group.yaml").write_text(
        "group: waters\ntask: [river, river_copy]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )  # fmt: skip
    (tasks / "copy.yaml").write_text(TASK.format(name="river_copy", folder=root, field="{{question}}\\nA:"))
    return root


@pytest.fixture
def installed():
    pytest.importorskip("lm_eval")


@pytest.mark.usefixtures("installed")
def test_values_are_those_of_the_command_line(world, tmp_path):
    tasks = Tasks(names=("en=river",), num_fewshot=2, limit=20, batch_size=3, include_path=str(world / "tasks"))
    results = evaluate(world / "model", measures=[tasks], output=tmp_path / "ours.json", device="cpu", progress=False)
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
         f"pretrained={world / 'model'},dtype=float32", "--tasks", "river", "--include_path", str(world / "tasks"),
         "--num_fewshot", "2", "--limit", "20", "--batch_size", "3", "--device", "cpu",
         "--output_path", str(tmp_path / "theirs"), "--log_samples"],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["river"]
    ours = {value.measure: value for value in measured(results).measures}
    assert set(ours) == {"river acc", "river acc_norm", "river margin"}
    for metric in ("acc", "acc_norm"):
        value = ours[f"river {metric}"]
        assert value.value == theirs[f"{metric},none"]
        assert value.standard_error == theirs[f"{metric}_stderr,none"]
        assert (value.language, value.items, value.chance) == ("en", 20, 0.25)
        assert fmean(value.per_item) == pytest.approx(value.value)
    samples = [json.loads(line) for line in next((tmp_path / "theirs").rglob("samples_*.jsonl")).open()]
    margins = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        texts = [argument["arg_1"] for argument in sample["arguments"].values()]
        nats = [float(r[0]) / len(text.encode()) for r, text in zip(sample["filtered_resps"], texts, strict=True)]
        gold = nats.pop(sample["target"] if isinstance(sample["target"], int) else int(sample["target"]))
        margins.append(gold - max(nats))
    assert ours["river margin"].per_item == pytest.approx(margins, abs=1e-4)
    assert ours["river margin"].standard_error == pytest.approx(stdev(margins) / 20**0.5, rel=1e-3)
    assert not (tmp_path / "ours.partial").exists()
    written = json.loads((tmp_path / "ours.lm_eval.json").read_text())
    assert written["results"]["river"]["acc,none"] == theirs["acc,none"]


@pytest.mark.usefixtures("installed")
def test_groups_and_tags(world, monkeypatch):
    managers = []
    monkeypatch.setattr(
        measure_file, "_manager", lambda path, *, defaults=True: managers.append(defaults) or TaskManager(
            include_path=path, include_defaults=defaults
        )
    )  # fmt: skip
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.TaskManager", None)  # which it makes, with all of its tasks, if it gets none

    def values(task):
        model = tiny_model("llama", len(tiny_tokenizer()))
        tasks = Tasks(names=(task,), limit=4, include_path=str(world / "tasks"))
        results = evaluate(model, text_tokenizer(), measures=[tasks], progress=False)
        return {(value.measure, value.name): value for value in measured(results).measures}

    group = values("waters")
    assert {key for key in group if key[1] == "all"} == {("waters acc", "all"), ("waters margin", "all")}
    whole, parts = group["waters acc", "all"], [group["waters acc", name] for name in ("river", "river_copy")]
    assert (whole.items, len(whole.per_item)) == (8, 8)
    assert whole.value == fmean(whole.per_item) == fmean(part.value for part in parts)
    assert not any(part.per_item for part in parts), "values of items are kept once"
    tag = values("river_tasks")
    assert {("river acc", "all"), ("river_copy acc", "all")} <= set(tag), "a tag stands for its tasks"
    assert not any(managers), "lm-eval's own thousands of tasks are not read for tasks of one's own"


@pytest.mark.usefixtures("installed")
def test_finished_tasks_are_not_repeated(world, tmp_path, monkeypatch):
    asked = Tasks(names=("river", "river_copy"), limit=4, include_path=str(world / "tasks"))
    output, ran = tmp_path / "out.json", []
    run = Tasks._run

    def until_killed(self, task, subject):
        if len(ran) == killed_after:
            raise KeyboardInterrupt
        ran.append(task)
        return run(self, task, subject)

    monkeypatch.setattr(Tasks, "_run", until_killed)
    killed_after = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(world / "model", measures=[asked], output=output, device="cpu", progress=False)
    killed_after = 9
    resumed = evaluate(world / "model", measures=[asked], output=output, device="cpu", progress=False)
    assert ran == ["river", "river_copy"]
    assert not (tmp_path / "out.partial").exists()
    fresh = evaluate(world / "model", measures=[asked], device="cpu", progress=False)
    assert resumed["measures"] == fresh["measures"]
    # As a stage of a run does, whose folder the run removes.
    killed_after, ran[:] = 1, []
    with pytest.raises(KeyboardInterrupt):
        evaluate(world / "model", measures=[asked], files=tmp_path / "stage", device="cpu", progress=False)
    assert len(list((tmp_path / "stage").iterdir())) == 1
    changed = asked.model_copy(update={"limit": 5})
    killed_after = 9
    evaluate(world / "model", measures=[changed], files=tmp_path / "stage", device="cpu", progress=False)
    assert ran == ["river", "river", "river_copy"], "with another limit all is asked anew"
    assert set(json.loads((tmp_path / "stage.lm_eval.json").read_text())["results"]) == {"river", "river_copy"}


@pytest.mark.usefixtures("installed")
def test_mistakes_get_one_message(world, tmp_path, monkeypatch):
    include = str(world / "tasks")

    def message(*names, **settings):
        with pytest.raises(EloError) as caught:
            Tasks(names=names, **{"include_path": include, **settings}).check("--tasks")
        return str(caught.value)

    assert "there is no task 'rivr'; did you mean river" in message("rivr")
    assert message("river", suites=("korean=kr",)).startswith("--tasks: there is no suite 'korean=kr'; choose from ar,")
    known = measure_file._manager(include).all_tasks
    assert not [task for tasks in SUITES.values() for task in tasks if task not in known]
    assert "include_path: /none: no such folder" in message("river", include_path="/none")
    bad = tmp_path / "tasks"
    bad.mkdir()
    (bad / "a.yaml").write_text(TASK.format(name="gone", folder="/nowhere", field="{{question}}"))
    (bad / "b.yaml").write_text(TASK.format(name="fieldless", folder=world, field="{{passage}}"))
    (bad / "c.yaml").write_text(
        'task: unreachable\ndataset_path: elo-tests/none\noutput_type: multiple_choice\ntest_split: test\n'
        'doc_to_text: "{{a}}"\ndoc_to_choice: "{{b}}"\ndoc_to_target: "{{c}}"\n'
    )  # fmt: skip
    found = message("gone", include_path=str(bad))
    assert "task gone: its data set json" in found
    assert "/nowhere/test.jsonl" in found
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "task unreachable: its data set elo-tests/none cannot be loaded" in message(
        "unreachable", include_path=str(bad)
    )
    fieldless = message("fieldless", include_path=str(bad))
    assert fieldless.startswith(f"--tasks: task fieldless: {world}/dev.jsonl:1: has no field 'passage', which the task")


@pytest.mark.usefixtures("installed")
def test_an_item_without_a_field_is_named_before_anything_is_measured(world, tmp_path, capsys):
    """`datasets` would fill the field with null, and the template would ask about None."""
    items = [{"question": "Who?", "choices": ["a", "b"], "answer": 0}, {"choices": ["a", "b"], "answer": 1}]
    for name, lines in (("dev", items[:1]), ("test", items)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    (tmp_path / "tasks").mkdir()
    task = TASK.format(name="short", folder=tmp_path, field="{{question}}{% for i in range(2) %}?{% endfor %}")
    (tmp_path / "tasks" / "short.yaml").write_text(task)
    with pytest.raises(SystemExit) as stopped:
        main([
            "evaluate", str(world / "model"), "--tasks", "short", "--include-path", str(tmp_path / "tasks"),
            "-o", str(tmp_path / "out.json"),
        ])  # fmt: skip
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/test.jsonl:2: has no field 'question', which the task file uses; it has choices, answer" in said
    assert said.count("\n") == 1 and not list(tmp_path.glob("out*"))


SHIPPED = {
    "boolq": {"Text": "비가 온다.", "Question": "비가 오나?", "Answer": "TRUE"},
    "copa": {"sentence": "비가 왔다.", "question": "결과", "1": "땅이 젖었다.", "2": "해가 떴다.", "Answer": "1"},
    "hellaswag_ko": {"context": "비가 온다.", **{f"choice{i}": f"강 {i}" for i in range(1, 5)}, "label": "3"},
    "sentineg": {"Text": "좋은 우물", "Label": "1"},
    "wic_ko": {"Target": "물", "SENTENCE1": "[물]이 달다.", "SENTENCE2": "[물]이 차다.", "ANSWER": "False"},
    "belebele_kor": {
        "flores_passage": "비가 온다.", "question": "무엇이 오나? ", "correct_answer_num": "2",
        **{f"mc_answer{i}": f"답 {i}" for i in range(1, 5)},
    },
    "sib_kor": {"text": "강과 산", "category": "geography"},
    "sib_eng": {"text": "Rivers and hills", "category": "geography"},
}  # fmt: skip
"""An invented item for each task in benchmarks/tasks."""


@pytest.mark.usefixtures("installed")
def test_tasks_for_kobest_belebele_and_sib_200(tmp_path):
    folder = Path(__file__).parents[2] / "benchmarks" / "tasks"
    files, prompts, right = {}, {}, {}
    for path in folder.iterdir():
        text = path.read_text().replace("DATA", str(tmp_path))
        (tmp_path / path.name).write_text(text)
        if path.suffix == ".yaml":
            config = yaml.load(text, Tagged)
            files[config["task"]] = config["dataset_kwargs"]["data_files"]
    assert files.keys() == SHIPPED.keys()
    (tmp_path / "eval").mkdir()
    for name, paths in files.items():
        for path in paths.values():
            Path(path).write_text(json.dumps(SHIPPED[name], ensure_ascii=False) + "\n")
    asked = Tasks(names=tuple(SHIPPED), include_path=str(tmp_path), num_fewshot=0)
    asked.check("--tasks")
    for name in SHIPPED:
        (task,) = asked._load(name, "--tasks")
        (item,) = task.test_docs()
        choices, gold = task.doc_to_choice(item), task.doc_to_target(item)
        prompts[name], right[name] = task.doc_to_text(item), gold if gold in choices else choices[int(gold)]
    assert right == {
        "boolq": "예", "copa": "땅이 젖었다.", "hellaswag_ko": "강 4", "sentineg": "긍정", "wic_ko": "아니오",
        "belebele_kor": "B", "sib_kor": "geography", "sib_eng": "geography",
    }  # fmt: skip
    from lm_eval.tasks.kobest.utils import wic_doc_to_text

    wic = SHIPPED["wic_ko"]
    theirs = {"context_1": wic["SENTENCE1"], "context_2": wic["SENTENCE2"], "word": wic["Target"]}
    assert prompts["wic_ko"] == wic_doc_to_text(theirs)
    assert prompts["boolq"] == "비가 온다. 질문: 비가 오나? 답변: "
    assert prompts["copa"] == "비가 왔다 그래서"


def test_without_the_extra_there_is_one_message(monkeypatch):
    monkeypatch.setattr(measure_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EloError, match=r"evaluation.tasks: lm-eval is not installed; run: pip install 'elo-cpt\[eval\]'"
    ):
        Tasks(names=("river",)).check("evaluation.tasks")


def test_suites():
    assert Tasks(suites=("ko",)).languages["kobest"] == "ko"
    documented = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert not [name for name, tasks in SUITES.items() if f"| `{name}` | {', '.join(tasks)} |" not in documented]
    both = Tasks(suites=("korean=ko", "en"), names=("ko=haerae", "river")).languages
    assert (both["kobest"], both["haerae"], both["mmlu"], both["river"]) == ("korean", "ko", "en", "")
    with pytest.raises(EloError, match=r"evaluation.tasks.*names no task; write names, suites or both"):
        load_config({"model": "m", "output": "o", "data": DATA, "evaluation": {"tasks": {"limit": 3}}})


def test_options_and_configuration_give_the_same_settings():
    asked = benchmark_tasks("ko=river, mill", None, 5, 20, "auto", None)
    assert asked.languages == {"river": "ko", "mill": ""}
    config = {"model": "m", "output": "o", "data": DATA}
    section = {"names": ["ko=river", "mill"], "num_fewshot": 5, "limit": 20}
    long = load_config({**config, "evaluation": {"tasks": section}})
    assert long.evaluation.measures == [asked]
    short = load_config({**config, "evaluation": {"tasks": ["river"], "in_context": True}})
    assert [measure.name for measure in short.evaluation.measures] == ["in_context", "tasks"]
    assert load_config({**config, "evaluation": {"in_context": False}}).evaluation.measures == []
    with pytest.raises(EloError, match=r"unknown key 'evaluation.tasks.num_fewshots'; did you mean 'num_fewshot'\?"):
        load_config({**config, "evaluation": {"tasks": {"names": ["a"], "num_fewshots": 1}}})


@pytest.mark.parametrize(
    ("names", "limit", "batch_size", "message"),
    [
        (" ,", None, "auto", "--tasks: is empty"),
        ("a", 0.0, "auto", "--limit 0: give"),
        ("a", None, "0", "--batch-size 0: give"),
        ("a", None, "many", "--batch-size many: give"),
    ],
)
def test_wrong_options(names, limit, batch_size, message):
    with pytest.raises(EloError, match=message):
        benchmark_tasks(names, None, None, limit, batch_size, None)
