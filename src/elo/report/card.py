"""The model card: origin, data, cost, results and limits of a final model."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from elo.format import count, learning_rate
from elo.report.page import render_markdown, setting_facts
from elo.report.schema import Results
from elo.report.tables import data_table, measures_table, results_table, stages_table
from elo.report.verdict import judge

_LICENCE_KEYS = ("license", "license_name", "license_link")
_ALWAYS = (
    "Trained to predict text. It was not trained to follow instructions or to refuse harmful requests; continual "
    "pretraining can weaken such abilities of the base.",
    "Errors and biases of the base and of the training text remain.",
    "Measured on the held-out text above; other text and tasks can differ.",
)


def model_card(results: Results, base: Path, config_file: str) -> str:
    """Return README.md of a run's final model, with the metadata that the Hugging Face hub reads.

    Args:
        base: folder of the base, whose README.md may name a licence.
        config_file: name of the file with the resolved configuration.
    """
    contestant, budget, verdict = results.contestants[0], results.budgets[0], judge(results)
    (trial,) = results.finished(contestant.name, budget.name)[:1]
    licence = base_licence(base)
    languages = results.languages
    name = results.model.name if _is_hub_id(results.model.name) else Path(results.model.name).name
    targets, sources = (", ".join(names) for names in (languages.targets, languages.sources))
    measured = [results_table(results, budget, verdict.budgets[0]), measures_table(results, budget)]
    size = results.model.parameters
    context: dict[str, Any] = {
        "title": results.title,
        "intro": f"{name}, adapted to {targets} by {contestant.title}"
        + (f", with text in {sources} replayed" if sources and results.data.replay_ratio else "")
        + ". An ordinary Hugging Face checkpoint.",
        "usage": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")',
        "base": _facts(
            ("Model", name),
            ("Size", f"{count(size)} parameters, {results.model.num_layers} decoder layers" if size else ""),
            ("Its own card", "README_base.md" if (base / "README.md").is_file() else ""),
        ),
        "corpora": _facts(("Target languages", targets), ("Source languages", sources), *_corpora(results)),
        "data": data_table(results.data, results.base),
        "method": _facts(
            ("Method", f"{contestant.method} ({contestant.title})"),
            ("Layers", ", ".join(map(str, contestant.layers))),
            ("Tokens", f"{trial.tokens:,}"),
            ("Learning rate", _rates(trial.learning_rates)),
            ("Factor on the trained change", f"{trial.attach_scale:g}" if trial.attach_scale is not None else ""),
            ("Seed", str(trial.seed)),
        ),
        "config_file": config_file,
        "costs": stages_table(results, [trial]),
        "circumstances": setting_facts(results),
        "results": [table for table in measured if table is not None],
        "sentences": verdict.budgets[0].sentences,
        "limits": (*verdict.warnings, *_ALWAYS),
        "licence": _licence_sentence(base, licence),
    }
    metadata = ModelCardData(
        language=[each for each in languages.all if re.fullmatch(r"[a-z]{2,3}", each)] or None,
        base_model=name if _is_hub_id(results.model.name) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["elo", "continual-pretraining", "language-adaptation", contestant.method],
        **licence,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{render_markdown('model_card.md.j2', context)}"


def base_licence(base: Path) -> dict[str, Any]:
    """Return the licence that the metadata of the base's README.md names; empty if it names none."""
    try:
        data = ModelCard.load(base / "README.md").data.to_dict()
    except Exception:  # no such file, or metadata that the hub would reject too
        return {}
    return {key: str(data[key]) for key in _LICENCE_KEYS if data.get(key)}


def _licence_sentence(base: Path, licence: dict[str, Any]) -> str:
    files = ", ".join(sorted(path.name for path in base.glob("LICEN[CS]E*")))
    found = f"The base's card names {', '.join(licence.values())}." if licence else "The base's card names no licence."
    found += f" Its terms are in {files}." if files else ""
    return f"{found} Licence and terms of the training text are not known to the tool; add them before you publish."


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


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
