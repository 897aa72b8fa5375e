"""The stages of a run. Each stage writes its output to a path and returns a JSON record.

`elo.run` calls them through `RunFolder.once`, which skips finished stages.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from elo.check_output import check_output
from elo.config import CorpusConfig, DataConfig, EvaluationConfig
from elo.data.mixture import MixtureSequences
from elo.data.prepare import CorpusSource, prepare
from elo.data.shards import PreparedData, TokenCorpus
from elo.data.tokenizer import load_tokenizer
from elo.evaluate.base import Measure
from elo.evaluate.evaluate import evaluate
from elo.evaluate.loading import load_model
from elo.evaluate.scale_search import search_scale
from elo.evaluate.warnings import harmful_change, worse_than_base
from elo.methods import Method, Phase, Setup
from elo.store.files import atomic_directory, write_json
from elo.store.processes import from_main
from elo.store.run_folder import Artifact
from elo.surgery.on_disk import attach_checkpoint, detach_checkpoint
from elo.surgery.scale_change import scale_change
from elo.train.arguments import bf16_pays
from elo.train.bridge import BRIDGE_FILE, Bridge, fit_bridge
from elo.train.peak_memory import peak_memory_bytes, reset_peak_memory
from elo.train.phase import evaluator, train_checkpoint
from elo.train.settings import TrainingSettings
from elo.train.vocabulary_cut import choose_rows


def measured(stage: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Add time and peak memory to the record of a stage without training."""

    @functools.wraps(stage)
    def timed(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        reset_peak_memory()
        started, cpu_started = time.perf_counter(), time.process_time()
        return stage(*arguments, **keywords) | {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "tokens": 0,
            "tokens_per_second": None,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    return timed


def checked(
    made_from: str, *, collective: bool = False
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """Load the output of a stage and check it. Faults that its input already has are ignored.

    The check is not part of the stage's measured time and memory.

    Args:
        made_from: name of the stage's argument with the input checkpoint.
        collective: whether every process calls the stage.
    """

    def decorate(stage: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(stage)
        def verified(output: Path, **keywords: Any) -> dict[str, Any]:
            record = stage(output, **keywords)
            remedy = f"{output} is not a correct checkpoint; report this with the model's name"
            trust = keywords["trust_remote_code"]

            def check() -> None:
                check_output(output, (keywords[made_from].path,), remedy=remedy, trust_remote_code=trust)

            if collective:
                from_main(check)
            else:
                check()
            return record

        return verified

    return decorate


def corpus_sources(data: DataConfig) -> tuple[dict[str, list[CorpusSource]], dict[str, CorpusSource]]:
    """Return the training and the held-out corpora of a configuration, by language."""

    def source(given: CorpusConfig, language: str) -> CorpusSource:
        return CorpusSource(given.path, text_column=given.text_column, parallel=given.parallel(language))

    corpora = {name: [source(each, name) for each in sources] for name, sources in data.corpora.items()}
    return corpora, {name: source(each, name) for name, each in data.heldout.items()}


def prepare_data(
    output: Path,
    *,
    data: DataConfig,
    tokenizer: str,
    identities: Any,
    vocab_size: int,
    ray: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Tokenise the corpora into token shards.

    Args:
        identities: identities of the tokenizer's and the corpora's files, which determine the shards.
        vocab_size: number of rows of the model's embedding; larger token ids raise an error.
        ray: address of a Ray cluster that does the work; None for this machine.
    """
    corpora, heldout = corpus_sources(data)
    prepare(
        tokenizer,
        corpora,
        output,
        heldout=heldout or None,
        heldout_share=data.heldout_share,
        validation_share=data.validation_share,
        workers=data.workers,
        on_error=data.on_error,
        split_special_tokens=data.split_special_tokens,
        allow_lost_text=data.allow_lost_text,
        filters=data.filters,
        vocab_size=vocab_size,
        ray=ray,
        overwrite=True,
        trust_remote_code=trust_remote_code,
    )
    return {}


@measured
def fit_middle(
    output: Path, *, base: Artifact, layers: Sequence[int], rows: MixtureSequences, trust_remote_code: bool
) -> dict[str, Any]:
    """Fit a linear bridge over the removed layers, with the ridge penalty that is best on unseen tokens."""
    model = load_model(str(base.path), trust_remote_code=trust_remote_code)
    sequences = (rows[index] for index in range(len(rows)))
    bridge = fit_bridge(model, layers, sequences, autocast_dtype=_fast_dtype(model))
    with atomic_directory(output, overwrite=True) as folder:
        bridge.save(folder / BRIDGE_FILE)
    return {
        "bridge_tokens": len(rows) * rows.mixture.sequence_length,
        "explained": list(bridge.explained),
        "cosine": list(bridge.cosine),
        "ridge": list(bridge.ridge),
    }


def _fast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Return the compute dtype of forward passes whose last digits do not matter: bf16 where it is fast."""
    return torch.bfloat16 if bf16_pays(model.device.type) else None


@checked("base")
@measured
def detach_layers(output: Path, *, base: Artifact, layers: Sequence[int], trust_remote_code: bool) -> dict[str, Any]:
    """Write the detached model: the chosen layers, embedding, norm and head."""
    return detach_checkpoint(
        base.path, list(layers), output, overwrite=True, trust_remote_code=trust_remote_code, label="detach"
    )


@checked("base")
@measured
def attach_layers(
    output: Path, *, base: Artifact, trained: Artifact, include: Sequence[str], trust_remote_code: bool
) -> dict[str, Any]:
    """Write the base with the trained layers and parts in place of its own."""
    return attach_checkpoint(
        trained.path,
        base.path,
        output,
        include=include,
        overwrite=True,
        trust_remote_code=trust_remote_code,
        label="attach",
    )


@checked("trained")
@measured
def keep_share(
    output: Path,
    *,
    base: Artifact,
    trained: Artifact,
    scale: float | str,
    rows: Mapping[str, Sequence[dict[str, Any]]] | None,
    rows_identity: Any,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Write base + scale x (trained - base). Scale `search` takes the scale with the lowest loss on `rows`.

    That may be 0, which writes the base, with a warning in the record.
    """
    tried: dict[float, float] = {}
    if isinstance(scale, str):
        before, after = (load_model(str(each.path), trust_remote_code=trust_remote_code) for each in (base, trained))
        assert rows is not None
        scale, tried = search_scale(before, after, rows, _fast_dtype(after))
        del before, after
    scale_change(base.path, trained.path, output, scale, overwrite=True, trust_remote_code=trust_remote_code)
    record = {"scale": scale, "scales_tried": {f"{each:g}": nats for each, nats in tried.items()}}
    return record | {"warnings": [harmful_change(tried)]} if scale == 0 else record


@measured
def cut_vocabulary(
    output: Path, *, data: Artifact, sample: int, seed: int, base: Artifact, trust_remote_code: bool
) -> dict[str, Any]:
    """Write the ids of the vocabulary rows that training computes with."""
    chosen = choose_rows(
        PreparedData.open(data.path), base.path, sample=sample, seed=seed, trust_remote_code=trust_remote_code
    )
    with atomic_directory(output, overwrite=True) as folder:
        write_json(folder / "rows.json", chosen.tolist())
    return {"rows": len(chosen)}


@checked("checkpoint", collective=True)
def train(
    output: Path,
    *,
    checkpoint: Artifact,
    rows: MixtureSequences,
    method: Method,
    phase: Phase,
    layers: Sequence[int],
    bridge: Artifact | None,
    vocabulary: Artifact | None,
    settings: TrainingSettings,
    seed: int,
    evaluation: int | None,
    data: Artifact,
    measures: Sequence[Measure],
    languages: Sequence[str],
    targets: Sequence[str],
    base_bpb: Mapping[str, float],
    tokenizer: str,
    label: str,
    say: Callable[[str], None],
    measured: Callable[[dict[str, Any]], None],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Train a checkpoint on `rows`, in one phase of a method.

    Args:
        evaluation: maximum size of held-out text per language for measurements during training, in bytes.
        measures: measures during training besides bits per byte, unless the model is detached.
        targets: target languages, a part of `languages`.
        base_bpb: bits per byte of the base by language. A target language that becomes worse causes a warning.
        say: function that shows the user a line.
        measured: function called with the result of each measurement.
    """
    tokens = len(rows) * rows.mixture.sequence_length
    say(f"{label}: {tokens:,} tokens ({phase.portion} portion of the budget)")
    measure = evaluator(
        PreparedData.open(data.path),
        languages,
        load_tokenizer(tokenizer, trust_remote_code),
        sequence_length=rows.mixture.sequence_length,
        max_bytes=evaluation,
        settings=settings,
        measures=() if phase.detached else measures,
        trust_remote_code=trust_remote_code,
    )

    def measure_and_warn(model: Any) -> dict[str, Any]:
        point = measure(model)
        bpb = point["bpb"]
        # A detached model is not expected to predict text well.
        for language in () if phase.detached else targets:
            if line := worse_than_base(language, bpb, base_bpb):
                say(f"warning: {label}: {line}")
        measured(point)
        return point

    setup = Setup(layers, Bridge.load(bridge.path / BRIDGE_FILE) if bridge else None, seed)
    return train_checkpoint(
        checkpoint.path,
        output,
        rows=rows,  # type: ignore[arg-type]
        prepare=lambda model: method.prepare(model, phase, setup),
        seed=seed,
        settings=settings,
        scratch=output.with_name(f"{output.name}-checkpoints"),
        vocabulary=vocabulary.path / "rows.json" if vocabulary else None,
        evaluate=measure_and_warn,
        trust_remote_code=trust_remote_code,
        label=label,
    )


def measure(
    output: Path,
    *,
    model: Artifact,
    corpora: Mapping[str, TokenCorpus],
    evaluation: EvaluationConfig,
    files: Any,
    brief: bool,
    sequence_length: int,
    split_special_tokens: bool,
    tokenizer: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Measure a model: bits per byte by language and, unless `brief`, every measure that is configured.

    Args:
        files: identities of the files that the measures read, for the fingerprint of the stage.
    """
    started = time.perf_counter()
    measured = evaluate(
        str(model.path),
        tokenizer=tokenizer,
        dtype=None if evaluation.dtype == "auto" else evaluation.dtype,
        corpora=corpora,
        cloze={} if brief else {language: Path(path) for language, path in evaluation.cloze.items()},
        prompts={} if brief else evaluation.prompts,
        measures=[] if brief else evaluation.measures,
        sequence_length=sequence_length,
        max_bytes=evaluation.max_bytes,
        split_special_tokens=split_special_tokens,
        max_new_tokens=evaluation.max_new_tokens,
        trust_remote_code=trust_remote_code,
        files=output,
        progress=False,
    )
    return measured | {"seconds": time.perf_counter() - started}
