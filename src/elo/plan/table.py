"""Render a plan as tables for a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from elo.format import count, duration
from elo.plan.devices import GIB
from elo.plan.schema import MethodPlan, PhasePlan, Plan

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "bf16 weight copies": "bf16 copies",
    "activations": "activations",
    "logits": "logits",
    "workspace": "workspace",
    "held by malloc": "malloc",
    "runtime": "runtime",
}


def render_plan(plan: Plan) -> RenderableType:
    """Render tables of time, cost, speed-ups and memory, followed by the assumptions behind the numbers."""
    parts: list[RenderableType] = [_headline(plan), _time(plan), _memory(plan)]
    lines = [
        f"{_phase_label(method, phase)} does not fit"
        + (f"; it fits with {' and '.join(phase.suggestion)}" if phase.suggestion else "")
        for method in plan.methods
        for phase in method.phases
        if not phase.fits
    ]
    if lines:
        parts.append("\n".join(lines) + "\n")
    parts.append("Notes\n" + "\n".join(f"  {note}" for note in plan.notes))
    return Group(*parts)


def _headline(plan: Plan) -> str:
    model, device = plan.model, plan.device
    active = model.active_parameters
    experts = f", {count(active)} used per token" if active != model.total_parameters else ""
    head = "tied to the embedding" if model.tied else count(model.head_parameters)
    sizes = sorted(set(model.layer_parameters))
    each = count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"
    cut = (
        "" if model.vocabulary_rows == model.vocab_size else f"; {model.vocabulary_rows:,} vocabulary rows in training"
    )
    chosen = f"selected layers {', '.join(map(str, model.layers))}; " if model.layers else ""
    return (
        f"{model.name} ({model.model_type}): {count(model.total_parameters)} parameters{experts}\n"
        f"  embedding {count(model.embedding_parameters)}, head {head}, {model.num_layers} layers of {each}{cut}\n"
        f"  {chosen}{device.count} x {device.name}, {device.memory_bytes / GIB:.1f} GiB each\n"
    )


def _time(plan: Plan) -> Table:
    priced = plan.device.price_per_hour is not None
    table = _table("Time and cost")
    for name in ("trained", "tokens", "GFLOP/token", "tokens/h", "time", "device h", *(["cost"] if priced else [])):
        table.add_column(name, justify="right")
    table.add_column("speed-up\nFLOPs / time", justify="right")
    faster = {each.over: f"{each.flops:.1f}x / {each.seconds:.1f}x" for each in plan.speed_ups}
    for method in plan.methods:
        for phase in method.phases:
            table.add_row(
                _phase_label(method, phase),
                count(phase.trainable_parameters),
                *_cost(phase, priced),
                faster.get(method.name, "") if len(method.phases) == 1 else "",
            )
        if len(method.phases) > 1:
            table.add_row(f"{method.label}, total", "", *_cost(method, priced), faster.get(method.name, ""))
        if method is plan.run:
            table.add_section()
    return table


def _cost(planned: PhasePlan | MethodPlan, priced: bool) -> list[str]:
    return [
        count(planned.tokens),
        f"{planned.flops / planned.tokens / 1e9:.3g}",
        count(3600 * planned.tokens / planned.seconds),
        duration(planned.seconds),
        f"{planned.device_hours:.3g}",
        *([f"{planned.cost:,.2f}"] if priced else []),
    ]


def _memory(plan: Plan) -> Table:
    table = _table("Peak memory of one device, GiB")
    phases = [(method, phase) for method in plan.methods for phase in method.phases]
    shown = [name for name in _PARTS if any(name in phase.memory.parts for _, phase in phases)]
    for name in (*(_PARTS[name] for name in shown), "peak", "peak at", "fits"):
        table.add_column(name, justify="right")
    for method, phase in phases:
        parts = phase.memory.parts
        cells = [_gib(parts[name]) if name in parts else "-" for name in shown]
        cells += [_gib(phase.memory.peak_bytes), phase.memory.moment, "yes" if phase.fits else "no"]
        table.add_row(_phase_label(method, phase), *cells, end_section=phase is plan.run.phases[-1])
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    return table


def _phase_label(method: MethodPlan, phase: PhasePlan) -> str:
    return method.label if len(method.phases) == 1 else f"{method.label}: {phase.name.replace('_', ' ')}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}"
