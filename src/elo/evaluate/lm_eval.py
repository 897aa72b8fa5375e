"""Benchmarks of lm-evaluation-harness (extra `eval`), run on the model in memory.

Values equal those of lm-eval's own command line with the same model, dtype, tasks and batch size (docs/evaluation.md).
"""

import difflib
import importlib.metadata
import importlib.util
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jinja2 import Environment, TemplateError, meta
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elo.data.json_lines import read_json_lines
from elo.data.tokenizer import TextTokenizer, load_with_settings
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, mean_error, register, weighted
from elo.evaluate.scoring import evaluating, keeps_apart, longest_sequence
from elo.store.files import read_json, sha256_json, write_text
from elo.store.run_folder import file_identity

SUITES = {
    "ar": ("arabicmmlu", "belebele_arb_Arab", "hellaswag_ar", "arc_ar", "xnli_ar", "xstorycloze_ar"),
    "de": ("m_mmlu_de", "belebele_deu_Latn", "hellaswag_de", "arc_de", "xnli_de", "paws_de"),
    "en": ("mmlu", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "piqa"),
    "es": ("m_mmlu_es", "belebele_spa_Latn", "hellaswag_es", "arc_es", "xnli_es", "xstorycloze_es"),
    "eu": ("eus_proficiency", "eus_reading", "eus_trivia", "belebele_eus_Latn", "xcopa_eu", "xstorycloze_eu"),
    "fr": ("m_mmlu_fr", "belebele_fra_Latn", "hellaswag_fr", "arc_fr", "xnli_fr", "xwinograd_fr"),
    "hi": ("m_mmlu_hi", "belebele_hin_Deva", "hellaswag_hi", "arc_hi", "xnli_hi", "xstorycloze_hi"),
    "id": ("m_mmlu_id", "belebele_ind_Latn", "hellaswag_id", "arc_id", "xcopa_id", "xstorycloze_id"),
    "ja": (
        "global_mmlu_ja",
        "belebele_jpn_Jpan",
        "ja_leaderboard_jcommonsenseqa",
        "ja_leaderboard_jnli",
        "ja_leaderboard_marc_ja",
        "ja_leaderboard_xwinograd",
    ),
    "ko": ("kobest", "kmmlu", "haerae", "belebele_kor_Hang", "global_mmlu_ko", "paws_ko"),
    "ru": ("m_mmlu_ru", "belebele_rus_Cyrl", "hellaswag_ru", "arc_ru", "xnli_ru", "xstorycloze_ru"),
    "sw": ("global_mmlu_sw", "belebele_swh_Latn", "xcopa_sw", "xnli_sw", "xstorycloze_sw"),
    "th": ("belebele_tha_Thai", "xcopa_th", "xnli_th"),
    "tr": ("global_mmlu_full_tr", "belebele_tur_Latn", "xcopa_tr", "xnli_tr"),
    "vi": ("m_mmlu_vi", "belebele_vie_Latn", "hellaswag_vi", "arc_vi", "xcopa_vi", "xnli_vi"),
    "zh": ("cmmlu", "ceval-valid", "belebele_zho_Hans", "xcopa_zh", "xstorycloze_zh", "xwinograd_zh"),
}
"""Tasks of lm-eval that papers report, by language. All are multiple choice; groups have one value for all subtasks."""

_METRICS = ("acc", "acc_norm")
_MAX_REASON = 200


@register
class Tasks(Measure):
    """Run benchmark tasks of lm-evaluation-harness: accuracy, and the margin of the right answer (extra `eval`)."""

    name: ClassVar[str] = "tasks"
    short_form: ClassVar[str] = "list of text or section"

    names: tuple[str, ...] = ()
    """Tasks, groups and tags of lm-eval; `ko=kobest` reports it under the language `ko`."""
    suites: tuple[str, ...] = ()
    """Languages whose common tasks are added, such as `ko`; `korean=ko` reports them under `korean`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Number of examples before each question; null takes the task's own number."""
    limit: float | None = Field(None, gt=0)
    """Use only the first questions of each task: a number of them, or a share below 1."""
    batch_size: int | Literal["auto"] = "auto"
    """Sequences per forward pass. `auto` takes as many as fit on a GPU, and 1 on a CPU or if padding changes values."""
    include_path: str | None = None
    """Folder with your own task files (.yaml)."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        return {"names": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _some(self) -> "Tasks":
        if not self.names and not self.suites:
            raise ValueError("names no task; write names, suites or both")
        return self

    @property
    def languages(self) -> dict[str, str]:
        """Language by task; empty if none is given."""
        suites = [suite.rpartition("=") for suite in self.suites]
        found = {task: language or suite for language, _, suite in suites for task in SUITES.get(suite, ())}
        return found | {task: language for language, _, task in (name.rpartition("=") for name in self.names)}

    def files(self) -> list[Path]:
        return [Path(self.include_path)] if self.include_path else []

    def check(self, where: str) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise EloError(f"{where}: lm-eval is not installed; run: pip install 'elo-cpt[eval]'")
        for suite in self.suites:
            if suite.rpartition("=")[2] not in SUITES:
                raise EloError(f"{where}: there is no suite {suite!r}; choose from {', '.join(SUITES)}, or name tasks")
        if self.include_path and not Path(self.include_path).is_dir():
            raise EloError(f"{where}: include_path: {self.include_path}: no such folder; give the folder of task files")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise EloError(f"{where}: batch_size: must be at least 1, or auto; got {self.batch_size}")
        with _quiet():
            known = self._manager().all_tasks
            for task in self.languages:
                if task not in known:
                    close = difflib.get_close_matches(task, known, 3, 0.6)
                    hint = f"did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks lists all"
                    raise EloError(f"{where}: there is no task {task!r}; {hint}")
            for task in self.languages:
                for config in _task_files(task, self._manager()):
                    _check_items(config, f"{where}: task {config.get('task')}")
                self._load(task, where)

    def measure(self, subject: Subject) -> Outcome:
        # lm-eval seeds the global random generators, and later results must not depend on that.
        with _quiet(show_progress=subject.progress), _restored_random_state(), evaluating(subject.model):
            finished = [self._finish(task, subject) for task in self.languages]
        if subject.files is not None:
            merged: dict[str, Any] = {}
            for each in finished:
                for key, value in each["results"].items():
                    merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
            _write(subject.files.with_name(f"{subject.files.name}.lm_eval.json"), merged)
        return Outcome([MeasureValue.model_validate(value) for each in finished for value in each["values"]])

    def _finish(self, task: str, subject: Subject) -> dict[str, Any]:
        """Return values and lm-eval's results of a task, from `subject.finished` if it was measured before."""
        if subject.finished is None:
            return self._run(task, subject)
        model = subject.model
        key = {
            "task": task,
            "settings": self.model_dump(mode="json", exclude={"names", "suites"}) | {"language": self.languages[task]},
            "files": [file_identity(path) for path in self.files()],
            "model": [subject.identity, str(model.dtype), model.device.type],
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        path = subject.finished / f"{sha256_json(key)[:16]}.json"
        if path.is_file():
            return dict(read_json(path))
        found = self._run(task, subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, found)
        return found

    def _run(self, task: str, subject: Subject) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import handle_non_serializable

        batch_size: Any = self.batch_size
        apart = keeps_apart(subject.model, longest_sequence(subject.model) or 0)
        if batch_size == "auto" and (subject.model.device.type == "cpu" or not apart):
            batch_size = 1
        built = self._load(task, self.name)
        lm = HFLM(
            pretrained=subject.model,
            backend="causal",
            tokenizer=_tokenizer(subject),
            batch_size=batch_size,
            trust_remote_code=subject.trust_remote_code,
        )
        limit = int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit
        try:
            results: Any = simple_evaluate(
                lm,
                tasks=built,
                num_fewshot=self.num_fewshot,
                batch_size=batch_size,
                limit=limit,
                log_samples=True,
                task_manager=self._manager(),  # otherwise lm-eval reads the files of all its tasks again
            )
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as error:
            raise EloError(f"{self.name}: {task}: lm-eval stopped ({_reason(error)})") from None
        except Exception as error:
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            raise EloError(
                f"{self.name}: {task}: an item lacks a field that the task's YAML uses ({_reason(error)})"
            ) from None
        values = [value.model_dump(mode="json") for each in built for value in self._values(task, each, results)]
        del results["samples"]
        return {"values": values, "results": json.loads(json.dumps(results, default=handle_non_serializable))}

    def _manager(self) -> Any:
        """Return lm-eval's task manager, without its own tasks, which load slowly, if `include_path` has all names."""
        own = _manager(self.include_path, defaults=False) if self.include_path else None
        if own is not None and all(_is_known(task, own) for task in self.languages):
            return own
        return _manager(self.include_path)

    def _load(self, task: str, where: str) -> list[Any]:
        """Return the tasks or the group of this name, with their data."""
        try:
            built = self._manager()._load_spec(task)
        except Exception as error:  # a task's code and its data set can raise any type
            data = _data_sets(task, self._manager())
            if isinstance(error, OSError):  # also ConnectionError and DatasetNotFoundError
                raise EloError(
                    f"{where}: task {task}: its data set {data} cannot be loaded ({_reason(error)}); connect to the "
                    "Hugging Face hub once, or write a task over local files (docs/evaluation.md)"
                ) from None
            raise EloError(f"{where}: task {task}: cannot be built from data set {data} ({_reason(error)})") from None
        return built if isinstance(built, list) else [built]

    def _values(self, task: str, built: Any, results: dict[str, Any]) -> Iterator[MeasureValue]:
        """Yield the values of a task; for a group, those of the whole and of each subtask. Only the whole has items."""
        is_group = hasattr(built, "get_all_tasks")
        leaves = built.get_all_tasks() if is_group else [built]
        name = built.name if is_group else built.task_name
        chances = [_chance(leaf) for leaf in leaves]
        known = [chance for chance in chances if chance is not None]
        value = partial(MeasureValue, language=self.languages[task])
        found = [(name, "all", leaves, fmean(known) if len(known) == len(leaves) else None)]
        if is_group:
            found += [
                (leaf.task_name, leaf.task_name, [leaf], chance) for leaf, chance in zip(leaves, chances, strict=True)
            ]
        for result, subset, members, chance in found:
            values = results["results"].get(result, {}) | results.get("groups", {}).get(result, {})
            samples = [results["samples"][member.task_name] for member in members]
            for metric in _METRICS:
                if not isinstance(average := values.get(f"{metric},none"), int | float):
                    continue
                error = values.get(f"{metric}_stderr,none")
                items = [[float(sample[metric]) for sample in each if metric in sample] for each in samples]
                yield value(
                    measure=f"{name} {metric}",
                    name=subset,
                    value=average,
                    standard_error=error if isinstance(error, int | float) else None,
                    items=sum(map(len, items)),
                    chance=chance,
                    per_item=weighted(items, average) if subset == "all" else (),
                )
            margins = [_margin(leaf, sample) for leaf, each in zip(members, samples, strict=True) for sample in each]
            of_items = [margin for margin in margins if margin is not None]
            if of_items and len(of_items) == len(margins):
                yield value(
                    measure=f"{name} margin",
                    name=subset,
                    value=fmean(of_items),
                    unit="number",
                    standard_error=mean_error(of_items),
                    items=len(of_items),
                    is_detail=True,
                    per_item=tuple(round(margin, 5) for margin in of_items) if subset == "all" else (),
                )


def benchmark_tasks(
    names: str | None,
    suites: str | None,
    num_fewshot: int | None,
    limit: float | None,
    batch_size: str,
    include_path: Path | None,
) -> Tasks:
    """Return the measure for the options of the command line.

    Raises:
        EloError: an option has a wrong value.
    """
    given = {"--tasks": names, "--suite": suites}
    listed = {key: [name.strip() for name in (text or "").split(",") if name.strip()] for key, text in given.items()}
    for key, text in given.items():
        if text is not None and not listed[key]:
            raise EloError(f"{key}: is empty; give names joined by commas")
    if limit is not None and not limit > 0:
        raise EloError(f"--limit {limit:g}: give a number of questions, or a share between 0 and 1")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise EloError(f"--batch-size {batch_size}: give a number of sequences, or auto")
    return Tasks(
        names=tuple(listed["--tasks"]),
        suites=tuple(listed["--suite"]),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
        include_path=None if include_path is None else str(include_path),
    )


@cache
def _manager(include_path: str | None, *, defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _is_known(task: str, manager: Any) -> bool:
    """Return whether `manager` has this task and, for a group, every member."""
    entry = manager._entry(task)
    members = (entry.cfg or {}).get("task") if entry is not None else None
    inside = [member for member in members if isinstance(member, str)] if isinstance(members, list) else []
    return entry is not None and all(_is_known(member, manager) for member in inside)


def _task_files(task: str, manager: Any) -> Iterator[dict[str, Any]]:
    """Yield the content of the YAML file of a task, or of all members of a group or tag."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager._entry(task)
    if entry is None:
        return
    if entry.yaml_path is None:
        for member in entry.tags:
            yield from _task_files(member, manager)
        return
    config = load_yaml(entry.yaml_path, resolve_func=False)
    yield config
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        yield from _task_files(member if isinstance(member, str) else str(member.get("task")), manager)


def _data_sets(task: str, manager: Any) -> str:
    """Return the data sets of a task, or of all members of a group or tag, for messages."""
    found = set()
    for config in _task_files(task, manager):
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if name := config.get("dataset_path"):
            found.add(f"{name} {json.dumps(files, ensure_ascii=False)}" if files else str(name))
    return ", ".join(sorted(found)) or "unknown"


def _check_items(config: dict[str, Any], where: str) -> None:
    """Raise EloError for the first item of a task's local JSON lines that lacks a field which its templates use.

    `datasets` fills a field that other items have with null, which a template would spell as None.
    """
    if config.get("dataset_path") != "json" or "process_docs" in config:  # which may add fields
        return
    templates = (config.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target"))
    fields = {field for each in templates if isinstance(each, str) for field in _fields(each)}
    files = (config.get("dataset_kwargs") or {}).get("data_files") or ()
    given = files.values() if isinstance(files, dict) else [files]
    for path in (path for each in given for path in (each if isinstance(each, list | tuple) else [each])):
        if not str(path).endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) or not Path(path).is_file():
            continue
        for at, item in read_json_lines(path, "items"):
            if not isinstance(item, dict):
                raise EloError(f"{where}: {at}: is no object; write an object with the fields of the task file")
            if missing := sorted(fields - item.keys()):
                raise EloError(
                    f"{where}: {at}: has no field {missing[0]!r}, which the task file uses; it has {', '.join(item)}; "
                    "add the field, with null if the item has none"
                )


def _fields(template: str) -> set[str]:
    """Return the fields of an item that a Jinja template uses."""
    environment = Environment()
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except TemplateError:
        return set()  # lm-eval reports it


def _chance(task: Any) -> float | None:
    """Return the expected accuracy of guessing, the mean of 1 / choices; None if questions have no choices."""
    if task.OUTPUT_TYPE != "multiple_choice" or not task.instances:
        return None
    return fmean(1 / choices for choices in Counter(instance.doc_id for instance in task.instances).values())


def _margin(task: Any, sample: dict[str, Any]) -> float | None:
    """Return the margin: log-likelihood of the right choice minus that of the most likely wrong one, in nats per byte.

    None if the task has no choices or the right one is unknown.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return None
    choices = task.doc_to_choice(sample["doc"])
    gold = task.doc_to_text(sample["doc"]) if getattr(task, "multiple_input", False) else sample["target"]
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(choices) < 2:
        return None
    asked = zip(sample["filtered_resps"], sample["arguments"], strict=True)
    nats = [response[0] / max(1, len(argument[1].encode())) for response, argument in asked][: len(choices)]
    return float(nats[gold] - max(nats[:gold] + nats[gold + 1 :]))


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    source = subject.tokenizer_source
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if isinstance(source, TextTokenizer):
        backend = source.backend
        prefix, end = (backend.id_to_token(index) for index in (source.prefix_token_id, source.eos_token_id))
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=prefix, eos_token=end)
    assert source is not None
    tokenizer: PreTrainedTokenizerBase = load_with_settings(source, subject.trust_remote_code)[0]
    return tokenizer


def _write(path: Path, value: Any) -> None:
    """Write JSON as lm-eval does, with NaN for values that it could not compute."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MAX_REASON]}"


@contextmanager
def _restored_random_state() -> Iterator[None]:
    """Restore the states of all global random generators at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet(*, show_progress: bool = False) -> Iterator[None]:
    """Let lm-eval log errors only and, unless `show_progress`, draw no progress bars."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "huggingface_hub")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if show_progress:
            yield
        else:
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
