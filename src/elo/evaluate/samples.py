"""What a model writes after a prompt: read by people beside the numbers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError
from elo.evaluate.base import Measure, Outcome, Subject
from elo.evaluate.scoring import check_ids, evaluating, longest_sequence
from elo.log import Progress

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Samples(Measure):
    """Greedy continuations of prompts, by language, and the speed of writing them."""

    name: ClassVar[str] = "samples"
    prompts: dict[str, Sequence[str]]
    """Texts to continue, by language."""
    max_new_tokens: int = 64
    """Length of a sample, in tokens."""

    def measure(self, subject: Subject) -> Outcome:
        samples, generation = [], {}
        for language, prompts in self.prompts.items():
            started = time.perf_counter()
            texts = generate_samples(
                subject.model,
                subject.text_tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                progress=f"samples {language}" if subject.progress else None,
            )
            generation[language] = {"characters": sum(map(len, texts)), "seconds": time.perf_counter() - started}
            samples += [
                {"language": language, "prompt": prompt, "text": text}
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        return Outcome(record={"samples": samples, "generation": generation})


def generate_samples(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: str | None = None,
    stop: str | None = None,
    batch_size: int = 1,
) -> list[str]:
    """Continue each prompt greedily, the most likely token at each position: the same text every time.

    Args:
        model: any causal LM; left as it was.
        tokenizer: the model's.
        prompts: texts, laid out as in training (after the prefix token); too long ones lose their beginning.
        max_new_tokens: tokens to write at most; generation also ends at the end-of-text token and at the last of
            the model's positions.
        device: where to run; by default where the model is.
        autocast_dtype: compute dtype, for models kept in another one.
        progress: a label shows progress under it; None shows nothing.
        stop: text that ends a continuation; it and what follows is cut off.
        batch_size: prompts at once; more than one is faster, and rounds differently.

    Returns:
        The continuations, without their prompts.

    Raises:
        EloError: `max_new_tokens` is not positive or leaves no room for a prompt.
    """
    limit = longest_sequence(model)
    if max_new_tokens < 1 or (limit is not None and max_new_tokens >= limit):
        raise EloError(
            f"max_new_tokens: got {max_new_tokens}; with this model's {limit or 'unlimited'} positions give "
            f"1{f' to {limit - 1}' if limit else ' or more'}"
        )
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    asked = []
    for prompt in prompts:
        # A prompt may frame a chat turn, so special tokens in it are tokens.
        ids = [tokenizer.prefix_token_id, *tokenizer.backend.encode(prompt, add_special_tokens=False).ids]
        check_ids(max(ids), model, f"prompt {prompt[:60]!r}")
        asked.append(ids if limit is None else ids[-(limit - max_new_tokens) :])
    texts = []
    with (
        evaluating(model, device, autocast_dtype) as place,
        generating_with(model, greedy),
        Progress(len(prompts), progress, "samples") as bar,
    ):
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            width = max(map(len, batch))
            padded = [[tokenizer.eos_token_id] * (width - len(ids)) + ids for ids in batch]
            attended = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
            output_BT: Any = GenerationMixin.generate(
                model,  # type: ignore[arg-type]
                torch.tensor(padded, device=place),
                attention_mask=torch.tensor(attended, device=place),
                stopping_criteria=StoppingCriteriaList([_AtText(tokenizer, stop, width)] if stop else []),
            )
            for ids in output_BT[:, width:].tolist():
                text = tokenizer.backend.decode(ids, skip_special_tokens=True)
                texts.append((text.partition(stop)[0] if stop else text).rstrip(_UNFINISHED_CHARACTER))
            bar.advance(len(batch))
    return texts


class _AtText(StoppingCriteria):
    """Stops a sequence whose last tokens spell `stop`. Tokens before `start` are the prompt."""

    def __init__(self, tokenizer: TextTokenizer, stop: str, start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        tails = input_ids[:, max(self._start, input_ids.shape[1] - len(self._stop.encode()) - 1) :].tolist()
        found = [self._stop in self._tokenizer.backend.decode(ids, skip_special_tokens=True) for ids in tails]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def generating_with(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the checkpoint's own, which would fill in whatever an argument leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
