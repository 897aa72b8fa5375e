"""`elo vocab`: measure how many tokens languages need, and write a checkpoint with new pieces for some of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from elo.check_output import check_output
from elo.checkpoint.counting import footprint, read_config
from elo.checkpoint.footprint import Footprint
from elo.data.mixture import names_of
from elo.data.sources import read_documents
from elo.data.text_loss import judge_loss, text_encoder
from elo.data.tokenizer import TextTokenizer, load_tokenizer, save_with_backend
from elo.data.tokenizing import TextCounts, batched
from elo.detach_attach import check_replaceable, resolve_checkpoint
from elo.errors import EloError
from elo.format import listed
from elo.log import Progress
from elo.store.files import write_json
from elo.store.remote import output_file
from elo.vocab.pieces import Identity, PieceLearner, compare_tokenizers, extend_tokenizer, require_old_ids
from elo.vocab.rows import INITIALISATIONS, NewTokens, RowInit, extend_checkpoint
from elo.vocab.words import Fertility, measure_fertility

Texts = str | Path | Sequence[str | Path]
"""A corpus, or one for each of several languages."""
DEFAULT_PIECES = (2000, 4000, 8000, 16000)
_MOST_PIECES = 10_000_000
# Characters read per language; more text hardly changes which pieces are learnt.
_TARGET_CHARACTERS = 50_000_000
_SOURCE_CHARACTERS = 20_000_000
# One document in this many is used for measurement, not for learning.
_EVERY = 10
# Largest ratio, after to before, of training FLOPs per byte of target text at which an extension is worth it in long
# training.
_WORTH_IT = 0.8


def measure_vocabulary(
    model: str | Path,
    corpora: Mapping[str, str | Path],
    *,
    target: str | Sequence[str] = (),
    pieces: Sequence[int] = DEFAULT_PIECES,
    tokenizer: str | Path | None = None,
    text_column: str = "text",
    max_characters: int | None = None,
    split_special_tokens: bool = True,
    allow_lost_text: bool = False,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure bytes per token and fertility by language and, with `target`, the effect of new pieces.

    Args:
        model: checkpoint folder or hub id; its weights are not read.
        corpora: text by language, anything that `elo prepare` reads.
        target: language or languages among `corpora` to extend for; the others must keep their tokens.
        pieces: numbers of new pieces to try.
        tokenizer: folder or hub id; None uses the model's tokenizer.
        text_column: key or column that holds a document's text.
        max_characters: read at most this many characters per language; None reads 50 M of a target and 20 M of every
            other language.
        split_special_tokens: tokenise special tokens that occur in text as text.
        allow_lost_text: accept text even if the tokenizer loses more than 5 % of it.
        output: JSON file to write.
        trust_remote_code: run code that ships with the checkpoint.

    Returns:
        {"languages": {language: fertility and lost text}, "candidates": [effect of each number of pieces],
        "advice": text, "warnings": [text]}

    Raises:
        EloError: an input cannot be read, or the tokenizer cannot be extended.
    """
    if not corpora:
        raise EloError("vocab: nothing to measure on; give --corpus LANGUAGE=FILE")
    target_file = output_file(output)
    targets = names_of(target)
    for language in targets:
        if language not in corpora:
            raise EloError(f"--target {language!r}: has no corpus; choose among {', '.join(corpora)}")
    if not pieces or min(pieces) < 1 or max(pieces) > _MOST_PIECES:
        raise EloError(f"--pieces {list(pieces)}: give numbers of new pieces, each from 1 to {_MOST_PIECES:,}")
    loaded = replace(load_tokenizer(tokenizer or model, trust_remote_code), split_special_tokens=split_special_tokens)
    backend = loaded.backend
    texts = {
        language: _read(path, text_column, max_characters or _limit(language in targets), language)
        for language, path in corpora.items()
    }
    counts = {language: _count(loaded, heldout) for language, (_, heldout) in texts.items()}
    warnings = [
        judge_loss(
            f"{corpora[language]} ({language})",
            loaded.name,
            found.lost_bytes,
            found.checked_bytes,
            allowed=allow_lost_text,
            key="--allow-lost-text",
        )
        for language, found in counts.items()
    ]
    measured = {language: measure_fertility(loaded.encoder, heldout) for language, (_, heldout) in texts.items()}
    results: dict[str, Any] = {
        "model": str(model),
        "tokens": backend.get_vocab_size(),
        "languages": {
            language: _fertility(each)
            | {
                "lost_text": counts[language].lost_bytes / max(counts[language].checked_bytes, 1),
                "special_tokens": counts[language].special_tokens,
            }
            for language, each in measured.items()
        },
        "candidates": [],
        "advice": None,
        "warnings": [warning for warning in warnings if warning is not None],
    }
    if targets:
        model_config = read_config(model, trust_remote_code=trust_remote_code)
        now = footprint(model_config, trust_remote_code=trust_remote_code)
        before = _total([measured[language] for language in targets])
        spent_now = _flops_per_byte(now, before)
        learning = [train for language, (train, _) in texts.items() if language not in targets]
        learner = PieceLearner(backend, [text for each in targets for text in texts[each][0]], learning, max(pieces))
        found = {len(extension.pieces): extension for extension in map(learner.extension, pieces)}
        for count, extension in sorted(found.items()):
            extended = extend_tokenizer(backend, extension)
            encoder = text_encoder(extended, loaded.special_tokens) if split_special_tokens else extended
            by_target = {language: measure_fertility(encoder, texts[language][1]) for language in targets}
            after = _total(list(by_target.values()))
            larger = now.with_vocabulary(max(now.vocab_size, extended.get_vocab_size()))
            results["candidates"].append(
                {
                    "pieces": count,
                    "bytes_per_token": after.bytes_per_token,
                    "tokens": after.tokens / before.tokens,
                    "target": {
                        language: each.tokens / measured[language].tokens for language, each in by_target.items()
                    },
                    "flops_per_byte": _flops_per_byte(larger, after) / spent_now,
                    "new_parameters": larger.total - now.total,
                    "source": {
                        language: _identity([compare_tokenizers(backend, extended, heldout)])
                        for language, (_, heldout) in texts.items()
                        if language not in targets
                    },
                }
            )
        results["advice"] = _advice(targets, before, results["candidates"])
    if target_file is not None:
        write_json(target_file, results)
    return results


def extend_vocabulary(
    model: str | Path,
    target: Texts = (),
    source: Texts = (),
    *,
    output: str | Path,
    pieces: int = 8000,
    tokenizer: str | Path | None = None,
    init: str = "pieces",
    head_init: str | None = None,
    rows: str | Path | None = None,
    pad_to_multiple_of: int = 64,
    seed: int = 0,
    text_column: str = "text",
    max_characters: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint with new pieces for the target languages in its tokenizer, embedding and head.

    Args:
        model: checkpoint folder or hub id.
        target: text to learn pieces for, anything that `elo prepare` reads: one corpus for each language.
        source: text that must keep its tokens: one corpus for each language.
        output: folder to write. It appears only when complete.
        pieces: number of new pieces.
        tokenizer: folder or hub id of an extended tokenizer, used instead of learning pieces. It must keep all old ids.
        init: initial values of new embedding rows: pieces, first, mean or noise (see elo.vocab.rows).
        head_init: the same for the rows of an untied LM head; None uses `init`.
        rows: safetensors file with rows computed elsewhere: `embedding` and, for an untied head, `head`.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.
        seed: random seed of `noise`.
        text_column: key or column that holds a document's text.
        max_characters: read at most this many characters per corpus; None reads 50 M of a target and 20 M of a
            source.
        overwrite: replace an existing output.
        trust_remote_code: run code that ships with the checkpoint.

    Returns:
        The record in config.json: new rows, their initialisation, bytes per token before and after, and how many
        held-out source documents keep their tokens.

    Raises:
        EloError: an input cannot be read or does not fit, or the tokenizer cannot be extended.
    """
    for name, value in (("--init", init), ("--head-init", head_init or init)):
        if value not in INITIALISATIONS:
            raise EloError(f"{name} {value!r}: unknown; choose one of {', '.join(INITIALISATIONS)}")
    if not (1 <= pieces <= _MOST_PIECES and 1 <= pad_to_multiple_of <= _MOST_PIECES):
        raise EloError(
            f"--pieces and --pad-to must be from 1 to {_MOST_PIECES:,}; got {pieces} and {pad_to_multiple_of}"
        )
    targets, sources = ((given,) if isinstance(given, str | Path) else tuple(given) for given in (target, source))
    if tokenizer is None and not (targets and sources):
        raise EloError(
            "vocab extend: nothing to learn from; give --target FILE to learn pieces from and --source FILE whose "
            "words must keep their tokens, or an extended --tokenizer"
        )
    check_replaceable(Path(output), overwrite)
    given = None if rows is None else _read_rows(Path(rows))
    folder = resolve_checkpoint(model, trust_remote_code=trust_remote_code)
    old = _backend(folder, trust_remote_code)
    of_targets = [_read(path, text_column, max_characters or _limit(True), "target") for path in targets]
    of_sources = [_read(path, text_column, max_characters or _limit(False), "source") for path in sources]
    if tokenizer is None:
        learning = [text for train, _ in of_targets for text in train]
        print(f"vocab: learning up to {pieces:,} pieces from {sum(map(len, learning)):,} characters", flush=True)
        learner = PieceLearner(old, learning, [train for train, _ in of_sources], pieces)
        new = extend_tokenizer(old, learner.extension(pieces))
        require_old_ids(old, new, "extended")
    else:
        new = _backend(tokenizer, trust_remote_code)
        require_old_ids(old, new, str(tokenizer))
    first_id = max(old.get_vocab().values()) + 1
    tokens = sorted((index, token) for token, index in new.get_vocab().items() if index >= first_id)
    if [index for index, _ in tokens] != list(range(first_id, first_id + len(tokens))) or not tokens:
        raise EloError(
            f"tokenizer {tokenizer}: is not an extension of the model's tokenizer; give one with at least one new "
            f"token, and new tokens numbered from {first_id} without gaps"
        )
    record: dict[str, Any] = {"base": str(model)}
    for name, texts in (("target", of_targets), ("source", of_sources)):
        if heldout := [text for _, each in texts for text in each]:
            before, after = measure_fertility(old, heldout), measure_fertility(new, heldout)
            if name == "target" and after.tokens >= before.tokens:
                raise EloError(
                    "vocab: the new pieces do not shorten held-out text; give more text, or check whether added tokens "
                    "of the tokenizer match the words first"
                )
            record[f"{name}_bytes_per_token"] = [round(before.bytes_per_token, 4), round(after.bytes_per_token, 4)]
    if of_sources:
        record["source_identity"] = _identity([compare_tokenizers(old, new, heldout) for _, heldout in of_sources])
    return extend_checkpoint(
        folder,
        Path(output),
        NewTokens(first_id, [_origin(old, token) for _, token in tokens]),
        save_tokenizer=lambda place: save_with_backend(folder, new, place, trust_remote_code),
        check=lambda place: check_output(
            place, remedy="fix that in the base first; nothing was written", trust_remote_code=trust_remote_code
        ),
        init=RowInit(init, head_init or init, given, seed),  # type: ignore[arg-type]
        pad_to_multiple_of=pad_to_multiple_of,
        record=record,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        label="vocab: writing",
    )


def _backend(path: str | Path, trust_remote_code: bool) -> Tokenizer:
    return load_tokenizer(path, trust_remote_code).backend


def _count(tokenizer: TextTokenizer, texts: Sequence[str]) -> TextCounts:
    """Return the sum of the texts' `TextCounts`."""
    return TextCounts(*sum(tokenizer.encode_and_check(batch)[1].sum(axis=0) for batch in batched(texts)).tolist())


def _limit(target: bool) -> int:
    return _TARGET_CHARACTERS if target else _SOURCE_CHARACTERS


def _read(path: str | Path, text_column: str, limit: int, label: str) -> tuple[list[str], list[str]]:
    """Read `limit` characters; return documents to learn from and documents to measure on."""
    documents: list[list[str]] = [[], []]
    with Progress(limit, f"vocab: reading {label}", "characters") as progress:
        for number, text in enumerate(_until(read_documents(path, text_column), limit)):
            documents[number % _EVERY == 0].append(text)
            progress.advance(len(text))
    train, heldout = documents
    if not train:
        raise EloError(
            f"{path}: has fewer than two documents{f' within {limit:,} characters' if heldout else ''}; give more text "
            "or a larger --max-characters, because some documents are held out for measurement"
        )
    return train, heldout


def _until(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _origin(old: Tokenizer, token: str) -> list[int]:
    """Tokenise a new token, in the vocabulary's spelling, into old tokens; omit unknown parts."""
    unknown = getattr(old.model, "unk_token", None)
    return [each.id for each in old.model.tokenize(token) if each.value != unknown]


def _read_rows(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise EloError(f"--rows {path}: no such file; give a safetensors file with embedding and head rows")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise EloError(f"--rows {path}: not a safetensors file, or damaged ({error}); write the file again") from None


def _fertility(measured: Fertility) -> dict[str, Any]:
    return asdict(measured) | {
        "bytes_per_token": measured.bytes_per_token,
        "tokens_per_word": measured.tokens_per_word,
    }


def _total(measured: Sequence[Fertility]) -> Fertility:
    return Fertility(*map(sum, zip(*map(astuple, measured), strict=True)))


def _identity(languages: Sequence[Identity]) -> dict[str, Any]:
    documents, identical, foreign, words = zip(*map(astuple, languages), strict=True)
    found = Identity(sum(documents), sum(identical), sum(foreign), tuple(word for each in words for word in each))
    return asdict(found) | {"holds": found.holds, "words": list(found.words)}


def _flops_per_byte(counted: Footprint, measured: Fertility) -> float:
    """Return the matmul FLOPs of full continual pretraining (CPT) per byte of text."""
    return counted.flops_per_token("trained", sequence_length=2048).total / measured.bytes_per_token


def _advice(targets: Sequence[str], now: Fertility, candidates: Sequence[Mapping[str, Any]]) -> str:
    best = min(candidates, key=lambda each: each["flops_per_byte"])
    need = "needs" if len(targets) == 1 else "need"
    effect = (
        f"with {best['pieces']:,} new pieces {listed(targets)} {need} {best['tokens']:.0%} of the tokens "
        f"({now.bytes_per_token:.2f} -> {best['bytes_per_token']:.2f} bytes per token) and "
        f"{best['flops_per_byte']:.0%} of the training FLOPs for the same text"
    )
    if best["flops_per_byte"] <= _WORTH_IT:
        # benchmarks/vocabulary_smollm2_40min.yaml
        too_few = "31 occurrences of each, on average, were too few for SmolLM2-135M"
        return f"worth it for long training: {effect}, but new rows start untrained ({too_few})"
    return f"not worth it: {effect}, but new rows start untrained"
