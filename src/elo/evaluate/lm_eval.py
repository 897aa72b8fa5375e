"""Benchmarks of lm-evaluation-harness (extra `eval`), run on the model in memory.

Values equal those of lm-eval's own command line with the same model, dtype, tasks and batch size (docs/evaluation.md).
"""

import difflib
import importlib.util
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elo.data.tokenizer import TextTokenizer, load_with_settings
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, register
from elo.evaluate.scoring import evaluating
from elo.store.files import write_text

_METRICS = ("acc", "acc_norm")
_MAX_REASON = 200


@register
class Tasks(Measure):
    """Run benchmark tasks of lm-evaluation-harness: accuracy and normalised accuracy (extra `eval`)."""

    name: ClassVar[str] = "tasks"
    short_form: ClassVar[str] = "list of text or section"

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks, groups and tags of lm-eval; `ko=kobest` reports it under the language `ko`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in front of each question; null: as each task sets it."""
    limit: float | None = Field(None, gt=0)
    """Use only the first questions of each task: a number of them, or a share below 1."""
    batch_size: int | Literal["auto"] = "auto"
    """Sequences in a forward pass; `auto`: as many as fit on a GPU, 1 on a CPU."""
    include_path: str | None = None
    """Folder with task files (.yaml) of your own."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        return {"names": value} if isinstance(value, list) else value

    @property
    def languages(self) -> dict[str, str]:
        """Language by task; empty where none is given."""
        pairs = [name.rpartition("=") for name in self.names]
        return {task: language for language, _, task in pairs}

    def files(self) -> list[Path]:
        return [Path(self.include_path)] if self.include_path else []

    def check(self, where: str) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise EloError(f"{where}: lm-eval is not installed; run: pip install 'elo-cpt[eval]'")
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
                self._load(task, where)

    def measure(self, subject: Subject) -> Outcome:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        batch_size: Any = self.batch_size
        if batch_size == "auto" and subject.model.device.type == "cpu":
            batch_size = 1
        # lm-eval seeds the global generators, which nothing that follows may depend on.
        with _quiet(show_progress=subject.progress), _own_random_state(), evaluating(subject.model):
            loaded = {task: self._load(task, self.name) for task in self.languages}
            built = [each for group in loaded.values() for each in group]
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
                    lm, tasks=built, num_fewshot=self.num_fewshot, batch_size=batch_size, limit=limit, log_samples=False
                )
            except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as error:
                raise EloError(f"{self.name}: {', '.join(loaded)}: lm-eval stopped ({_reason(error)})") from None
            except Exception as error:
                if type(error).__module__.split(".")[0] != "jinja2":
                    raise
                raise EloError(
                    f"{self.name}: {', '.join(loaded)}: an item lacks a field that the task's YAML uses "
                    f"({_reason(error)})"
                ) from None
        if subject.files is not None:
            from lm_eval.utils import handle_non_serializable

            path = subject.files.with_name(f"{subject.files.name}.lm_eval.json")
            write_text(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
        return Outcome([value for task in loaded for value in self._values(task, loaded[task], results)])

    def _manager(self) -> Any:
        """Only the tasks of `include_path` if they suffice, because lm-eval takes long to read its thousands."""
        own = _manager(self.include_path, defaults=False) if self.include_path else None
        if own is not None and all(task in own.all_tasks and task not in own.all_groups for task in self.languages):
            return own
        return _manager(self.include_path)

    def _load(self, task: str, where: str) -> list[Any]:
        """The tasks or the group of this name, with their data."""
        try:
            built = self._manager()._load_spec(task)
        except Exception as error:  # whatever a task's own code and data set raise
            data = ", ".join(sorted(_data_sets(task, self._manager()))) or "unknown"
            if isinstance(error, OSError):  # ConnectionError and DatasetNotFoundError are of this kind
                raise EloError(
                    f"{where}: task {task}: its data set {data} cannot be loaded ({_reason(error)}); connect to the "
                    "Hugging Face hub once, or write a task over local files (docs/evaluation.md)"
                ) from None
            raise EloError(f"{where}: task {task}: cannot be built from data set {data} ({_reason(error)})") from None
        return built if isinstance(built, list) else [built]

    def _values(self, task: str, built: Sequence[Any], results: dict[str, Any]) -> Iterator[MeasureValue]:
        for each in built:
            leaves = each.get_all_tasks() if hasattr(each, "get_all_tasks") else [each]
            name = each.name if hasattr(each, "get_all_tasks") else each.task_name
            chances = [chance for leaf in leaves if (chance := _chance(leaf)) is not None]
            found = [(name, "all", fmean(chances) if len(chances) == len(leaves) else None)]
            if leaves != [each]:
                found += [(leaf.task_name, leaf.task_name, _chance(leaf)) for leaf in leaves]
            for result, subset, chance in found:
                values = results["results"].get(result, {}) | results.get("groups", {}).get(result, {})
                items = values.get("sample_len") or sum(
                    results["n-samples"][leaf.task_name]["effective"] for leaf in leaves
                )
                for metric in _METRICS:
                    if not isinstance(value := values.get(f"{metric},none"), int | float):
                        continue
                    error = values.get(f"{metric}_stderr,none")
                    yield MeasureValue(
                        measure=f"{name} {metric}",
                        name=subset,
                        language=self.languages[task],
                        value=value,
                        standard_error=error if isinstance(error, int | float) else None,
                        items=items,
                        chance=chance,
                    )


def benchmark_tasks(
    names: str, num_fewshot: int | None, limit: float | None, batch_size: str, include_path: Path | None
) -> Tasks:
    """The measure that options of the command line ask for.

    Raises:
        EloError: an option has a wrong value.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise EloError("--tasks: names no task; give tasks joined by commas")
    if limit is not None and not limit > 0:
        raise EloError(f"--limit {limit:g}: give a number of questions, or a share between 0 and 1")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise EloError(f"--batch-size {batch_size}: give a number of sequences, or auto")
    return Tasks(
        names=tuple(listed),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
        include_path=None if include_path is None else str(include_path),
    )


@cache
def _manager(include_path: str | None, *, defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _data_sets(task: str, manager: Any) -> set[str]:
    """Data sets that a task, or a member of a group or tag, is made from."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager._entry(task)
    if entry is None:
        return set()
    found = {each for member in entry.tags if entry.yaml_path is None for each in _data_sets(member, manager)}
    if entry.yaml_path is not None:
        config = load_yaml(entry.yaml_path, resolve_func=False)
        if "dataset_path" in config:
            files = (config.get("dataset_kwargs") or {}).get("data_files")
            found.add(
                f"{config['dataset_path']} {json.dumps(files, ensure_ascii=False)}" if files else config["dataset_path"]
            )
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            found |= _data_sets(member if isinstance(member, str) else str(member.get("task")), manager)
    return found


def _chance(task: Any) -> float | None:
    """Expected accuracy of guessing: the mean of 1 / choices; None where questions have no choices."""
    if task.OUTPUT_TYPE != "multiple_choice" or not task.instances:
        return None
    return fmean(1 / choices for choices in Counter(instance.doc_id for instance in task.instances).values())


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


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MAX_REASON]}"


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put the states of all global random generators back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet(*, show_progress: bool = False) -> Iterator[None]:
    """Within, lm-eval logs errors alone and, unless `show_progress`, draws no progress bars."""
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
