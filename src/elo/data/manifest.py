"""The manifest of prepared data: built from finished shards, and compared when the same data is requested again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from elo.data.corpora import CorpusTask, Preparation, dropped_examples
from elo.data.filters import FILTERS
from elo.data.shard_writer import LEFT_OUT
from elo.data.shards import MANIFEST, SCHEMA, SPLITS, PreparedData
from elo.data.tokenizing import TextCounts
from elo.errors import EloError, UnfinishedError
from elo.log import short
from elo.store.files import write_json


def make_manifest(job: Preparation, tasks: list[CorpusTask], plan: str) -> dict[str, Any]:
    """Build the manifest of finished corpora (format: `elo.data.shards`).

    Raises:
        EloError: a language has no training text.
    """
    languages: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in sorted(tasks, key=lambda task: task.split != "train"):
        splits = languages.setdefault(task.language, {split: [] for split in SPLITS})
        segments = [segment for unit in task.units for segment in job.state(unit).segments]
        counts = {name: sum(segment["counts"][name] for segment in segments) for name in segments[0]["counts"]}
        files = [[file.location, file.size] for file in task.files]
        examples = dropped_examples(job, task, counts)
        if examples:
            counts = {**counts, "dropped_examples": examples}
        # A corpus given as held-out text uses the "train" side of its segments: nothing is cut out of it.
        splits[task.split].append(_corpus(task, segments, "train", {**counts, "files": files}))
        for split in task.cut_splits:
            splits[split].append(_corpus(task, segments, split, {"files": files}))
    tokenizer = job.tokenizer
    manifest = {
        "schema": SCHEMA,
        "plan": plan,
        "dtype": tokenizer.dtype.str,
        "shard_tokens": job.shard_tokens,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "prefix_token_id": tokenizer.prefix_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "split_special_tokens": tokenizer.split_special_tokens,
        },
        "languages": languages,
    }
    _check_not_empty(languages, tasks)
    return manifest


def _corpus(task: CorpusTask, segments: list[dict[str, Any]], side: str, more: dict[str, Any]) -> dict[str, Any]:
    shards = [segment[side] for segment in segments if segment.get(side)]
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "text_tokens", "bytes")}
    return {"name": task.name, "weight": task.weight, **totals, **more, "shards": shards}


def _check_not_empty(languages: dict[str, Any], tasks: list[CorpusTask]) -> None:
    for split, language in dict.fromkeys((task.split, task.language) for task in tasks):
        corpora = languages[language][split]
        if any(corpus["documents"] for corpus in corpora):
            continue
        files = ", ".join(task.files[0].location for task in tasks if (task.split, task.language) == (split, language))
        cut = sum(corpus["documents"] for corpus in languages[language]["heldout"]) if split == "train" else 0
        chosen = sum(corpus["documents"] for corpus in languages[language]["validation"]) if split == "train" else 0
        why = (
            f"all {cut} documents were held out; lower heldout_share or provide more text"
            if cut and not chosen
            else f"all {cut + chosen} documents became held-out or validation text; lower heldout_share and "
            "validation_share, or provide more text"
            if chosen
            else "no document with text; check the files, text_column and filters"
        )
        raise EloError(f"{files}: {split} text for {language!r}: {why}")


def judge_lost_text(job: Preparation, tasks: list[CorpusTask], manifest: dict[str, Any]) -> list[str]:
    """Return a warning for each corpus whose text the tokenizer loses in part.

    Raises:
        EloError: the tokenizer loses too much of a corpus.
    """
    found = []
    for task in tasks:
        corpus = manifest["languages"][task.language][task.split][task.index]
        found.append(job.judge(task, TextCounts(*(corpus[name] for name in TextCounts._fields))))
    return [warning for warning in found if warning is not None]


def tell_totals(manifest: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Report totals by language, and warn about held-out documents that are also training documents."""
    treated = "tokenised as text" if manifest["tokenizer"]["split_special_tokens"] else "tokenised as special tokens"
    for language, splits in manifest["languages"].items():
        train, heldout, validation = splits["train"], splits["heldout"], splits["validation"]

        def total(corpora: list[dict[str, Any]], key: str) -> int:
            return sum(corpus.get(key, 0) for corpus in corpora)

        tokens, size = total(train, "text_tokens"), total(train, "bytes")
        tell(
            f"{language}: {total(train, 'documents'):,} documents, {short(total(train, 'tokens'))} tokens, "
            f"{short(size)} bytes of text ({size / max(tokens, 1):.2f} bytes per token); "
            f"held out {total(heldout, 'documents'):,} documents, {short(total(heldout, 'tokens'))} tokens"
            + (f"; validation {total(validation, 'documents'):,} documents" if validation else "")
        )
        both = [*train, *heldout]
        for key, meaning in (
            ("skipped", "documents could not be read and were skipped"),
            ("cut_files", "files could not be read to the end; the rest of each was skipped"),
            ("empty", "documents contain no text"),
            ("special_tokens", f"special tokens occur in the text; they were {treated}"),
        ):
            if total(both, key):
                tell(f"{language}: {total(both, key):,} {meaning}")
        dropped = {name: total(train, name) for name in FILTERS if total(train, name)}
        if dropped:
            counts = ", ".join(f"{name} {number:,}" for name, number in dropped.items())
            tell(f"{language}: filters dropped {sum(dropped.values()):,} documents: {counts}")
        for corpus in train:
            for name, examples in corpus.get("dropped_examples", {}).items():
                for example in examples[:1]:
                    tell(f"  {name}: {example['place']}: {example['text'][:60]!r}")
        if total(train, "overlapping"):
            tell(
                f"warning: {language}: {total(train, 'overlapping'):,} training documents are also in held-out text; "
                "results on it will look better than they are"
            )


def reopen(output: Path, plan: str, on_error: str) -> PreparedData | None:
    """Return the finished data in `output` if it is complete and matches `plan`, else None."""
    try:
        prepared = PreparedData.open(output)
    except UnfinishedError:
        return None
    left_out = sum(
        corpus.get(name, 0)
        for name in LEFT_OUT
        for splits in prepared.manifest["languages"].values()
        for corpora in splits.values()
        for corpus in corpora
    )
    same = prepared.manifest.get("plan") == plan and not (on_error == "stop" and left_out)
    return prepared if same else None


def is_whole(output: Path) -> bool:
    """Return whether `output` holds complete prepared data, whatever its inputs."""
    try:
        PreparedData.open(output)
    except UnfinishedError:
        return False
    return True


def reweigh(prepared: PreparedData, tasks: list[CorpusTask]) -> PreparedData:
    """Write changed names and weights into the manifest, without tokenising again."""
    changed = False
    # The order of `make_manifest`. A corpus has no entry in a split for which no documents are cut out of it.
    entries = {
        (language, split): iter(corpora)
        for language, splits in prepared.manifest["languages"].items()
        for split, corpora in splits.items()
    }
    for task in sorted(tasks, key=lambda task: task.split != "train"):
        for split in (task.split, *task.cut_splits):
            corpus = next(entries[task.language, split])
            changed |= (corpus["name"], corpus["weight"]) != (task.name, task.weight)
            corpus.update(name=task.name, weight=task.weight)
    if changed:
        write_json(prepared.path / MANIFEST, prepared.manifest)
    return prepared
