"""The results and the report of a run, finished or not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elo.checkpoint.counting import footprint, read_config
from elo.circumstances import circumstances
from elo.data.shards import PreparedData
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.final_model import CONFIG_FILE, write_final_model
from elo.format import listed
from elo.inputs import Adapted, Inputs
from elo.report import collect, schema
from elo.report.card import model_card, run_chat_card
from elo.report.files import judged, write_results
from elo.report.write import report, show
from elo.store.files import read_record
from elo.store.processes import is_main


def write_report(
    inputs: Inputs,
    data: PreparedData,
    base: dict[str, Any],
    adapted: Adapted,
    final: dict[str, Any],
    chats: Sequence[schema.ChatModel] = (),
) -> dict[str, Any]:
    """Write results.json, the report and the folders of the final models, and show the table."""
    folder = inputs.folder
    results = _results(inputs, data, base, adapted, final, flops=training_flops(inputs, adapted), chats=chats)
    if is_main():
        write_results(folder.path(schema.FILE_NAME), results)
        report(results, folder.root)
        config = inputs.config.model_dump(mode="json")
        card = model_card(results, inputs.base.path, CONFIG_FILE)
        write_final_model(folder.path("model"), adapted.model.path, card, config, CONFIG_FILE)
        if chat := inputs.config.chat:
            trust = inputs.config.trust_remote_code
            given = resolve_checkpoint(chat.model, trust_remote_code=trust) if chat.model else None
            card = run_chat_card(results, chat, inputs.base.path, given, CONFIG_FILE)
            write_final_model(folder.path("chat"), folder.path(chats[-1].name), card, config, CONFIG_FILE)
        show(results)
        folder.say(f"report: {folder.path('report.html')}")
        folder.say(f"model: {folder.path('model')}")
        if chats:
            folder.say(f"chat model: {folder.path('chat')}")
    return results.model_dump(mode="json")


def report_progress(
    inputs: Inputs, data: PreparedData, base: dict[str, Any], adapted: Adapted, phase: str, point: dict[str, Any]
) -> None:
    """Write the report of an unfinished run, with the curves of the phase that is training.

    results.json is written at the end only.
    """
    if not is_main():
        return
    live = read_record(inputs.folder.stage_file(phase, "live")) or {}
    losses, evaluations = live.get("losses", []), live.get("evaluations", [])
    now = {"tokens": int(live.get("done") or 0), "seconds": losses[-1]["seconds"] if losses else 0.0}
    record = now | {"losses": losses, "evaluations": [*evaluations, now | point]}
    so_far = replace(adapted, records={**adapted.records, phase: record})
    try:
        report(_results(inputs, data, base, so_far, {"bpb": point["bpb"]}, in_progress=True), inputs.folder.root)
    except EloError as error:  # such as `elo report` at the same time; training goes on
        inputs.folder.say(f"warning: no report of the unfinished run: {error}")


def _results(
    inputs: Inputs,
    data: PreparedData,
    base: dict[str, Any],
    adapted: Adapted,
    final: dict[str, Any],
    *,
    flops: dict[str, float] | None = None,
    chats: Sequence[schema.ChatModel] = (),
    in_progress: bool = False,
) -> schema.Results:
    config, method = inputs.config, inputs.config.method
    tokens = max(1, sum(record["tokens"] for record in adapted.records.values()))
    budget = {"name": f"{tokens:,} tokens", "kind": "tokens", "value": tokens}
    rates = {phase.name: config.settings(phase).learning_rate for phase in method.phases}
    trial = collect.trial(
        method.name,
        budget["name"],
        config.seed,
        adapted.records,
        final,
        before_alignment=adapted.before_alignment,
        learning_rates=rates,
        flops=flops,
    )
    return judged(
        schema.Results.model_validate(
            {
                **circumstances(config, inputs.base.path, data),
                "schema_version": schema.SCHEMA_VERSION,
                "kind": "run",
                "title": config.title or f"{Path(config.model).name} learns {listed(config.data.targets)}",
                "config": config.model_dump(mode="json"),
                "base": collect.measured(base),
                "contestants": [
                    {
                        "name": method.name,
                        "label": method.label,
                        "method": method.name,
                        "layers": inputs.layers,
                        "layers_reason": inputs.layers_reason,
                    }
                ],
                "budgets": [budget],
                "seeds": [config.seed],
                "trials": [trial],
                "chat": chats,
                "in_progress": in_progress,
            }
        )
    )


def training_flops(inputs: Inputs, adapted: Adapted) -> dict[str, float]:
    """Return the matmul FLOPs of training by phase, without those of fitting a bridge or searching a scale."""
    config = inputs.config
    trust = config.trust_remote_code
    counted = footprint(read_config(str(inputs.base.path), trust_remote_code=trust), trust_remote_code=trust)
    found = {}
    for phase in config.method.phases:
        rows = adapted.records.get(f"vocabulary-{phase.name}", {}).get("rows")
        of_phase = counted.with_vocabulary(rows) if rows else counted
        num_losses = config.settings(phase).num_losses
        per_token = config.method.flops_per_token(
            phase, of_phase, inputs.layers, config.data.sequence_length, num_losses=num_losses
        )
        found[phase.name] = adapted.records[phase.name]["tokens"] * per_token.total
    return found
