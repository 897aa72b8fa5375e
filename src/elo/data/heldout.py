"""Which text a model is measured on: the first bytes of every held-out document, the same for every tokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from elo.data.shards import TokenCorpus
from elo.data.tokenizer import TextTokenizer
from elo.data.tokenizing import TextCounts, batched

MIN_DOCUMENTS = 30
"""Below this many documents a language, a difference between models may be one between documents."""
MIN_BYTES = 1000
"""Of each document, where there are more documents than that leaves room for."""


def choose_bytes(sizes: Sequence[int] | np.ndarray, max_bytes: int | None) -> dict[int, int]:
    """How many bytes of which documents are measured on, by index in the order of the corpus.

    Every document counts with its first A bytes, or whole if it has fewer; A is the largest number with which the sum
    stays within `max_bytes`, so what short documents leave goes to the longer ones. Where A would be below `MIN_BYTES`,
    so many documents are taken, evenly spaced over the corpus, that about `MIN_BYTES` of each fit: `MIN_DOCUMENTS` at
    least. The choice depends on the sizes alone, not on tokenizer, model or chance.

    Args:
        sizes: UTF-8 bytes of each document.
        max_bytes: of all documents together; None takes them whole.
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
    # A document never vanishes: `cut_text` leaves its first character, however small the allowance.
    return {int(index): max(1, min(int(size[index]), allowance)) for index in chosen}


def _allowance(sizes: np.ndarray, max_bytes: int) -> int:
    """The largest A with sum(min(size, A)) <= max_bytes."""
    ordered = np.sort(sizes)
    below = np.concatenate([[0], np.cumsum(ordered)])  # below[k]: the k shortest, whole
    # With the k shortest whole, what is left is shared among the others.
    for k in range(len(ordered)):
        share = int(max_bytes - below[k]) // (len(ordered) - k)
        if share < ordered[k]:
            return share
    return int(ordered[-1]) if len(ordered) else 0


def cut_text(text: str, size: int) -> str:
    """The first `size` UTF-8 bytes of `text`, less what would be part of a character; one character at least."""
    return text.encode()[:size].decode(errors="ignore") or text[:1]


def tokenize_texts(texts: Iterable[str], tokenizer: TextTokenizer, name: str) -> TokenCorpus:
    """Documents in memory, from their texts."""
    return tokenize_and_check(texts, tokenizer, name)[0]


def tokenize_and_check(texts: Iterable[str], tokenizer: TextTokenizer, name: str) -> tuple[TokenCorpus, TextCounts]:
    """Documents in memory, from their texts, and what was counted of the texts."""
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
    """The part of a corpus that is measured on (`choose_bytes`), tokenised anew where text is cut.

    Raises:
        EloError: text has to be cut, but the corpus keeps none.
    """
    chosen = choose_bytes(corpus.document_sizes, max_bytes)
    if sum(chosen.values()) == corpus.num_bytes:
        return corpus
    texts = (cut_text(corpus.document_text(index), size) for index, size in chosen.items())
    return tokenize_texts(texts, tokenizer, corpus.name)
