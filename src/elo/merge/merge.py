"""`elo merge`: merge an adapted model with its base, or with another model of the same architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo.check_output import check_output
from elo.checkpoint.folder import TEMPLATE_PATTERNS, TOKENIZER_PATTERNS, copy_side_files, copy_tokenizer, put_first
from elo.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from elo.detach_attach import check_replaceable, resolve_checkpoint
from elo.errors import EloError
from elo.evaluate.evaluate import evaluate
from elo.merge.mergekit import read_mergekit
from elo.merge.recipe import Recipe, two_models
from elo.merge.weights import merge_weights
from elo.report.card import merge_card
from elo.store.files import readable_disk_errors, scratch_directory, write_json

RECORD_FILE = "elo_merge.json"
_WEIGHTS = tuple(eighth / 8 for eighth in range(9))


@dataclass(frozen=True)
class Search:
    """Search the weight with the lowest bits per byte of the target languages.

    Attributes:
        corpora: held-out text by language.
        targets: languages whose mean bits per byte is minimised; the others are sources.
        source_limit: bits per byte that each source language may be above the base, or above the second model if there
            is no base.
        weights: weights to try.
        max_bytes: UTF-8 bytes of text per language; None takes all.
    """

    corpora: Mapping[str, str | Path]
    targets: Sequence[str]
    source_limit: float = 0.02
    weights: Sequence[float] = _WEIGHTS
    max_bytes: int | None = None

    def check(self) -> None:
        """Raise EloError if a target has no text, or there is nothing to try."""
        if not self.targets or not self.weights:
            raise EloError("--search: needs --target LANGUAGE and at least one weight")
        for language in self.targets:
            if language not in self.corpora:
                raise EloError(f"--target {language}: has no text; give --corpus {language}=FILE")

    def bits_per_byte(self, folder: Path, trust_remote_code: bool) -> dict[str, float]:
        """Measure a model on the text of all languages."""
        measured = evaluate(
            folder,
            corpora=self.corpora,
            max_bytes=self.max_bytes,
            trust_remote_code=trust_remote_code,
            progress=False,
        )
        found: dict[str, float] = measured["bpb"]
        return found

    def choose(self, reference: Mapping[str, float], tried: Sequence[Mapping[str, Any]]) -> float:
        """Return the best weight.

        Raises:
            EloError: no weight keeps the source languages within the limit.
        """
        sources = [language for language in self.corpora if language not in self.targets]

        def excess(bpb: Mapping[str, float]) -> float:
            return max((bpb[language] - reference[language] for language in sources), default=0.0)

        held = [each for each in tried if excess(each["bpb"]) <= self.source_limit]
        if not held:
            nearest = min(tried, key=lambda each: excess(each["bpb"]))
            raise EloError(
                f"--source-limit {self.source_limit:g}: no weight keeps {', '.join(sources)} within it; the nearest is "
                f"weight {nearest['weight']:g} with {excess(nearest['bpb']):.3f} bits per byte above; raise the limit"
            )
        return float(min(held, key=lambda each: sum(each["bpb"][name] for name in self.targets))["weight"])


def merge(
    model: str | Path,
    other: str | Path | None = None,
    *,
    output: str | Path,
    method: str | None = None,
    weight: float | None = None,
    base: str | Path | None = None,
    search: Search | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a merge of two models, or the merge that a mergekit file describes.

    Names, dtypes and other files are the first model's. Vocabulary rows that one model alone has are kept from it, with
    its tokenizer.

    Args:
        model: checkpoint folder or hub id; without `other`, a YAML file.
        other: checkpoint folder or hub id of the second model. Without it, the file has all settings.
        output: folder to write. It appears only when complete.
        method: "linear" (default): (1 - weight) * model + weight * other; "slerp": the same on the arc between both;
            "task_arithmetic": model + weight * (other - base).
        weight: how much of `other` to take, by default 0.5; 0 is `model`.
        base: base of both models, for task_arithmetic.
        search: how to search the weight; None uses `weight`.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoints' own Python code to define the model.

    Returns:
        {"method", "models", settings of the merge, "search" (weights tried and their bits per byte, or None)}, which is
        also written to elo_merge.json in the output, and what elo.merge.weights.merge_weights returns.

    Raises:
        EloError: a model cannot be used, the models do not match, or no weight keeps the source languages.
    """
    target = Path(output)
    check_replaceable(target, overwrite)
    if other is None:
        if not Path(model).is_file():
            raise EloError(f"{model}: is not a file; give a YAML file, or the second model with --with MODEL")
        if any(given is not None for given in (method, weight, base, search)):
            raise EloError(
                f"{model}: a YAML file has its own method, weights and base; remove --method, --weight, --base and "
                "--search, or give two models, the second with --with MODEL"
            )
        recipe = read_mergekit(Path(model), trust_remote_code=trust_remote_code)
    else:
        models = tuple(str(each) for each in (model, other, base) if each is not None)
        recipe = two_models(method or "linear", models, 0.5 if weight is None else weight)
    if search is not None:
        if weight is not None:
            raise EloError(f"--weight {weight:g}: --search chooses the weight; remove one of the two")
        search.check()
    folders = [resolve_checkpoint(each, trust_remote_code=trust_remote_code) for each in recipe.models]
    with readable_disk_errors(target):
        tokenizer = _tokenizer_folder(folders, trust_remote_code)
        searched = None
        if search is not None:
            searched = _search(search, recipe, folders, tokenizer or folders[0], target, trust_remote_code)
            recipe = two_models(recipe.method, recipe.models, searched["weight"])
        given = {"method": recipe.method, "models": list(recipe.models), **recipe.settings, "search": searched}

        def copy_files(folder: Path) -> None:
            write_json(folder / RECORD_FILE, given)
            if tokenizer is not None and tokenizer != folders[0]:
                copy_tokenizer(tokenizer, folder)
                without: tuple[str, ...] = (*TOKENIZER_PATTERNS, *TEMPLATE_PATTERNS)
            else:
                without = ()
            copy_side_files(folders[0], folder, python=trust_remote_code, leave_out=without)
            put_first(folder, merge_card(given, folders))

        record = merge_weights(
            folders,
            target,
            recipe.factors,
            copy_files=copy_files,
            check=lambda folder: check_output(
                folder, folders, remedy="give models that fit together", trust_remote_code=trust_remote_code
            ),
            dtype=recipe.dtype,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            label="merge",
        )
    return given | record


def _search(
    search: Search, recipe: Recipe, folders: Sequence[Path], tokenizer: Path, target: Path, trust_remote_code: bool
) -> dict[str, Any]:
    """Merge with each weight beside the output, measure it, and choose; one trial is on disk at a time."""
    reference = search.bits_per_byte(folders[-1], trust_remote_code)
    print(f"{recipe.models[-1]}: {_shown(reference)}", flush=True)
    tried: list[dict[str, Any]] = []
    with scratch_directory(target) as scratch:
        trial = scratch / "trial"
        for weight in search.weights:
            factors = two_models(recipe.method, recipe.models, weight).factors
            merge_weights(
                folders,
                trial,
                factors,
                copy_files=lambda folder: copy_tokenizer(tokenizer, folder),
                overwrite=True,
                trust_remote_code=trust_remote_code,
            )
            bpb = search.bits_per_byte(trial, trust_remote_code)
            tried.append({"weight": weight, "bpb": bpb})
            print(f"weight {weight:g}: {_shown(bpb)}", flush=True)
    return {
        "weight": search.choose(reference, tried),
        "targets": list(search.targets),
        "source_limit_bpb": search.source_limit,
        "reference": {"model": recipe.models[-1], "bpb": reference},
        "tried": tried,
    }


def _shown(bpb: Mapping[str, float]) -> str:
    return "bits per byte " + ", ".join(f"{language} {value:.4f}" for language, value in bpb.items())


def _tokenizer_folder(folders: Sequence[Path], trust_remote_code: bool) -> Path | None:
    """Return the first folder whose tokenizer has every token of the others, at the same id; None without tokenizers.

    Raises:
        EloError: no tokenizer has every token.
    """
    found = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    tokens = [load_tokenizer(each, trust_remote_code).backend.get_vocab(with_added_tokens=True) for each in found]
    for folder, own in zip(found, tokens, strict=True):
        if all(own.items() >= other.items() for other in tokens):
            return folder
    if not found:
        return None
    token, number = next(min(extra) for other in tokens[1:] if (extra := other.items() - tokens[0].items()))
    raise EloError(
        f"{found[0]}: no model's tokenizer has every token of the others at the same id (for example {token!r} at "
        f"{number}, which this one does not have); give models with one vocabulary, or one that extends the others'"
    )
