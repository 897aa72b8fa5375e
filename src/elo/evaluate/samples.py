"""Greedy continuations of prompts, for people to read next to the numbers."""

import time
from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from elo.data.tokenizer import TextTokenizer
from elo.evaluate.base import Measure, Outcome, Subject
from elo.evaluate.writing import encode_prompts, write_greedily

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Samples(Measure):
    """Continue prompts greedily, and measure the speed."""

    name: ClassVar[str] = "samples"
    prompts: dict[str, Sequence[str]]
    """Texts to continue, by language."""
    max_new_tokens: int = 64
    """Maximum length of a sample, in tokens."""

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
    progress: str | None = None,
    stop: str | None = None,
    batch_size: int = 1,
) -> list[str]:
    """Continue each prompt greedily (`write_greedily`) up to the end-of-text token.

    Args:
        model: any causal LM; it is not changed.
        prompts: texts to continue, laid out as in training (`encode_prompts`).
        max_new_tokens: maximum length of a continuation, in tokens.
        progress: label of the progress bar; None shows none.
        stop: text that ends a continuation, which is cut off before it.
        batch_size: number of prompts to continue together.

    Returns:
        The continuations, without their prompts.

    Raises:
        EloError: `max_new_tokens` is not positive or leaves no room for a prompt.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.backend.decode(ids, skip_special_tokens=True)

    written = write_greedily(
        model,
        encode_prompts(model, tokenizer, prompts, max_new_tokens),
        stops=[tokenizer.eos_token_id],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        ended=(lambda ids: stop in decode(ids[-len(stop.encode()) - 1 :])) if stop else None,
        progress=progress,
    )
    texts = map(decode, written)
    return [(text.partition(stop)[0] if stop else text).rstrip(_UNFINISHED_CHARACTER) for text in texts]
