"""Model cards: origin, data, cost, results and limits of what a run, `elo chat`, `chat-vector` or `merge` leaves."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from elo.checkpoint.folder import CARD_FILE
from elo.config import ChatConfig
from elo.format import count, learning_rate, listed
from elo.report.page import render_markdown, setting_facts
from elo.report.schema import Results
from elo.report.tables import (
    Cell,
    Column,
    Measurement,
    Table,
    chat_measurements,
    chat_table,
    data_table,
    measures_table,
    results_table,
    stages_table,
)
from elo.report.verdict import judge

_LICENCE_KEYS = ("license", "license_name", "license_link")
_NO_INSTRUCTIONS = (
    "Trained to predict text. It was not trained to follow instructions or to refuse harmful requests; continual "
    "pretraining can weaken such abilities of the base."
)
_CHAT_LIMIT = (
    "Whether it refuses harmful requests was not measured. Continual pretraining and fine-tuning can weaken that, also "
    "where the given chat model does it."
)
_UNMEASURED = "Nothing was measured of this model."
_ALWAYS = (
    "Errors and biases of the base and of the training text remain.",
    "Measured on the held-out text above; other text and tasks can differ.",
)
_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")"""
_TALK = """
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


@dataclass(frozen=True)
class _Section:
    """A heading of a card with facts, tables and a list of sentences."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()


def model_card(results: Results, base: Path, config_file: str) -> str:
    """Return README.md of a run's final model, with the metadata that the Hugging Face hub reads.

    Args:
        base: folder of the base, whose README.md may name a licence.
        config_file: name of the file with the resolved configuration.
    """
    contestant, budget, verdict = results.contestants[0], results.budgets[0], judge(results)
    targets, sources = (", ".join(names) for names in (results.languages.targets, results.languages.sources))
    measured = [results_table(results, budget, verdict.budgets[0]), measures_table(results, budget)]
    return _card(
        results.title,
        f"{_shown(results.model.name)}, adapted to {targets} by {contestant.title}"
        + (f", with text in {sources} replayed" if sources and results.data.replay_ratio else "")
        + ". An ordinary Hugging Face checkpoint.",
        [
            *_adaptation(results, config_file),
            _Section("Results", (), [table for table in measured if table], verdict.budgets[0].sentences),
            _Section("Limits", points=(*verdict.warnings, _NO_INSTRUCTIONS, *_ALWAYS)),
        ],
        languages=results.languages.all,
        models=[results.model.name],
        tags=["continual-pretraining", "language-adaptation", contestant.method],
        origins=[("The base", base)],
        kept=base,
    )


def run_chat_card(results: Results, config: ChatConfig, base: Path, chat: Path | None, config_file: str) -> str:
    """Return README.md of a run's chat model.

    Args:
        base: folder of the base.
        chat: folder of the given chat model; None if there is none.
        config_file: name of the file with the resolved configuration.
    """
    trials = results.finished(results.contestants[0].name, results.budgets[0].name)
    return chat_card(
        results.model.name,
        config,
        chat_measurements(results, trials),
        base,
        chat,
        before=_adaptation(results, config_file),
        warnings=judge(results).warnings,
    )


def chat_card(
    model: str,
    config: ChatConfig,
    measured: Sequence[Measurement],
    base: Path,
    chat: Path | None,
    *,
    before: Sequence[_Section] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Return README.md of a chat model.

    Args:
        model: folder or hub id of the model that the chat stages started from.
        measured: what was measured of it and of every chat model.
        base: its folder.
        chat: folder of the given chat model; None if there is none.
        before: sections about how that model was made.
        warnings: warnings of that run.
    """
    stages = {"chat_vector": f"the chat vector of {_shown(config.model or '')}", "sft": "supervised fine-tuning"}
    table = chat_table(measured)
    vector = [
        ("Chat model", _shown(config.model or "")),
        ("Factor of its change", f"{config.scale:g}" if config.model else ""),
        ("Not added to", ", ".join(config.leave_out)),
    ]
    tuning = [
        (f"Conversations, {language}", ", ".join(Path(path).name for path in files))
        for language, files in config.data.items()
    ]
    if config.data:
        rate = learning_rate(config.settings.learning_rate)
        tuning.append(("Fine-tuning", f"{config.method.label}, {config.epochs} epochs, learning rate {rate}"))
    return _card(
        f"{_shown(model)}, chat model",
        f"{_shown(model)}{', adapted,' if before else ''} with {' and '.join(stages[each] for each in config.stages)}. "
        "An ordinary Hugging Face checkpoint with a chat template.",
        [
            *(before or [_Section("Base", [("Model", _shown(model))])]),
            _Section("Chat", _facts(*vector, *tuning)),
            _Section("Results", (), [table] if table else ()),
            _Section("Limits", points=(*warnings, _CHAT_LIMIT, *_ALWAYS)),
        ],
        languages=tuple(dict.fromkeys(language for _, each, _ in measured for language in each.bpb)) or (*config.data,),
        models=[model, config.model or ""],
        tags=["chat", *config.stages],
        origins=[("The base", base), *([("The chat model", chat)] if chat else [])],
        kept=chat if chat and (chat / CARD_FILE).is_file() else base,
        usage=_USE + _TALK,
    )


def chat_vector_card(
    adapted: str, base: str, chat: str, adapted_folder: Path, chat_folder: Path, scale: float, leave_out: Sequence[str]
) -> str:
    """Return README.md of the output of `elo chat-vector`.

    Args:
        adapted, base, chat: folders or hub ids as they were given.
        scale: factor of the chat model's change.
        leave_out: parts to which it is not added.
    """
    return _card(
        f"{_shown(adapted)}, chat model",
        f"{_shown(adapted)} with the chat vector of {_shown(chat)}. An ordinary Hugging Face checkpoint.",
        [
            _Section(
                "Chat vector",
                _facts(
                    ("Adapted model", _shown(adapted)),
                    ("Base", _shown(base)),
                    ("Chat model", _shown(chat)),
                    ("Factor of its change", f"{scale:g}"),
                    ("Not added to", ", ".join(leave_out)),
                ),
            ),
            _Section("Limits", points=(_UNMEASURED, _CHAT_LIMIT)),
        ],
        models=[adapted, chat],
        tags=["chat", "chat_vector"],
        origins=[("The adapted model", adapted_folder), ("The chat model", chat_folder)],
        kept=chat_folder if (chat_folder / CARD_FILE).is_file() else adapted_folder,
        usage=_USE + _TALK,
    )


def merge_card(record: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """Return README.md of a merge.

    Args:
        record: content of elo_merge.json.
        folders: folders of the models, in its order.
    """
    names = [_shown(each) for each in record["models"]]
    search = record["search"]
    weight = f"{record['weight']:g}, of {names[1]}" if "weight" in record else ""
    return _card(
        f"Merge of {listed(names)}",
        f"{listed(names)}, merged by the method {record['method']}. An ordinary Hugging Face checkpoint.",
        [
            _Section("Merge", _facts(("Weight", weight), ("All settings", "elo_merge.json"))),
            _Section("Results", (), [_search_table(search, names[1])] if search else ()),
            _Section("Limits", points=("The text of this table chose the weight." if search else _UNMEASURED,)),
        ],
        models=record["models"],
        tags=["merge"],
        origins=list(zip(names, folders, strict=True)),
        kept=folders[0],
    )


def _search_table(search: Mapping[str, Any], second: str) -> Table:
    """Return the bits per byte of each weight that was tried, and of the reference."""
    languages = list(search["reference"]["bpb"])
    rows = [(f"{each['weight']:g}", each["bpb"], each["weight"] == search["weight"]) for each in search["tried"]]
    rows.append((_shown(search["reference"]["model"]), search["reference"]["bpb"], False))
    return Table(
        (Column(f"Weight of {second}", is_text=True), *(Column(language, "bpb ↓") for language in languages)),
        tuple(
            (Cell(name, bold=chosen), *(Cell(f"{bpb[each]:.3f}", bold=chosen) for each in languages))
            for name, bpb, chosen in rows
        ),
        "bpb: bits per byte, lower is better. Bold: the weight of this merge.",
    )


def _adaptation(results: Results, config_file: str) -> list[_Section]:
    """Return the sections about base, data, method and cost of a run."""
    contestant, budget, languages = results.contestants[0], results.budgets[0], results.languages
    (trial,) = results.finished(contestant.name, budget.name)[:1]
    size = results.model.parameters
    data, costs = data_table(results.data, results.base), stages_table(results, [trial])
    return [
        _Section(
            "Base",
            _facts(
                ("Model", _shown(results.model.name)),
                ("Size", f"{count(size)} parameters, {results.model.num_layers} decoder layers" if size else ""),
            ),
        ),
        _Section(
            "Data",
            _facts(
                ("Target languages", ", ".join(languages.targets)),
                ("Source languages", ", ".join(languages.sources)),
                *_corpora(results),
            ),
            [data] if data else (),
        ),
        _Section(
            "Method",
            _facts(
                ("Method", f"{contestant.method} ({contestant.title})"),
                ("Layers", ", ".join(map(str, contestant.layers))),
                ("Tokens", f"{trial.tokens:,}"),
                ("Learning rate", _rates(trial.learning_rates)),
                ("Factor on the trained change", f"{trial.attach_scale:g}" if trial.attach_scale is not None else ""),
                ("Seed", str(trial.seed)),
                ("All settings", f"{config_file}, which elo run accepts"),
            ),
        ),
        _Section("Cost", setting_facts(results), [costs] if costs else ()),
    ]


def _card(
    title: str,
    intro: str,
    sections: Sequence[_Section],
    *,
    models: Sequence[str],
    tags: Sequence[str],
    origins: Sequence[tuple[str, Path]],
    kept: Path,
    languages: Sequence[str] = (),
    usage: str = _USE,
) -> str:
    """Return a card.

    Args:
        models: models that this one was made from; those with a hub id are named in the metadata.
        origins: these models, as the card calls them, and their folders, for their licences.
        kept: the one whose README.md is kept as README_base.md.
    """
    licences = [base_licence(folder) for _, folder in origins]
    licence = [_licence_sentence(who, folder, is_kept=folder == kept) for who, folder in origins]
    licence.append("Licence and terms of the training text are not known to the tool; add them before you publish.")
    on_hub = [name for name in models if _is_hub_id(name)]
    metadata = ModelCardData(
        language=[each for each in languages if re.fullmatch(r"[a-z]{2,3}", each)] or None,
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["elo", *tags],
        **(licences[0] if all(each == licences[0] for each in licences) else {}),
    )
    sections = [*sections, _Section("Licence", points=licence)]
    context = {"title": title, "intro": intro, "usage": usage, "sections": [each for each in sections if _holds(each)]}
    return f"---\n{metadata.to_yaml()}\n---\n\n{render_markdown('model_card.md.j2', context)}"


def _holds(section: _Section) -> bool:
    return any((section.facts, section.tables, section.points))


def base_licence(base: Path) -> dict[str, Any]:
    """Return the licence that the metadata of the base's README.md names; empty if it names none."""
    try:
        data = ModelCard.load(base / CARD_FILE).data.to_dict()
    except Exception:  # no such file, or metadata that the hub would reject too
        return {}
    return {key: str(data[key]) for key in _LICENCE_KEYS if data.get(key)}


def _licence_sentence(who: str, folder: Path, *, is_kept: bool) -> str:
    card = " (README_base.md)" if is_kept and (folder / CARD_FILE).is_file() else ""
    files = ", ".join(sorted(path.name for path in folder.glob("LICEN[CS]E*")))
    found = f"{who}'s card{card} names {', '.join(base_licence(folder).values()) or 'no licence'}."
    return found + (f" Its terms are in {files}." if files else "")


def _corpora(results: Results) -> list[tuple[str, str]]:
    """Return the names of the training files by language, without their folders."""
    corpora = results.config.get("data", {}).get("corpora", {})
    return [
        (f"Training text, {language}", ", ".join(Path(str(each["path"])).name for each in sources))
        for language, sources in corpora.items()
    ]


def _rates(rates: dict[str, float]) -> str:
    if len(rates) == 1:
        return learning_rate(*rates.values())
    return ", ".join(f"{phase} {learning_rate(rate)}" for phase, rate in rates.items())


def _facts(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    return [(name, text) for name, text in facts if text]


def _shown(name: str) -> str:
    """Return a hub id, or the last part of a path: a card is published, and paths are private."""
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
