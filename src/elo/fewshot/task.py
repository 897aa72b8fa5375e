"""Read a labelled task from files, and draw a few examples from it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elo.data.json_lines import read_json_lines
from elo.errors import EloError

DEFAULT_TEMPLATE = "{text}\nLabel:"


@dataclass(frozen=True)
class Example:
    """A text with the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task and the layout of its prompts.

    Attributes:
        train_file, test_file: paths of the files that `train` and `test` were read from.
        labels: names of the labels in the files.
        words: word for each label in prompts and predictions.
        train: examples to draw from.
        test: items to predict.
        template: text in front of a label's word; contains `{text}`.
        instruction: text at the start of the prompt, except with sft.
    """

    train_file: str
    test_file: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    template: str
    instruction: str

    def prompt(self, example: Example) -> str:
        """Return the text in front of the label's word."""
        return self.template.replace("{text}", example.text)


def read_task(
    train: str | Path,
    test: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "label",
    words: Mapping[str, str] | None = None,
    template: str = DEFAULT_TEMPLATE,
    instruction: str | None = None,
    limit: int | None = None,
) -> Task:
    """Read a labelled task from JSON lines.

    Args:
        train: file that examples are drawn from.
        test: file of the items to predict.
        text_field: key of the text.
        label_field: key of the label.
        words: word by label; by default the label itself.
        template: text in front of the label's word; must contain `{text}`.
        instruction: text at the start of the prompt; by default, a sentence that lists the words.
        limit: number of items of `test` to keep, drawn at random but the same in every call; None keeps all.

    Raises:
        EloError: a file cannot be read or a line has another form (the message names `file:line`), or a word or the
            template is invalid.
    """
    read = [_read_lines(path, text_field, label_field) for path in (train, test)]
    labels = sorted({label for _, label, _ in read[0]})
    if len(labels) < 2:
        raise EloError(f"{train}: has only the label {labels[0]!r}; add examples of at least one other label")
    for _, label, where in read[1]:
        if label not in labels:
            raise EloError(f"{where}: label {label!r} is not in {train}; use one of {', '.join(labels)}")
    words = words or {}
    if unknown := [label for label in words if label not in labels]:
        raise EloError(f"--word {unknown[0]}: {train} has no such label; use one of {', '.join(labels)}")
    if "{text}" not in template:
        raise EloError(f"--template {template!r}: contains no {{text}}; write for example {DEFAULT_TEMPLATE!r}")
    shown = [words.get(label, label) for label in labels]
    if len(set(shown)) < len(shown):
        raise EloError(f"--word: two labels have the same word ({', '.join(shown)}); give each its own")
    if instruction is None:
        instruction = f"Label each text with one of: {', '.join(shown)}."
    sets = [tuple(Example(text, labels.index(label)) for text, label, _ in lines) for lines in read]
    # Files are often sorted by label, so the first items would not represent the task.
    items = sets[1] if limit is None or limit >= len(sets[1]) else tuple(random.Random(0).sample(sets[1], limit))
    return Task(str(train), str(test), tuple(labels), tuple(shown), sets[0], items, template, instruction)


def _read_lines(path: str | Path, text_field: str, label_field: str) -> list[tuple[str, str, str]]:
    """Return the text, the label and `file:line` of every line."""
    found = []
    for where, value in read_json_lines(path, "examples"):
        if not isinstance(value, dict):
            raise EloError(f"{where}: expected an object, got {type(value).__name__}")
        for key, option in ((text_field, "--text-field"), (label_field, "--label-field")):
            if not isinstance(value.get(key), str | int) or not str(value[key]).strip():
                raise EloError(f"{where}: has no {key!r}; it has {', '.join(value)}; give the right key with {option}")
        found.append((str(value[text_field]).strip(), str(value[label_field]), where))
    return found


def draw_examples(task: Task, count: int, seed: int) -> list[Example]:
    """Draw training examples evenly over the labels, in random order. A larger draw contains a smaller one."""
    draw = random.Random(seed)
    by_label: dict[int, list[Example]] = {}
    for example in draw.sample(task.train, len(task.train)):
        by_label.setdefault(example.label, []).append(example)
    turns = [each for turn in range(len(task.train)) for group in by_label.values() for each in group[turn : turn + 1]]
    return draw.sample(turns[:count], count)
