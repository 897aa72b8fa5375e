"""`elo generate`: greedy generation that ends at an internal layer, with speed and quality by exit layer.

A model that exits at layer N is an ordinary model of layers 0 to N. With a confidence, the model is cut after each exit
layer into segments, each with its own key-value cache. A token exits at the first segment that is confident. The next
segment keeps its hidden states, and computes them together with those of the first later token that goes on. So every
cache has the same content as that of the whole model, and layers that no token needs are never computed.
Shapes: B = 1 text, P positions, V vocabulary, D hidden width.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from elo.checkpoint.architecture import is_recurrent, layers_of
from elo.checkpoint.layer_outputs import LayerOutputs, with_entering
from elo.data.tokenizer import load_tokenizer
from elo.errors import EloError
from elo.evaluate.evaluate import evaluate
from elo.evaluate.loading import load_model
from elo.evaluate.writing import encode_prompts
from elo.store.files import write_json
from elo.store.remote import output_file
from elo.surgery.in_memory import detach_layers

DEFAULT_EXITS = (0.25, 0.5, 0.75)
"""Shares of the layers after which a token may exit, if a confidence is given without exit layers."""


@dataclass
class Written:
    """The continuation of one prompt.

    Attributes:
        tokens: token ids, with the end-of-text token if it was written.
        exits: layer at which each token exited.
        layers_run: number of layers computed, summed over all positions.
    """

    tokens: list[int] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    layers_run: int = 0


class EarlyExit:
    """A model in segments that end at its exit layers."""

    def __init__(self, model: PreTrainedModel, stops: Sequence[int], confidence: float = 0.0) -> None:
        """Cut `model`, which is not changed.

        Args:
            stops: layers at which a token may exit, ascending. At the last one it always does.
            confidence: probability of the most likely token above which a token exits.

        Raises:
            EloError: the model cannot be cut there.
        """
        self.stops, self.confidence = stops, confidence
        starts = [0, *(stop + 1 for stop in stops[:-1])]
        self.segments = [_segment(model, start, stop) for start, stop in zip(starts, stops, strict=True)]
        self._entering: Tensor | None = None
        self._outputs = [LayerOutputs(each, [len(layers_of(each)) - 1]) for each in self.segments[:-1]]
        for each in self.segments[1:]:
            layers_of(each)[0].register_forward_pre_hook(self._enter, with_kwargs=True)

    @torch.no_grad()
    def write(self, ids: Sequence[int], max_new_tokens: int, eos_token_id: int) -> Written:
        """Continue token ids greedily until the end-of-text token or `max_new_tokens`."""
        written = Written()
        caches: list[Any] = [None] * len(self.segments)
        waiting_ids: list[list[int]] = [[] for _ in self.segments]
        waiting_states: list[list[Tensor]] = [[] for _ in self.segments]
        new = list(ids)
        while True:
            for waiting in waiting_ids:
                waiting.extend(new)
            for index, segment in enumerate(self.segments):
                ids_BP = torch.tensor([waiting_ids[index]], device=segment.device)
                entering_BPD = torch.cat(waiting_states[index], 1) if index else None
                waiting_ids[index], waiting_states[index] = [], []
                output, leaving_BPD = self._run(
                    index, entering_BPD, input_ids=ids_BP, past_key_values=caches[index], use_cache=True
                )
                caches[index] = output.past_key_values
                written.layers_run += ids_BP.shape[1] * len(layers_of(segment))
                if leaving_BPD is not None:
                    waiting_states[index + 1].append(leaving_BPD)
                logits_V = output.logits[0, -1].float()
                if float(logits_V.softmax(-1).max()) > self.confidence:
                    break
            token = int(logits_V.argmax())
            written.tokens.append(token)
            written.exits.append(self.stops[index])
            if token == eos_token_id or len(written.tokens) == max_new_tokens:
                return written
            new = [token]

    @torch.no_grad()
    def forward(self, **inputs: Any) -> CausalLMOutput:
        """Return, for each position, the logits of the layer at which it exits, computed without a cache."""
        chosen_BTV, done_BT, state_BTD = None, None, None
        for index in range(len(self.segments)):
            output, state_BTD = self._run(index, state_BTD, **inputs)
            if chosen_BTV is None or done_BT is None:
                chosen_BTV = output.logits
                done_BT = chosen_BTV.float().softmax(-1).amax(-1) > self.confidence
            else:
                chosen_BTV = torch.where(done_BT.unsqueeze(-1), chosen_BTV, output.logits)
                done_BT |= output.logits.float().softmax(-1).amax(-1) > self.confidence
        return CausalLMOutput(logits=chosen_BTV)

    def _run(self, index: int, entering: Tensor | None, **inputs: Any) -> tuple[Any, Tensor | None]:
        """Run one segment on hidden states; return its output and the hidden states after its last layer."""
        segment, self._entering = self.segments[index], entering
        if index + 1 == len(self.segments):
            return segment(**inputs), None
        with self._outputs[index].recording() as found:
            output = segment(**inputs)
        (leaving,) = found.values()
        return output, leaving

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return with_entering(args, kwargs, self._entering)


def generate(
    model: str | Path,
    prompts: Sequence[str] = (),
    *,
    exit_layers: Sequence[int] = (),
    confidence: float | None = None,
    corpora: Mapping[str, str | Path] | None = None,
    max_new_tokens: int = 64,
    max_bytes: int | None = None,
    tokenizer: str | Path | None = None,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Continue prompts greedily with exits at internal layers, and measure speed and bits per byte of each exit.

    Args:
        model: checkpoint folder or hub id.
        prompts: texts to continue.
        exit_layers: decoder layers to exit at, 0-based, negative from the end. The last layer is always measured too.
        confidence: also measure tokens that exit at different layers: each at the first exit layer whose most likely
            token has a probability above this. Without `exit_layers`, these are after each quarter of the layers.
        corpora: text by language to measure bits per byte on.
        max_new_tokens: maximum length of a continuation, in tokens.
        max_bytes: maximum size of the text per language, in bytes.
        tokenizer: folder or hub id of the tokenizer; by default the model's.
        output: JSON file to write.
        trust_remote_code: run code that ships with the checkpoint.
        progress: print a table and the texts.

    Returns:
        The results: {"schema", "kind", "model", "num_layers", "exits"}; docs/early-exit.md explains the exits.

    Raises:
        EloError: an argument is wrong, or the model cannot be cut at these layers.
    """
    if not prompts and not corpora:
        raise EloError("generate: nothing to do; give --prompt TEXT, --corpus LANGUAGE=FILE or both")
    if confidence is not None and not 0 < confidence < 1:
        raise EloError(f"--confidence {confidence:g}: is not a probability; write a number between 0 and 1")
    target = output_file(output)
    encoder = load_tokenizer(tokenizer or model, trust_remote_code)
    whole = load_model(str(model), trust_remote_code=trust_remote_code)
    ids = encode_prompts(whole, encoder, prompts, max_new_tokens)
    last = len(layers_of(whole)) - 1
    if confidence is not None and not exit_layers:
        exit_layers = sorted({max(0, int(share * (last + 1)) - 1) for share in DEFAULT_EXITS} - {last})
    layers = _exit_indices(exit_layers, last)
    ways: list[tuple[str, list[int], float]] = [(f"layer {layer}", [layer], 0.0) for layer in (*layers, last)]
    if confidence is not None:
        if is_recurrent(whole):
            raise EloError(
                f"--confidence: {whole.config.model_type} has layers without attention; give --exit-layer instead"
            )
        ways.append((f"confidence > {confidence:g}", [*layers, last], confidence))

    exits = []
    for name, stops, threshold in ways:
        early = EarlyExit(whole, stops, threshold)
        bpb: dict[str, float] = {}
        if corpora:
            with _replaced_forward(whole, early.forward):
                bpb = evaluate(whole, encoder, corpora=dict(corpora), max_bytes=max_bytes, progress=False)["bpb"]
        started = time.perf_counter()
        written = [early.write(each, max_new_tokens, encoder.eos_token_id) for each in ids]
        seconds = time.perf_counter() - started
        texts = [encoder.backend.decode(each.tokens, skip_special_tokens=True) for each in written]
        exits.append(
            {
                "exit": name,
                "bpb": bpb,
                "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)],
                **_speed(written, ids, seconds),
            }
        )
    results = {"schema": 1, "kind": "generation", "model": str(model), "num_layers": last + 1, "exits": exits}
    if target is not None:
        write_json(target, results)
    if progress:
        _print(results)
    return results


def _segment(model: PreTrainedModel, start: int, stop: int) -> PreTrainedModel:
    """Return the model of layers `start` to `stop`, which shares embedding and head with `model`."""
    if start == 0 and stop == len(layers_of(model)) - 1:
        return model
    segment = detach_layers(model, list(range(start, stop + 1)))
    segment.set_input_embeddings(model.get_input_embeddings())
    segment.set_output_embeddings(model.get_output_embeddings())
    return segment


def _exit_indices(exit_layers: Sequence[int], last: int) -> list[int]:
    found = set()
    for layer in exit_layers:
        index = layer + last + 1 if layer < 0 else layer
        if not 0 <= index <= last:
            raise EloError(f"--exit-layer {layer}: the model has layers 0 to {last}; write one of them")
        found.add(index)
    return sorted(found - {last})


@contextmanager
def _replaced_forward(model: PreTrainedModel, forward: Callable[..., CausalLMOutput]) -> Iterator[None]:
    """Replace the model's forward method by `forward`, within which the model has its own."""
    own = model.forward

    def once(**inputs: Any) -> CausalLMOutput:
        model.forward = own
        try:
            return forward(**inputs)
        finally:
            model.forward = once

    model.forward = once
    try:
        yield
    finally:
        model.forward = own


def _speed(written: Sequence[Written], ids: Sequence[Sequence[int]], seconds: float) -> dict[str, Any]:
    tokens = sum(len(each.tokens) for each in written)
    positions = sum(len(each) for each in ids) + tokens - len(written)  # the last token of a text is not run
    by_layer: dict[str, int] = {}
    for each in written:
        for layer in each.exits:
            by_layer[str(layer)] = by_layer.get(str(layer), 0) + 1
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else None,
        "layers_per_position": sum(each.layers_run for each in written) / positions if tokens else None,
        "tokens_by_layer": by_layer,
    }


def _print(results: dict[str, Any]) -> None:
    exits = results["exits"]
    console, table = Console(), Table(title=results["model"], title_justify="left")
    table.add_column("exit")
    languages = list(exits[0]["bpb"])
    for heading in ("tokens/s ↑", "layers per position ↓", *(f"bits per byte {each} ↓" for each in languages)):
        table.add_column(heading, justify="right")
    for each in exits:
        speed = [each["tokens_per_second"], each["layers_per_position"]]
        cells = ["" if value is None else f"{value:.1f}" for value in speed]
        table.add_row(each["exit"], *cells, *(f"{each['bpb'][language]:.4f}" for language in languages))
    console.print(table)
    for each in exits:
        for text in each["texts"]:
            console.print(f"{each['exit']}: {text['prompt']}|{text['text']}", markup=False, highlight=False)
