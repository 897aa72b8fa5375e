"""Small corpora and tokenizers for tests of the data part."""

import numpy as np

from elo.data.shards import TokenCorpus

PREFIX, EOS = 0, 1


def make_corpus(lengths: list[list[int]], name: str = "made", weight: float = 1.0) -> TokenCorpus:
    """A corpus in memory with one shard per list, documents of these lengths, and every text token different."""
    shards = []
    token = 2
    for members in lengths:
        documents = []
        for length in members:
            documents.append(np.array([PREFIX, *range(token, token + length - 2), EOS], dtype=np.uint32))
            token += length - 2
        corpus = TokenCorpus.from_documents(documents, [length - 2 for length in members])
        shards += corpus.shards
    return TokenCorpus(tuple(shards), name, weight)
