"""A plan as tables on a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

_GIB = 2**30


def render_plan(plan: dict[str, Any]) -> RenderableType:
    """Tables of parameters, stages, memory and speed-ups, with what the numbers assume.

    Args:
        plan: what elo.plan.plan.plan returned.
    """
    parts: list[RenderableType] = [_headline(plan), _stages(plan), _memory(plan), _speed_ups(plan)]
    changes = [
        f"{stage['label']} does not fit. Smallest change: {stage['change']['text']}"
        for stage in _all_stages(plan)
        if stage["change"] is not None
    ]
    if changes:
        parts.append("\n".join(changes) + "\n")
    parts.append("Assumptions\n" + "\n".join(f"  {note}" for note in plan["assumptions"]))
    return Group(*parts)


def _all_stages(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [*plan["stages"].values(), *plan["baselines"].values()]


def _headline(plan: dict[str, Any]) -> str:
    model, parameters, device, settings = plan["model"], plan["parameters"], plan["device"], plan["settings"]
    kept = ", ".join(str(index) for index in model["layers"])
    active = f", {_count(parameters['active'])} active a token" if parameters["active"] != parameters["total"] else ""
    head = "tied to the embedding" if model["tied"] else _count(parameters["head"])
    layers = sorted(set(parameters["layers"]))
    sizes = _count(layers[0]) if len(layers) == 1 else f"{_count(layers[0])} to {_count(layers[-1])}"
    forward_only = settings["stand_in"] == "forward_only"
    held = f"whole: {_count(parameters['total'])}" if forward_only else f"detached: {_count(parameters['detached'])}"
    return (
        f"{model['name']} ({model['model_type']}): {_count(parameters['total'])} parameters{active}\n"
        f"  embedding {_count(parameters['embedding'])}, head {head}, {model['num_layers']} layers of {sizes}\n"
        f"  {held} parameters in memory, {_count(parameters['trainable'])} of them train: "
        f"{', '.join([f'layers {kept}', *settings['also_train']])}\n"
        f"  on {device['count']} x {device['name']}, {device['memory_bytes'] / _GIB:.1f} GiB each\n"
    )


def _stages(plan: dict[str, Any]) -> Table:
    priced = plan["device"]["price_per_hour"] is not None
    table = Table(title="Time and cost", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("tokens", "GFLOP per token", "tokens per hour", "time", "device hours", *(["cost"] if priced else [])):
        table.add_column(name, justify="right")
    for stage in plan["stages"].values():
        _stage_row(table, stage, priced)
    elo = plan["elo"]
    row = [elo["label"], _count(elo["tokens"]), f"{elo['flops'] / elo['tokens'] / 1e9:.3g}"]
    row += [_count(3600 * elo["tokens"] / elo["seconds"]), _duration(elo["seconds"]), f"{elo['device_hours']:.3g}"]
    table.add_row(*row, *([f"{elo['cost']:,.2f}"] if priced else []), style="bold", end_section=True)
    for stage in plan["baselines"].values():
        _stage_row(table, stage, priced)
    return table


def _stage_row(table: Table, stage: dict[str, Any], priced: bool) -> None:
    table.add_row(
        stage["label"],
        _count(stage["tokens"]),
        f"{stage['flops_per_token']['total'] / 1e9:.3g}",
        _count(stage["tokens_per_hour"]),
        _duration(stage["seconds"]),
        f"{stage['device_hours']:.3g}",
        *([f"{stage['cost']:,.2f}"] if priced else []),
    )


def _memory(plan: dict[str, Any]) -> Table:
    stages = _all_stages(plan)
    table = Table(
        title="Peak memory of one device, GiB", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for stage in stages:
        table.add_column(stage["label"], justify="right", min_width=max(map(len, stage["label"].split())))
    for name in (
        "weights",
        "gradients",
        "optimizer",
        "bf16 weight copies",
        "activations",
        "logits",
        "workspace",
        "runtime",
    ):
        sizes = [stage["memory"]["parts"].get(name) for stage in stages]
        if any(sizes):
            shown = ("-" if size is None else _gib(size) for size in sizes)
            table.add_row("bf16 copies" if name == "bf16 weight copies" else name, *shown)
    table.add_section()
    table.add_row("peak", *(_gib(stage["memory"]["peak"]) for stage in stages), style="bold")
    table.add_row("at the", *(stage["memory"]["moment"] for stage in stages))
    table.add_row("fits", *("yes" if stage["memory"]["fits"] else "no" for stage in stages))
    return table


def _speed_ups(plan: dict[str, Any]) -> Table:
    table = Table(
        title="Speed-up (equal tokens): of FLOPs / of wall time",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("over", no_wrap=True)
    for name in plan["speed_up"]:
        table.add_column(name.replace("elo_pretraining", "ELO pretraining").replace("_", " "), justify="right")
    for name, baseline in plan["baselines"].items():
        ratios = [speed_up[name] for speed_up in plan["speed_up"].values()]
        table.add_row(baseline["label"], *(f"{ratio['flops']:.1f}x / {ratio['seconds']:.1f}x" for ratio in ratios))
    return table


def _gib(size: float) -> str:
    gib = size / _GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}"


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} d"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"
