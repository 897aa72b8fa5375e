"""Compare ways to use a few labelled examples: in the prompt or in training (`elo fewshot`; arXiv 2403.01929).

- in-context: the prompt contains the instruction and then the examples.
- sft: low-rank adapters are trained on the labels of the examples.
- instruction: like sft, with the instruction in front of each example.

The prediction is the label whose word is the most likely continuation, by summed log-likelihood. Adapters are removed
after each measurement, so that every measurement starts from the same model.
"""

import copy
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from elo.checkpoint.counting import footprint
from elo.data.packing import IGNORE_INDEX
from elo.data.tokenizer import TextTokenizer, load_tokenizer
from elo.errors import EloError
from elo.evaluate.base import mean_error, share_error
from elo.evaluate.loading import load_model
from elo.evaluate.scoring import (
    embedding_weight,
    evaluating,
    longest_sequence,
    right_padded,
    rope_limit,
    vocabulary_size,
)
from elo.fewshot.table import render
from elo.fewshot.task import Example, Task, draw_examples
from elo.log import Progress
from elo.methods import Setup
from elo.methods.lora import Lora
from elo.report.statistics import estimate_items
from elo.store.environment import environment
from elo.store.files import write_json
from elo.store.remote import output_file
from elo.train.prepared import Prepared

WAYS = ("in-context", "sft", "instruction")


@dataclass(frozen=True)
class Training:
    """Training settings of the adapters; `epochs` counts passes over the examples."""

    epochs: int = 10
    learning_rate: float = 5e-4
    batch_size: int = 4
    rank: int = 16


@dataclass
class Cell:
    """Measurements of one way with one number of examples. Lists have one entry per seed.

    Attributes:
        right: 1.0 or 0.0 for each item, by whether its label was predicted.
        used: number of examples that fit into the prompt.
        train_tokens: number of tokens computed in training, including padding.
        test_tokens: number of tokens computed for all items.
    """

    way: str
    examples: int
    right: list[list[float]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    train_tokens: list[int] = field(default_factory=list)
    train_cpu_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    test_tokens: list[int] = field(default_factory=list)
    test_cpu_seconds: list[float] = field(default_factory=list)
    test_seconds: list[float] = field(default_factory=list)


def few_shot(
    model: str | Path,
    task: Task,
    *,
    ways: Sequence[str] = WAYS,
    examples: Sequence[int] = (8, 32),
    seeds: Sequence[int] = (1, 2, 3),
    training: Training | None = None,
    tokenizer: str | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare in-context learning, SFT and instruction tuning on a labelled task.

    Args:
        model: checkpoint folder or hub id.
        task: task and the layout of its items (`read_task`).
        ways: ways to compare, from `WAYS`.
        examples: numbers of examples, drawn evenly over the labels. 0 is measured in-context only.
        seeds: seeds of the drawn examples, their order and the adapters.
        training: settings of the adapters' training; None uses the defaults.
        tokenizer: folder or hub id; by default the model's.
        output: JSON file to write.
        device: by default cuda if it is available, otherwise cpu.
        trust_remote_code: run code that ships with the checkpoint.
        progress: show progress and a table.

    Returns:
        The results, as written to `output`; docs/fewshot.md has an example.

    Raises:
        EloError: an argument is wrong, or the task does not fit the model.
    """
    training = training or Training()
    target = output_file(output)
    _check(task, ways, examples, seeds, training)
    encoder = load_tokenizer(tokenizer or model, trust_remote_code)
    loaded = load_model(str(model), device=device, trust_remote_code=trust_remote_code)
    encoder.check_embedding(vocabulary_size(loaded), str(model))
    cells = [Cell(way, count) for way in ways for count in sorted(set(examples)) if count or way == "in-context"]
    label = "few-shot" if progress else None
    with Progress(len(cells) * len(seeds), label, "measurements") as bar:
        for cell in cells:
            for seed in seeds:
                _measure(cell, seed, loaded, encoder, task, training)
                bar.advance(1)
    results = {
        "schema": 1,
        "kind": "few_shot",
        "model": str(model),
        "task": {
            "train": task.train_file,
            "test": task.test_file,
            "items": len(task.test),
            "labels": dict(zip(task.labels, task.words, strict=True)),
            "majority": max(Counter(each.label for each in task.test).values()) / len(task.test),
            "template": task.template,
            "instruction": task.instruction,
        },
        "training": asdict(training),
        "seeds": list(seeds),
        **environment(),
        "rows": [_result_row(cell, loaded, training) for cell in cells],
        "differences": _differences(cells),
    }
    if target is not None:
        write_json(target, results)
    if progress:
        Console(width=max(118, Console().width)).print(render(results))
    return results


def _check(task: Task, ways: Sequence[str], examples: Sequence[int], seeds: Sequence[int], training: Training) -> None:
    for way in ways:
        if way not in WAYS:
            raise EloError(f"--ways {way}: there is no such way; choose among {', '.join(WAYS)}")
    for count in examples:
        if not 0 <= count <= len(task.train):
            raise EloError(f"--examples {count}: give 0 to {len(task.train)}, the number of training examples")
    if not ways or not examples or not seeds or len(set(seeds)) < len(seeds):
        raise EloError("fewshot: give at least one way, one number of examples and one seed, and each seed only once")
    if not any(count or "in-context" in ways for count in examples):
        raise EloError("--examples 0: there is nothing to train on; add a number above 0, or the way in-context")
    if min(training.epochs, training.batch_size, training.rank) < 1 or not training.learning_rate > 0:
        raise EloError("fewshot: --epochs, --batch-size, --rank and --learning-rate must be above 0")


def _measure(
    cell: Cell, seed: int, model: PreTrainedModel, tokenizer: TextTokenizer, task: Task, training: Training
) -> None:
    """Train if the way requires it, predict all test items, and add the measurements of one seed to `cell`."""
    drawn = draw_examples(task, cell.examples, seed)
    instruction = "" if cell.way == "sft" else f"{task.instruction}\n\n"
    items = [_Item.of(task, example, tokenizer) for example in task.test]
    if cell.way == "in-context":
        context, used = _context(task, instruction, drawn, items, tokenizer, _limit(model))
        adapters, tokens, spent = None, 0, (0.0, 0.0)
    else:
        context, used = [tokenizer.prefix_token_id, *tokenizer.encode(instruction)], len(drawn)
        _check_length(context, items, _limit(model))
        started, cpu_started = time.perf_counter(), time.process_time()
        train_items = [_Item.of(task, example, tokenizer) for example in drawn]
        adapters, tokens = _train(model, context, train_items, training, seed)
        spent = time.perf_counter() - started, time.process_time() - cpu_started
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        scores = _scores(model, context, items)
    finally:
        if adapters is not None and adapters.fold_parts is not None:
            adapters.fold_parts()  # removes the adapters; only the returned function would merge them
    predicted = [max(range(len(each)), key=each.__getitem__) for each in scores]
    cell.right.append([float(label == each.label) for label, each in zip(predicted, items, strict=True)])
    cell.used.append(used)
    cell.train_tokens.append(tokens)
    cell.train_seconds.append(spent[0])
    cell.train_cpu_seconds.append(spent[1])
    cell.test_tokens.append(len(context) + sum(each.tokens for each in items))
    cell.test_seconds.append(time.perf_counter() - started)
    cell.test_cpu_seconds.append(time.process_time() - cpu_started)


@dataclass(frozen=True)
class _Item:
    """Token ids of an example: the prompt, and each label's word as its continuation."""

    prompt: list[int]
    words: list[list[int]]
    label: int

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.words))

    @classmethod
    def of(cls, task: Task, example: Example, tokenizer: TextTokenizer) -> "_Item":
        prompt = task.prompt(example)
        wholes = [ids.tolist() for ids in tokenizer.encode_batch([f"{prompt} {word}" for word in task.words])]
        shared = 0  # a word may merge with the end of the prompt
        while all(len(ids) > shared + 1 and ids[shared] == wholes[0][shared] for ids in wholes):
            shared += 1
        return cls(wholes[0][:shared], [ids[shared:] for ids in wholes], example.label)


def _context(
    task: Task,
    instruction: str,
    drawn: Sequence[Example],
    items: Sequence[_Item],
    tokenizer: TextTokenizer,
    limit: int | None,
) -> tuple[list[int], int]:
    """Return the token ids in front of each item, and the number of examples that fit into `limit` tokens."""
    start = [tokenizer.prefix_token_id, *tokenizer.encode(instruction)]
    _check_length(start, items, limit)
    longest = max(len(item.prompt) + max(map(len, item.words)) for item in items)
    used = 0
    for example in drawn:
        more = tokenizer.encode(f"{task.prompt(example)} {task.words[example.label]}\n\n")
        if limit is not None and len(start) + len(more) + longest > limit:
            break
        start += more
        used += 1
    return start, used


def _limit(model: PreTrainedModel) -> int | None:
    """Return the maximum length of a prompt in tokens; None is unlimited.

    Cached keys and values would no longer be valid beyond `rope_limit`.
    """
    limits = (longest_sequence(model), rope_limit(model.config))
    return min((limit for limit in limits if limit is not None), default=None)


def _check_length(context: Sequence[int], items: Sequence[_Item], limit: int | None) -> None:
    longest = max(len(item.prompt) + max(map(len, item.words)) for item in items)
    if limit is not None and len(context) + longest > limit:
        raise EloError(
            f"fewshot: the instruction and the longest test item have {len(context) + longest} tokens, but the model "
            f"takes at most {limit}; shorten them"
        )


def _train(
    model: PreTrainedModel, context: Sequence[int], items: Sequence[_Item], training: Training, seed: int
) -> tuple[Prepared, int]:
    """Add adapters to the model and train them on the words of the labels.

    `elo.train.loop.train` is made for long runs: its sequences all have one length, its updates have one size, and its
    last update writes a checkpoint. Here, the model is trained many times for a few updates on short rows.

    Returns:
        The adapters, whose `fold_parts` removes them from the model, and the number of tokens computed in training.
    """
    place = embedding_weight(model).device
    lora = _lora(training)
    adapters = lora.prepare(model, lora.phases[0], Setup(seed=seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    order, batches = random.Random(seed), []
    for _ in range(training.epochs):
        shuffled = order.sample(items, len(items))
        batches += [shuffled[at : at + training.batch_size] for at in range(0, len(shuffled), training.batch_size)]
    tokens = 0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - step / len(batches))
        rows = [([*context, *item.prompt], item.words[item.label]) for item in batch]
        ids_BT, attended_BT, labels_BT = right_padded(
            [([*before, *word], [IGNORE_INDEX] * len(before) + word) for before, word in rows]
        )
        output = model(
            input_ids=ids_BT.to(place),
            attention_mask=attended_BT.to(place),
            labels=labels_BT.to(place),
            use_cache=False,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        tokens += ids_BT.numel()
    return adapters, tokens


def _lora(training: Training) -> Lora:
    return Lora(rank=training.rank, alpha=2 * training.rank)


def _scores(model: PreTrainedModel, context: Sequence[int], items: Sequence[_Item]) -> list[list[float]]:
    """Return the log-likelihood of each label's word, by item. Shared prefixes are computed once.

    Raises:
        EloError: the model has no key-value cache.
    """
    found = []
    with evaluating(model) as place:
        ids_BT = torch.tensor([context], device=place)
        shared = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True).past_key_values
        if not hasattr(shared, "batch_repeat_interleave"):
            raise EloError(
                f"fewshot: {type(model).__name__} has no key-value cache; measure the task with elo evaluate --cloze"
            )
        for item in items:
            cache = copy.deepcopy(shared)
            last_V = model(
                input_ids=torch.tensor([item.prompt], device=place), past_key_values=cache, use_cache=True
            ).logits[0, -1]
            first_V = last_V.float().log_softmax(0)
            scores = [float(first_V[word[0]]) for word in item.words]
            if (width := max(map(len, item.words))) > 1:
                ids_BT = torch.tensor([[*word, *[0] * (width - len(word))] for word in item.words], device=place)
                cache.batch_repeat_interleave(len(item.words))
                logits_BTV = model(input_ids=ids_BT[:, :-1], past_key_values=cache, use_cache=True).logits
                nats_BT = logits_BTV.float().log_softmax(2).gather(2, ids_BT[:, 1:, None])[..., 0]
                scores = [
                    score + float(nats_BT[row, : len(item.words[row]) - 1].sum()) for row, score in enumerate(scores)
                ]
            found.append(scores)
    return found


def _result_row(cell: Cell, model: PreTrainedModel, training: Training) -> dict[str, Any]:
    accuracies = [fmean(right) for right in cell.right]
    estimate = estimate_items(np.array(cell.right))
    per_item = fmean(cell.test_tokens) / len(cell.right[0])
    lora = _lora(training)
    per_token = lora.flops_per_token(lora.phases[0], footprint(model.config), (), max(2, round(per_item)))
    return {
        "way": cell.way,
        "examples": cell.examples,
        "used_examples": cell.used,
        "accuracy": estimate.value,
        "low": max(0.0, estimate.low),
        "high": min(1.0, estimate.high),
        "accuracy_by_seed": accuracies,
        "standard_error_seeds": mean_error(accuracies),
        "standard_error_items": share_error(estimate.value, len(cell.right[0])),
        "train_tokens": fmean(cell.train_tokens),
        "train_seconds": fmean(cell.train_seconds),
        "train_cpu_seconds": fmean(cell.train_cpu_seconds),
        "train_flops": fmean(cell.train_tokens) * per_token.total,
        "test_tokens_per_item": per_item,
        "test_seconds_per_item": fmean(cell.test_seconds) / len(cell.right[0]),
        "test_cpu_seconds_per_item": fmean(cell.test_cpu_seconds) / len(cell.right[0]),
        "test_flops_per_item": per_item * per_token.forward,
    }


def _differences(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the paired differences from in-context learning on the same items with the same examples."""
    prompted = {cell.examples: cell for cell in cells if cell.way == "in-context"}
    found = []
    for cell in cells:
        other = prompted.get(cell.examples)
        if other is not None and other is not cell:
            estimate = asdict(estimate_items(np.array(cell.right) - np.array(other.right)))
            found.append({"way": cell.way, "reference": "in-context", "examples": cell.examples, **estimate})
    return found
