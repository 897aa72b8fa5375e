"""Cloze accuracy: how often the model gives the true continuation of a prompt the highest probability."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from elo.data.json_lines import read_json_lines
from elo.data.packing import IGNORE_INDEX
from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Outcome, Subject, share_error
from elo.evaluate.scoring import check_ids, evaluating, longest_sequence, summed_nats
from elo.log import Progress


@dataclass(frozen=True)
class ClozeItem:
    """A question: which of `choices` continues `prompt`. A choice includes a leading space if it needs one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Index of the true choice."""
    group: str | None = None
    """Group whose accuracy is also reported; None if the item has none."""


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy on the items of a group."""

    accuracy: float
    """Share of items answered correctly, from 0 to 1."""
    items: int
    """Number of items."""


@dataclass(frozen=True)
class ClozeAccuracy:
    """The share of items whose true choice has the highest summed log-probability given the prompt.

    Log-probabilities are summed, not averaged over tokens or characters, so the choices of an item should have similar
    lengths. A choice may merge with the last token of the prompt. All choices of an item are therefore scored from the
    first token at which any of them departs from the tokens of the prompt. Of equally likely choices the first counts.
    """

    accuracy: float
    """Share of items answered correctly, from 0 to 1."""
    items: int
    """Number of items."""
    chance: float
    """Expected accuracy of guessing: the mean of 1 / choices."""
    predictions: tuple[int, ...]
    """Index of the most likely choice of each item."""
    groups: dict[str, GroupAccuracy]
    """Accuracy by group, in the order of the items; empty if no item has a group."""


class Cloze(Measure):
    """Cloze accuracy by language, of all items and of each group of them."""

    name: ClassVar[str] = "cloze"
    given: dict[str, Any]
    """Items by language, or the JSON-lines file that holds them."""

    @cached_property
    def items(self) -> dict[str, Sequence[ClozeItem]]:
        """Items by language; files are read once."""
        return {
            language: read_cloze(each) if isinstance(each, str | Path) else each
            for language, each in self.given.items()
        }

    def check(self, where: str) -> None:
        assert self.items is not None

    def measure(self, subject: Subject) -> Outcome:
        values, record = [], {}
        for language, items in self.items.items():
            label = f"cloze {language}" if subject.progress else None
            score = cloze_accuracy(
                subject.model, subject.text_tokenizer, items, batch_size=subject.batch_size, progress=label
            )
            groups = {name: asdict(group) for name, group in score.groups.items()}
            whole = {"accuracy": score.accuracy, "items": score.items}
            right = tuple(float(mine == item.answer) for mine, item in zip(score.predictions, items, strict=True))
            record[language] = {**whole, "chance": score.chance, "groups": groups}
            values += [
                MeasureValue(
                    measure="cloze",
                    name=name,
                    language=language,
                    value=group["accuracy"],
                    standard_error=share_error(group["accuracy"], group["items"]),
                    items=group["items"],
                    chance=score.chance,
                    per_item=right if name == "all" else (),
                )
                for name, group in {"all": whole, **groups}.items()
            ]
        return Outcome(values, {"cloze": record})


def read_cloze(path: str | Path) -> list[ClozeItem]:
    """Read items from JSON lines: {"prompt": str, "choices": [str, ...], "answer": int, "group": str (optional)}.

    Other keys are ignored.

    Raises:
        EloError: the file cannot be read or has no item, or a line is not an item (the message names `file:line`).
    """
    return [_item(value, where) for where, value in read_json_lines(path, "cloze items")]


def cloze_accuracy(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    items: Sequence[ClozeItem],
    *,
    batch_size: int | None = None,
    progress: str | None = None,
) -> ClozeAccuracy:
    """Measure the cloze accuracy of `model`; see `ClozeAccuracy` for the definition.

    A sequence is laid out as in training: the prefix token, then the text. A prompt that is too long for the model
    loses its beginning.

    Args:
        model: any causal LM, in any mode and dtype; it is not changed.
        items: items to measure on; at least one.
        batch_size: choices per forward pass; by default as many as keep fp32 logits within 1 GiB.
        progress: label of the progress bar; None shows none.

    Raises:
        EloError: there are no items, or a choice does not fit the model's positions or vocabulary.
    """
    if not items:
        raise EloError("cloze: there are no items; give at least one")
    limit = longest_sequence(model)
    choices = [choice for item in items for choice in _encoded_choices(item, tokenizer, limit)]
    check_ids(max(max(ids) for ids, _ in choices), model, "cloze items")
    rows = [(ids[:-1], [IGNORE_INDEX] * (len(ids) - 1 - scored) + ids[-scored:]) for ids, scored in choices]
    with evaluating(model) as place, Progress(len(rows), progress, "choices") as bar:
        costs = iter(summed_nats(model, rows, place, bar, batch_size))
    nats = [[next(costs) for _ in item.choices] for item in items]
    predictions = tuple(min(range(len(costs)), key=costs.__getitem__) for costs in nats)
    right = [prediction == item.answer for prediction, item in zip(predictions, items, strict=True)]
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return ClozeAccuracy(sum(right) / len(items), len(items), chance, predictions, _by_group(items, right))


def _by_group(items: Sequence[ClozeItem], right: Sequence[bool]) -> dict[str, GroupAccuracy]:
    answered: dict[str, list[bool]] = {}
    for item, is_right in zip(items, right, strict=True):
        if item.group is not None:
            answered.setdefault(item.group, []).append(is_right)
    return {name: GroupAccuracy(sum(each) / len(each), len(each)) for name, each in answered.items()}


def _encoded_choices(item: ClozeItem, tokenizer: TextTokenizer, limit: int | None) -> list[tuple[list[int], int]]:
    """Return the token ids of the prompt with each choice, and how many of them, at the end, are scored."""
    texts = [item.prompt, *(item.prompt + choice for choice in item.choices)]
    prompt, *wholes = (ids.tolist() for ids in tokenizer.encode_batch(texts))
    # At least one token of each choice is scored, also if all of its tokens are part of the prompt's.
    shared = min(min(_common_prefix(prompt, whole), len(whole) - 1) for whole in wholes)
    found = []
    for choice, whole in enumerate(wholes):
        scored = len(whole) - shared
        ids = [tokenizer.prefix_token_id, *whole]
        if limit is not None:
            if scored > limit:
                raise EloError(
                    f"cloze: choice {choice} of {item.prompt[:60]!r} has {scored} tokens, but the model has {limit} "
                    "positions; shorten it"
                )
            ids = ids[-(limit + 1) :]
        found.append((ids, scored))
    return found


def _common_prefix(left: list[int], right: list[int]) -> int:
    for length, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return length
    return min(len(left), len(right))


def _item(value: Any, where: str) -> ClozeItem:
    if not isinstance(value, dict):
        raise EloError(f'{where}: expected an object {{"prompt", "choices", "answer"}}, got {type(value).__name__}')
    prompt, choices, answer = value.get("prompt"), value.get("choices"), value.get("answer")
    if not isinstance(prompt, str):
        raise EloError(f'{where}: "prompt" must be a string, got {prompt!r}')
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise EloError(f'{where}: "choices" must be a list of non-empty strings, got {choices!r}')
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise EloError(f'{where}: "choices" must hold at least two, all different, got {choices!r}')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise EloError(f'{where}: "answer" must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r}')
    group = value.get("group")
    if group is not None and (not isinstance(group, str) or not group.strip()):
        raise EloError(f'{where}: "group" must be a non-empty string where there is one, got {group!r}')
    return ClozeItem(prompt, tuple(choices), answer, group)
