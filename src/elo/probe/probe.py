"""Score every decoder layer of a model by several criteria (`elo probe`)."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from elo.checkpoint.counting import read_config
from elo.checkpoint.layers import PROBE_LENGTH, PROBE_TOKENS, AutoLayers, parse_auto
from elo.checkpoint.model_config import num_layers_of
from elo.data.tokenizer import load_tokenizer
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.evaluate.loading import load_model
from elo.evaluate.scoring import longest_sequence
from elo.identities import checkpoint_identity
from elo.probe.base import MODULES, Scores, Subject
from elo.probe.chart import draw_scores
from elo.probe.choice import TO_KEEP, check_auto, choose, mean_scores
from elo.probe.criteria import CRITERIA
from elo.probe.text import ProbeText, read_sentences, read_sequences
from elo.store.environment import environment
from elo.store.files import read_json, write_json
from elo.store.run_folder import Artifact, RunFolder
from elo.train.arguments import bf16_pays

FILE_NAME = "probe.json"


def probe(
    model: str | Path,
    corpora: Mapping[str, str],
    *,
    output: str | Path,
    parallel: str | Path | None = None,
    criteria: Sequence[str] = (),
    tokens: int = PROBE_TOKENS,
    sequence_length: int = PROBE_LENGTH,
    text_column: str = "text",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score every decoder layer, its attention and its feed-forward part.

    A repeated call resumes after the last criterion that was finished.

    Args:
        model: checkpoint folder or hub id.
        corpora: text by language (anything `elo prepare` reads).
        output: folder for probe.json, which has all scores, and for charts over depth.
        parallel: file of parallel sentences with one column per language, for the criteria that need it.
        criteria: names of criteria; by default all that the text allows.
        tokens: number of tokens per language.
        sequence_length: length of a sequence, in tokens.
        text_column: field that holds a document's text.
        tokenizer: folder or hub id; by default the model's.

    Returns:
        The content of probe.json.

    Raises:
        EloError: the model or the text cannot be read, there is too little text, or a criterion is unknown or lacks
            parallel text.
    """
    names = _resolve_criteria(criteria, parallel is not None)
    base = resolve_checkpoint(model, trust_remote_code=trust_remote_code)
    encoder = load_tokenizer(tokenizer or str(base), trust_remote_code)
    sequences = {
        language: read_sequences(language, path, encoder, tokens, sequence_length, text_column)
        for language, path in corpora.items()
    }
    sentences = read_sentences(parallel, list(corpora), encoder, sequence_length) if parallel else {}
    text = ProbeText(sequences, sentences)
    folder = RunFolder(Path(output))
    load = functools.cache(lambda: frozen_model(base, trust_remote_code))
    with folder.locked():
        artifact = Artifact(base, checkpoint_identity(base))
        records = {name: score_once(folder, name, artifact, text, load) for name in names}
        results = {
            "schema": 1,
            "kind": "probe",
            "model": str(model),
            "num_layers": num_layers_of(read_config(str(base), trust_remote_code=trust_remote_code)),
            "languages": list(corpora),
            "tokens": {language: ids.numel() for language, ids in sequences.items()},
            "parallel_sentences": len(next(iter(sentences.values()), ())),
            **environment(),
            "criteria": records,
        }
        write_json(folder.path(FILE_NAME), results)
        for name, record in records.items():
            chart = draw_scores(name, record["label"], record["scores"])
            folder.path(f"{name}.svg").write_bytes(chart.svg)
            folder.path(f"{name}.png").write_bytes(chart.png)
    _print_table(results)
    return results


def score_once(
    folder: RunFolder, name: str, base: Artifact, text: ProbeText, load: Callable[[], PreTrainedModel]
) -> dict[str, Any]:
    """Score the layers by one criterion, as a stage of a run folder, and return the stage's record."""
    stage = folder.once(
        f"probe-{name}", _score, keep=False, criterion=name, base=base, text=text, execution={"load": load}
    )
    return stage.record


def _score(
    output: Path, *, criterion: str, base: Artifact, text: ProbeText, load: Callable[[], PreTrainedModel]
) -> dict[str, Any]:
    started, cpu_started = time.perf_counter(), time.process_time()
    model = load()
    device = next(model.parameters()).device
    limit = longest_sequence(model)
    length = max(ids.shape[1] for ids in text.sequences.values())
    if limit is not None and length > limit:
        raise EloError(f"probe: sequence length {length}: the model has {limit} positions; write at most {limit}")
    sequences = {language: ids.to(device) for language, ids in text.sequences.items()}
    autocast = torch.bfloat16 if bf16_pays(device.type) else None
    scores = CRITERIA[criterion].score(Subject(model, sequences, text.sentences, autocast))
    return {
        "label": CRITERIA[criterion].label,
        "scores": scores,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def frozen_model(base: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Load a model with all parameters frozen."""
    model = load_model(str(base), trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    return model


def _resolve_criteria(criteria: Sequence[str], has_parallel: bool) -> list[str]:
    for name in criteria:
        if name not in CRITERIA:
            raise EloError(f"criteria: there is no {name!r}; choose among {', '.join(CRITERIA)}")
        if CRITERIA[name].needs_parallel and not has_parallel:
            raise EloError(f"criteria: {name} needs parallel text; give --parallel FILE")
    allowed = [name for name, each in CRITERIA.items() if has_parallel or not each.needs_parallel]
    return list(criteria) or allowed


def layers_to_keep(
    model: str,
    selection: str,
    *,
    saved: Path | None = None,
    corpora: Mapping[str, str] | None = None,
    output: Path | None = None,
    **arguments: Any,
) -> tuple[tuple[int, ...], str]:
    """Choose the layers of a smaller model by `auto:K` or `auto:CRITERION:K`.

    Args:
        model: checkpoint folder or hub id.
        selection: `auto:K` or `auto:CRITERION:K`.
        saved: probe.json of the model; None probes the model on `corpora`.
        corpora: text by language, for a new probe.
        output: folder of a new probe.
        arguments: further arguments of `probe`.

    Returns:
        The layers in ascending order, and the reason for the choice.

    Raises:
        EloError: the selection does not suit the model, the scores or the text, or there is nothing to score by.
    """
    auto = parse_auto(selection)
    assert auto is not None
    criterion = auto.criterion or TO_KEEP
    if saved is None:
        if not corpora or output is None:
            raise EloError(
                f"layers: {selection}: needs the scores of the layers; give --corpus LANGUAGE=FILE or --probe FILE"
            )
        check_auto(
            AutoLayers(criterion, auto.count),
            auto.count + 1,
            has_parallel=bool(arguments.get("parallel")),
            where=selection,
        )
        found = probe(model, corpora, output=output, criteria=[criterion], **arguments)
    else:
        found = read_probe(saved)
    if criterion not in found["criteria"]:
        raise EloError(f"{saved}: has no scores by {criterion}; probe again with this criterion")
    check_auto(AutoLayers(None, auto.count), found["num_layers"], has_parallel=True, where=selection)
    scores: Scores = found["criteria"][criterion]["scores"]
    choice = choose(scores, criterion, auto.count, "layer", found["languages"])
    return choice.layers, choice.reason


def read_probe(path: Path) -> dict[str, Any]:
    """Read the file that `probe` wrote.

    Raises:
        EloError: the file cannot be read or has another content.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "probe":
        raise EloError(f"{path}: is not a {FILE_NAME}; give the file that `elo probe` wrote")
    return found


def _print_table(results: dict[str, Any]) -> None:
    table = Table(title=f"{results['model']}: most important of {results['num_layers']} layers", title_justify="left")
    for heading in ("criterion", "module", "layers, best first (mean over languages)"):
        table.add_column(heading)
    for name, record in results["criteria"].items():
        for which in MODULES:
            means = mean_scores(record["scores"], which, results["languages"])
            best = sorted(range(len(means)), key=means.__getitem__, reverse=True)[:6]
            shown = ", ".join(f"{index} ({means[index]:.3g})" for index in best)
            table.add_row(name if which == "layer" else "", which, shown)
    Console().print(table)
