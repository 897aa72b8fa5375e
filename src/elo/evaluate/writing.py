"""Greedy generation on token ids, for samples, translations and answers to conversations.

Shapes: B sequences, T positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError
from elo.evaluate.scoring import check_ids, evaluating, keeps_apart, longest_sequence
from elo.log import Progress

BATCH_SIZE = 16
"""Number of prompts to continue together, if a measure is given no batch size."""


def encode_prompts(
    model: PreTrainedModel, tokenizer: TextTokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Return the token ids of each prompt, laid out as in training: the prefix token, then the text.

    A prompt that is too long for the model loses its beginning.

    Raises:
        EloError: `max_new_tokens` is not positive or leaves no room for a prompt, or the model has no row for a token.
    """
    limit = longest_sequence(model)
    if max_new_tokens < 1 or (limit is not None and max_new_tokens >= limit):
        allowed = f"the model has {limit} positions; write 1 to {limit - 1}" if limit else "write at least 1"
        raise EloError(f"max_new_tokens: got {max_new_tokens}; {allowed}")
    encoded = []
    for prompt in prompts:
        # A prompt may contain the markup of a chat, so names of special tokens become special tokens.
        ids = [tokenizer.prefix_token_id, *tokenizer.backend.encode(prompt, add_special_tokens=False).ids]
        check_ids(max(ids), model, f"prompt {prompt[:60]!r}")
        encoded.append(ids if limit is None else ids[-(limit - max_new_tokens) :])
    return encoded


def write_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    ended: Callable[[list[int]], bool] | None = None,
    progress: str | None = None,
    unit: str = "samples",
) -> list[list[int]]:
    """Continue each prompt with the most likely token at each position.

    Args:
        model: any causal LM; it is not changed.
        prompts: token ids of each prompt, which leave room for `max_new_tokens` in the model's positions.
        stops: token ids that end a continuation and are part of it.
        max_new_tokens: maximum length of a continuation, in tokens.
        batch_size: number of prompts to continue together. More than one is faster and rounds differently. A model
            whose text would depend on padding always gets one.
        ended: function called with the tokens of a continuation so far; returns whether it ends here.
        progress: label of the progress bar; None shows none.
        unit: what the progress bar counts.

    Returns:
        The continuations, without their prompts, in the order of the prompts.
    """
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0]
    )
    # Prompts of several lengths need left padding, which only positions and an attention mask can hide.
    together = keeps_apart(model, max(map(len, prompts), default=0) + max_new_tokens)
    size = batch_size if together else 1
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # so that padding is short
    written: dict[int, list[int]] = {}
    with (
        evaluating(model) as place,
        _generating_with(model, greedy),
        Progress(len(prompts), progress, unit) as bar,
    ):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width = len(prompts[batch[-1]])
            ids_BT = torch.full((len(batch), width), stops[0])
            mask_BT = torch.zeros_like(ids_BT)
            for row, index in enumerate(batch):
                ids_BT[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask_BT[row, width - len(prompts[index]) :] = 1
            output_BT: Any = GenerationMixin.generate(
                model,  # type: ignore[arg-type]
                ids_BT.to(place),
                attention_mask=mask_BT.to(place),
                stopping_criteria=StoppingCriteriaList([_Ended(ended, width)] if ended else []),
            )
            for index, ids in zip(batch, output_BT[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
                written[index] = ids[: end + 1]
            bar.advance(len(batch))
    return [written[index] for index in range(len(prompts))]


class _Ended(StoppingCriteria):
    """Ends each sequence for which `ended` returns true. Tokens before `start` are the prompt."""

    def __init__(self, ended: Callable[[list[int]], bool], start: int) -> None:
        self._ended, self._start = ended, start

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        found = [self._ended(ids) for ids in input_ids[:, self._start :].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def _generating_with(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation config, which would fill in every setting that an argument leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
