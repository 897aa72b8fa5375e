"""Convert the records of stages and evaluations to the results schema."""

from collections.abc import Mapping
from typing import Any

from elo.evaluate.base import MeasureValue
from elo.report.schema import (
    ChatModel,
    EvaluationPoint,
    Generation,
    LossPoint,
    Measured,
    Sample,
    StageCost,
    TextSize,
    Trial,
)

Stages = Mapping[str, Mapping[str, Any]]
"""Record by stage, in the order in which the stages ran."""


def measured(record: Mapping[str, Any]) -> Measured:
    """Return what an evaluation record (the output of `elo.evaluate`) contains."""
    nats, sizes = record.get("documents_nats", {}), record.get("documents_bytes", {})
    heldout = record.get("heldout") or record.get("corpora", {})
    return Measured(
        bpb=record["bpb"],
        heldout={language: _text_size(size) for language, size in heldout.items()},
        # Four digits keep a relative precision of 1e-6 even for a short document.
        document_nats={language: tuple(round(each, 4) for each in values) for language, values in nats.items()},
        document_bytes={language: tuple(sizes[language]) for language in nats},
        measures=tuple(MeasureValue.model_validate(value) for value in record.get("measures", [])),
        samples=tuple(Sample.model_validate(sample) for sample in record.get("samples", [])),
        generation={
            language: Generation.model_validate(written) for language, written in record.get("generation", {}).items()
        },
    )


def trial(
    contestant: str,
    budget: str,
    seed: int,
    stages: Stages,
    final: Mapping[str, Any] | None,
    *,
    before_alignment: Mapping[str, Any] | None = None,
    learning_rates: Mapping[str, float] | None = None,
    validation: Mapping[str, Any] | None = None,
    flops: Mapping[str, float] | None = None,
) -> Trial:
    """Return a finished trial.

    Args:
        stages: records of the stages whose cost counts.
        final: evaluation record of the final model on held-out text; None if only `validation` was measured.
        before_alignment: evaluation record of the attached model before layer alignment.
        learning_rates: peak learning rate by phase.
        validation: evaluation record on validation text.
        flops: training FLOPs by stage.
    """
    losses, evaluations = curves(stages)
    return Trial(
        contestant=contestant,
        budget=budget,
        seed=seed,
        learning_rates=dict(learning_rates or {}),
        measured=Measured() if final is None else measured(final),
        before_alignment=None if before_alignment is None else measured(before_alignment),
        validation=None if validation is None else measured(validation),
        attach_scale=stages.get("scale", {}).get("scale"),
        stages=stage_costs(stages, flops or {}),
        losses=losses,
        evaluations=evaluations,
        warnings=tuple(text for record in stages.values() for text in record.get("warnings", [])),
    )


def chat_model(name: str, stage: Mapping[str, Any], evaluation: Mapping[str, Any]) -> ChatModel:
    """Return a chat model, from the record of its stage (empty if none made it) and its evaluation record."""
    cost = stage_costs({name: stage}, {})[0] if stage else None
    return ChatModel(name=name, stage=cost, measured=measured(evaluation))


def stage_costs(stages: Stages, flops: Mapping[str, float]) -> tuple[StageCost, ...]:
    """Return the costs of the stages. Training between `detach` and `attach` is that of a detached model."""
    found = []
    detached = False
    for name, record in stages.items():
        detached = (detached or name == "detach") and name != "attach"
        costs = {key: record[key] for key in _COSTS if record.get(key) is not None}
        trains = bool(record.get("tokens"))
        found.append(StageCost(name=name, flops=flops.get(name), detached=detached and trains, **costs))
    return tuple(found)


_COSTS = ("seconds", "cpu_seconds", "tokens", "tokens_per_second", "peak_memory_bytes", "trainable_parameters")


def curves(stages: Stages) -> tuple[tuple[LossPoint, ...], tuple[EvaluationPoint, ...]]:
    """Return loss and evaluation points, with tokens and seconds counted from the start of the trial."""
    losses, evaluations = [], []
    tokens, seconds = 0, 0.0
    for stage, record in stages.items():
        for point in record.get("losses", []):
            at = {"tokens": point["tokens"] + tokens, "seconds": point["seconds"] + seconds}
            losses.append(LossPoint(stage=stage, loss=point["loss"], internal=point.get("internal", {}), **at))
        for point in record.get("evaluations", []):
            at = {"tokens": point["tokens"] + tokens, "seconds": point["seconds"] + seconds}
            evaluations.append(EvaluationPoint(stage=stage, bpb=point["bpb"], measures=point.get("measures", ()), **at))
        tokens += record["tokens"]
        seconds += record["seconds"]
    return tuple(losses), tuple(evaluations)


def _text_size(record: Mapping[str, Any]) -> TextSize:
    tokens = record.get("tokens", record.get("text_tokens"))
    return TextSize(documents=record.get("documents"), tokens=tokens, bytes=record.get("bytes"))
