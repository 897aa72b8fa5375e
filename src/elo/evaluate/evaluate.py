"""`elo evaluate`: measure bits per byte by language, and other abilities, of any Hugging Face causal LM."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elo.checkpoint.download import fetch_checkpoint
from elo.data.heldout import choose_bytes, cut_corpus, cut_text, tokenize_and_check
from elo.data.shards import TokenCorpus
from elo.data.sources import list_inputs, read_documents
from elo.data.text_loss import judge_loss
from elo.data.tokenizer import TextTokenizer, load_tokenizer, wrap_tokenizer
from elo.data.tokenizing import TextCounts
from elo.errors import EloError
from elo.evaluate.base import Measure, MeasureValue, Subject, ratio_error
from elo.evaluate.bits_per_byte import BitsPerByte, bits_per_byte
from elo.evaluate.cloze import Cloze, ClozeItem
from elo.evaluate.loading import load_model, move
from elo.evaluate.samples import Samples
from elo.evaluate.scoring import longest_sequence, vocabulary_size
from elo.evaluate.warnings import few_documents
from elo.format import count
from elo.store.environment import environment
from elo.store.files import remove, write_json
from elo.store.remote import is_remote, output_file
from elo.store.run_folder import file_identity

DEFAULT_SEQUENCE_LENGTH = 2048


def evaluate(
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | TextTokenizer | None = None,
    *,
    corpora: Mapping[str, str | Path | TokenCorpus] | None = None,
    cloze: Mapping[str, str | Path | Sequence[ClozeItem]] | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    measures: Sequence[Measure] = (),
    sequence_length: int | None = None,
    max_bytes: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    text_column: str = "text",
    split_special_tokens: bool = True,
    allow_lost_text: bool = False,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    output: str | Path | None = None,
    files: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model: bits per byte, cloze accuracy and samples by language, and further measures.

    Args:
        model: checkpoint folder or hub id (safetensors only), or a model in memory.
        tokenizer: folder or hub id of a tokenizer, or a tokenizer; by default the one in the model's folder.
        corpora: text by language (anything that `elo prepare` reads) or token shards, for bits per byte.
        cloze: items by language, or their JSON-lines file, for cloze accuracy.
        prompts: texts to continue greedily, by language, for samples.
        measures: further measures, with their settings (`elo.evaluate.measures.MEASURES`).
        sequence_length: context in tokens; by default the model's number of positions, at most 2048.
        max_bytes: maximum UTF-8 bytes of text per language, cut from all documents in the same way for every tokenizer
            (`elo.data.heldout.choose_bytes`). None takes all text.
        max_new_tokens: maximum length of a sample, in tokens.
        batch_size: sequences per forward pass; by default as many as keep fp32 logits within 1 GiB.
        text_column: field or column with the text of a document.
        split_special_tokens: tokenise the names of special tokens in text and cloze items as ordinary text. In prompts
            they always become special tokens.
        allow_lost_text: accept text of which the tokenizer loses more than 5 %, although its bits per byte are too low.
        device: device to run on; by default cuda if available, else cpu. A model in memory stays on its device.
        dtype: dtype of the loaded weights; by default the checkpoint's on a GPU, and float32 on a CPU.
        trust_remote_code: run code that ships with the checkpoint.
        output: JSON file to write.
        files: path, without suffix, of the files that measures write themselves; by default that of `output`. The
            folder of this name keeps finished tasks until the caller removes it; by default OUTPUT.partial keeps them
            until the results are written. The same call resumes from them.
        progress: show progress and tables.

    Returns:
        The results; docs/results.md lists the keys.

    Raises:
        EloError: an input cannot be read, or does not fit the model.
    """
    # Find mistakes before the model is loaded.
    target = output_file(output)
    asked: list[Measure] = []
    if cloze:
        asked.append(Cloze(given=dict(cloze)))
    if prompts:
        asked.append(Samples(prompts=dict(prompts), max_new_tokens=max_new_tokens))
    asked += measures
    for measure in asked:
        measure.check(measure.name)
    for given in (corpora or {}).values():
        if isinstance(given, str | Path):
            list_inputs(str(given))
    name = str(model) if isinstance(model, str | Path) else model.config.name_or_path or type(model).__name__
    place = str(fetch_checkpoint(name, trust_remote_code)) if is_remote(name) else name.removeprefix("hf://")
    source = tokenizer if tokenizer is not None else place
    encoder = None
    tokenised = [
        isinstance(given, str | Path) or (max_bytes is not None and max_bytes < given.num_bytes)
        for given in (corpora or {}).values()
    ]
    if tokenizer is not None or any(measure.needs_tokenizer for measure in asked) or any(tokenised):
        encoder = _tokenizer(source, trust_remote_code)
        encoder = replace(encoder, split_special_tokens=split_special_tokens)
    texts_read: dict[str, _Text] = {}
    for language, given in (corpora or {}).items():
        if isinstance(given, str | Path):
            assert encoder is not None
            texts_read[language] = _tokenise(given, encoder, max_bytes, text_column, allow_lost_text)

    identity = None
    if isinstance(model, str | Path):
        identity = file_identity(Path(place)) if Path(place).is_dir() else name
        model = load_model(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    elif device is not None:
        move(model, device)
    if encoder is not None:
        encoder.check_embedding(vocabulary_size(model), name)
    limit = longest_sequence(model)
    if sequence_length is None:
        sequence_length = min(limit or DEFAULT_SEQUENCE_LENGTH, DEFAULT_SEQUENCE_LENGTH)

    measured: dict[str, BitsPerByte] = {}
    seconds: dict[str, float] = {}
    for language, given in (corpora or {}).items():
        started = time.perf_counter()
        if isinstance(given, str | Path):
            corpus = texts_read[language].corpus
        else:
            corpus = given if encoder is None else cut_corpus(given, encoder, max_bytes)
        label = f"bits per byte {language}" if progress else None
        result = bits_per_byte(model, corpus, sequence_length=sequence_length, batch_size=batch_size, progress=label)
        if not math.isfinite(result.nats):
            raise EloError(
                f"{name}: its logits on the {language!r} text are not finite; the checkpoint is damaged, or needs "
                "dtype float32"
            )
        measured[language] = result
        seconds[language] = time.perf_counter() - started
    finished = Path(files) if files is not None else target.with_suffix(".partial") if target else None
    files = files if files is not None else target.with_suffix("") if target else None
    subject = Subject(
        model,
        encoder,
        source,
        batch_size,
        progress,
        files=Path(files) if files is not None else None,
        finished=finished if identity is not None else None,
        identity=identity,
        trust_remote_code=trust_remote_code,
    )
    values: list[MeasureValue] = []
    records: dict[str, Any] = {"cloze": {}, "samples": [], "generation": {}}
    for measure in asked:
        outcome = measure.measure(subject)
        values += outcome.values
        records |= outcome.record

    heldout = {
        language: {"documents": result.documents, "tokens": result.text_tokens, "bytes": result.bytes}
        for language, result in measured.items()
    }
    results = {
        "schema": 1,
        "kind": "evaluation",
        "model": {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_layers": getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "sequence_length": sequence_length,
        **environment(),
        "bpb": {language: result.bits_per_byte for language, result in measured.items()},
        "heldout": heldout,
        "documents_nats": {language: list(result.document_nats) for language, result in measured.items()},
        "documents_bytes": {language: list(result.document_bytes) for language, result in measured.items()},
        "warnings": few_documents(heldout),
        "corpora": {
            language: {
                "bits_per_byte": result.bits_per_byte,
                "standard_error": _standard_error(result),
                "nats": result.nats,
                "text_tokens": result.text_tokens,
                "bytes": result.bytes,
                "documents": result.documents,
                "seconds": seconds[language],
                **(texts_read[language].record() if language in texts_read else {}),
            }
            for language, result in measured.items()
        },
        "measures": [value.model_dump(mode="json") for value in values],
        **records,
    }
    if target is not None:
        write_json(target, results)
        remove(target.with_suffix(".partial"))
    if progress:
        _print_table(results)
        for language, text in texts_read.items():
            if text.counts.special_tokens:
                used = "tokenised as text" if split_special_tokens else "kept as special tokens"
                print(f"{language}: {text.counts.special_tokens:,} names of special tokens in the text are {used}")
            if text.warning is not None:
                print(text.warning, flush=True)
    return results


@dataclass(frozen=True)
class _Text:
    """A corpus tokenised for measurement.

    Attributes:
        counts: lost text and special tokens.
        warning: warning about lost text; None if there is none.
    """

    corpus: TokenCorpus
    counts: TextCounts
    warning: str | None

    def record(self) -> dict[str, Any]:
        lost, checked = self.counts.lost_bytes, self.counts.checked_bytes
        return {"lost_text": lost / max(checked, 1), "special_tokens": self.counts.special_tokens}


def _tokenizer(given: str | Path | PreTrainedTokenizerBase | TextTokenizer, trust_remote_code: bool) -> TextTokenizer:
    if isinstance(given, TextTokenizer):
        return given
    if isinstance(given, str | Path):
        return load_tokenizer(given, trust_remote_code)
    backend: Any = getattr(given, "backend_tokenizer", None)
    if backend is None or (given.bos_token_id is None and given.eos_token_id is None):
        raise EloError("tokenizer: is slow, or has neither a bos nor an eos token; give a fast tokenizer with one")
    return wrap_tokenizer(backend, given.bos_token_id, given.eos_token_id, given.name_or_path or "tokenizer")


def _tokenise(
    path: str | Path,
    encoder: TextTokenizer,
    max_bytes: int | None,
    text_column: str,
    allow_lost_text: bool,
) -> _Text:
    """Tokenise the documents of `path` into memory. If `max_bytes` is given, the file is read twice."""
    texts: Iterable[str] = read_documents(path, text_column)
    if max_bytes is not None:
        chosen = choose_bytes([len(text.encode()) for text in texts], max_bytes)
        numbered = enumerate(read_documents(path, text_column))
        texts = (cut_text(text, chosen[index]) for index, text in numbered if index in chosen)
    corpus, counts = tokenize_and_check(texts, encoder, str(path))
    if not corpus.num_documents:
        raise EloError(f"{path}: has no text to evaluate on; give another file")
    lost, checked = counts.lost_bytes, counts.checked_bytes
    warning = judge_loss(str(path), encoder.name, lost, checked, allowed=allow_lost_text, key="--allow-lost-text")
    return _Text(corpus, counts, warning)


def _standard_error(result: BitsPerByte) -> float | None:
    """Return the standard error of the bits per byte over documents; None for one document."""
    error = ratio_error(result.document_nats, result.document_bytes)
    return None if error is None else error / math.log(2)


def _print_table(results: dict[str, Any]) -> None:
    console = Console()
    if corpora := results["corpora"]:
        table = Table(title=results["model"]["name"], title_justify="left")
        table.add_column("language")
        for heading in ("bits per byte", "standard error", "documents", "text tokens", "bytes", "text lost"):
            table.add_column(heading, justify="right")
        for language, text in corpora.items():
            table.add_row(
                language,
                f"{text['bits_per_byte']:.4f}",
                "" if text["standard_error"] is None else f"{text['standard_error']:.4f}",
                f"{text['documents']:,}",
                f"{text['text_tokens']:,}",
                count(text["bytes"]),
                f"{text['lost_text']:.2%}" if "lost_text" in text else "",
            )
        console.print(table)
    if results["measures"]:
        table = Table(title=results["model"]["name"], title_justify="left")
        for heading in ("measure", "language", "of"):
            table.add_column(heading)
        for heading in ("value", "standard error", "chance", "items"):
            table.add_column(heading, justify="right")
        for each in results["measures"]:
            form = ".1%" if each["unit"] == "share" else ".4f"
            numbers = [each[key] for key in ("value", "standard_error", "chance")]
            cells = ["" if number is None else format(number, form) for number in numbers]
            cells[0] += " ↑" if each["higher_is_better"] else " ↓"
            table.add_row(
                each["measure"],
                each["language"],
                "" if each["name"] == "all" else each["name"],
                *cells,
                "" if each["items"] is None else f"{each['items']:,}",
            )
        console.print(table)
    for line in results["warnings"]:
        console.print(f"warning: {line}", markup=False, highlight=False)
    for sample in results["samples"]:
        console.print(f"{sample['language']}: {sample['prompt']}|{sample['text']}", markup=False, highlight=False)
    for language, written in results["generation"].items():
        rate = written["characters"] / written["seconds"]
        console.print(f"{language}: writes {rate:.0f} characters/s", highlight=False)
