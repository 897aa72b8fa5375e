"""`elo chat`: run the chat stages on a model that is already adapted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from elo.chat.stages import ChatInputs, chat_models, open_chat
from elo.config import EvaluationConfig, load_chat
from elo.detach_attach import resolve_checkpoint
from elo.errors import EloError
from elo.final_model import write_final_model
from elo.identities import checkpoint_identity
from elo.report import collect, schema
from elo.report.card import chat_card
from elo.report.page import rich_table
from elo.report.tables import chat_table, named_chat_models
from elo.stages import measure
from elo.store.files import write_json
from elo.store.processes import is_main
from elo.store.run_folder import Artifact, RunFolder, file_identity

RESULTS_FILE = "chat.json"
CONFIG_FILE = "elo_chat.yaml"


def chat(
    model: str | Path,
    section: Mapping[str, Any],
    *,
    output: str | Path,
    overrides: list[str] | None = None,
    seed: int = 42,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run the chat stages on an adapted model, or resume an interrupted run of them, and measure before and after.

    Args:
        model: checkpoint folder or hub id of the adapted model.
        section: section `chat` of a run's configuration, with `base` if it has a `model`.
        output: run folder. OUTPUT/chat is the chat model, OUTPUT/chat.json holds the results.
        overrides: `key.path=value`, applied to the section.
        seed: seed of the order of the conversations and all other random choices.
        trust_remote_code: run Python code that ships with the checkpoints.

    Returns:
        The results, as written to chat.json: {"schema", "kind", "model", "config", "models"}; `models` holds what was
        measured of the adapted model, the given chat model and each stage's (docs/results.md, ChatModel).

    Raises:
        EloError: the section or an input is invalid.
    """
    config = load_chat({key: value for key, value in section.items() if value is not None}, overrides)
    if config.model is not None and config.base is None:
        raise EloError("chat: the chat model's base is missing; give --base (key base)")
    folder = RunFolder(Path(output))
    if folder.root.is_dir() and any(folder.root.iterdir()) and not folder.path("stages").is_dir():
        raise EloError(f"{output}: the folder is not empty and is not an ELO run; choose another")
    source = resolve_checkpoint(model, trust_remote_code=trust_remote_code)
    adapted = Artifact(source, checkpoint_identity(source))
    with folder.locked():
        if is_main():
            folder.sweep()
        inputs = open_chat(
            config,
            folder,
            model=source,
            tokenizer=str(source),
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        models = []
        if inputs.fits_base:
            models.append(_measured(inputs, "adapted", adapted, inputs.tokenizer))
        if inputs.model is not None:
            models.append(_measured(inputs, "chat_model", inputs.model, str(inputs.model.path)))
        for name, artifact in chat_models(inputs, adapted, str(source)):
            models.append(_measured(inputs, name, artifact, str(artifact.path)))
        results = {
            "schema": 1,
            "kind": "chat",
            "model": str(model),
            "config": config.model_dump(mode="json"),
            "models": [each.model_dump(mode="json") for each in models],
        }
        if is_main():
            write_json(folder.path(RESULTS_FILE), results)
            measured, given = named_chat_models(models), inputs.model.path if inputs.model else None
            card = chat_card(str(model), config, measured, source, given)
            last = folder.path(config.stages[-1])
            write_final_model(folder.path("chat"), last, card, {"chat": results["config"]}, CONFIG_FILE)
            table = chat_table(measured)
            if table is not None and any(each.measured.measures for each in models):
                Console().print(rich_table(table, "Chat models"))
            folder.say(f"chat model: {folder.path('chat')}")
        return results


def _measured(inputs: ChatInputs, name: str, model: Artifact, tokenizer: str) -> schema.ChatModel:
    questions = inputs.measure(tokenizer)
    stage = inputs.folder.once(
        f"evaluate-{name}",
        measure,
        keep=False,
        model=model,
        corpora={},
        evaluation=EvaluationConfig().model_copy(update={"chat": questions}),
        files={str(path): file_identity(path) for path in (questions.files() if questions else ())},
        brief=False,
        sequence_length=None,
        split_special_tokens=True,
        execution={"tokenizer": tokenizer, "trust_remote_code": inputs.trust_remote_code},
    )
    return collect.chat_model(name, model.record, stage.record)
