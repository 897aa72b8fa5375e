"""Choose the text to evaluate on: the first bytes of each held-out document, the same for every tokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from elo.data.shards import TokenCorpus
from elo.data.tokenizer import TextTokenizer
from elo.data.tokenizing import TextCounts, batched

MIN_DOCUMENTS = 30
"""Minimum documents per language. With fewer, differences of documents can be mistaken for differences of models."""
MIN_BYTES = 1000
"""Minimum bytes of each document. If `max_bytes` does not allow that for all documents, fewer are chosen."""


def choose_bytes(sizes: Sequence[int] | np.ndarray, max_bytes: int | None) -> dict[int, int]:
    """Choose the documents to evaluate on, and how many bytes of each; return {index of the document: bytes}.

    Every document contributes its first A bytes, or all of them if it has fewer. A is the largest number that keeps
    the sum within `max_bytes`, so bytes that short documents leave unused go to longer ones. If A would be below
    `MIN_BYTES`, fewer documents are chosen, evenly spaced over the corpus: as many as fit with about `MIN_BYTES` each,
    but at least `MIN_DOCUMENTS`. The choice depends only on the sizes, not on tokenizer, model or chance.

    Args:
        sizes: UTF-8 bytes of each document.
        max_bytes: limit on the sum over all documents; None uses every document in full.
    """
    size = np.asarray(sizes, np.int64)
    chosen = np.arange(len(size))
    if max_bytes is None or int(size.sum()) <= max_bytes:
        return dict(zip(chosen.tolist(), size.tolist(), strict=True))
    allowance = _allowance(size, max_bytes)
    if allowance < MIN_BYTES and len(size) > MIN_DOCUMENTS:
        count = int(max_bytes / np.minimum(size, MIN_BYTES).mean())
        count = min(max(count, MIN_DOCUMENTS), len(size))
        chosen = np.arange(count) * len(size) // count
        allowance = _allowance(size[chosen], max_bytes)
    # At least 1: `cut_text` keeps a document's first character, however small the allowance.
    return {int(index): max(1, min(int(size[index]), allowance)) for index in chosen}


def _allowance(sizes: np.ndarray, max_bytes: int) -> int:
    """Return the largest A with sum(min(size, A)) <= max_bytes."""
    ordered = np.sort(sizes)
    below = np.concatenate([[0], np.cumsum(ordered)])  # below[k]: the k shortest, whole
    # The k shortest are used in full; the others share the remaining bytes.
    for k in range(len(ordered)):
        share = int(max_bytes - below[k]) // (len(ordered) - k)
        if share < ordered[k]:
            return share
    return int(ordered[-1]) if len(ordered) else 0


def cut_text(text: str, size: int) -> str:
    """Return the whole characters in the first `size` UTF-8 bytes of `text`, at least one."""
    return text.encode()[:size].decode(errors="ignore") or text[:1]


def tokenize_texts(texts: Iterable[str], tokenizer: TextTokenizer, name: str) -> TokenCorpus:
    """Tokenise texts into a corpus in memory."""
    return tokenize_and_check(texts, tokenizer, name)[0]


def tokenize_and_check(texts: Iterable[str], tokenizer: TextTokenizer, name: str) -> tuple[TokenCorpus, TextCounts]:
    """Tokenise texts into a corpus in memory; return it with the texts' `TextCounts`."""
    documents: list[np.ndarray] = []
    sizes: list[int] = []
    counts = np.zeros(len(TextCounts._fields), np.int64)
    for batch in batched(texts):
        ids, found = tokenizer.encode_and_check(batch)
        documents += ids
        counts += found.sum(axis=0)
        sizes += [len(text.encode()) for text in batch]
    return TokenCorpus.from_documents(documents, sizes, name), TextCounts(*counts.tolist())


def cut_corpus(corpus: TokenCorpus, tokenizer: TextTokenizer, max_bytes: int | None) -> TokenCorpus:
    """Return the part of a corpus to evaluate on (see `choose_bytes`). If text is cut, it is tokenised again.

    Raises:
        EloError: text has to be cut, but the corpus does not store text.
    """
    chosen = choose_bytes(corpus.document_sizes, max_bytes)
    if sum(chosen.values()) == corpus.num_bytes:
        return corpus
    texts = (cut_text(corpus.document_text(index), size) for index, size in chosen.items())
    return tokenize_texts(texts, tokenizer, corpus.name)
