"""What a model writes after a prompt: read by people beside the numbers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

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
    texts = []
    with (
        evaluating(model, device, autocast_dtype) as place,
        generating_with(model, greedy),
        Progress(len(prompts), progress, "samples") as bar,
    ):
        for prompt in prompts:
            # A prompt may frame a chat turn, so special tokens in it are tokens.
            ids = [tokenizer.prefix_token_id, *tokenizer.backend.encode(prompt, add_special_tokens=False).ids]
            check_ids(max(ids), model, f"prompt {prompt[:60]!r}")
            if limit is not None:
                ids = ids[-(limit - max_new_tokens) :]
            input_ids_BT = torch.tensor([ids], device=place)
            output_BT: Any = GenerationMixin.generate(
                model,  # type: ignore[arg-type]
                input_ids_BT,
                attention_mask=torch.ones_like(input_ids_BT),
            )
            text = tokenizer.backend.decode(output_BT[0, len(ids) :].tolist(), skip_special_tokens=True)
            texts.append(text.rstrip(_UNFINISHED_CHARACTER))
            bar.advance(1)
    return texts


@contextmanager
def generating_with(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the checkpoint's own, which would fill in whatever an argument leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
