"""Small corpora and tokenizers for tests of the data part."""

import functools
import gzip
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elo.data.shards import TokenCorpus
from elo.data.tokenizer import TextTokenizer, wrap_tokenizer

PREFIX, EOS = 0, 1
WORDS = ["river", "stone", "lamp", "강", "돌", "등불", "green", "푸른", "slowly", "천천히", "walks", "걷는다"]
WORDS += ["\n", "naïve", "œuvre", "100", "2024", ",", ".", "😀", "\t"]


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


def make_texts(count: int, seed: int = 0, words: int = 30) -> list[str]:
    """Different documents of many scripts, some of them very short."""
    rng = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, words))) for i in range(count)]


@functools.cache
def make_backend() -> Tokenizer:
    """A byte-level BPE of some 400 tokens, `<bos>` 0 and `<eos>` 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(300), trainer)
    return tokenizer


def make_tokenizer() -> TextTokenizer:
    """The tokenizer of `make_backend`, with bos and eos."""
    return wrap_tokenizer(make_backend(), PREFIX, EOS, "made")


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write JSON lines, gzipped when the name says so."""
    data = "".join(json.dumps({column: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def decoded(corpus: TokenCorpus, tokenizer: TextTokenizer) -> list[str]:
    """The texts of a corpus, its frame of prefix and eos checked and taken off."""
    texts = []
    for i in range(corpus.num_documents):
        ids = corpus.document(i).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.prefix_token_id, tokenizer.eos_token_id)
        texts.append(tokenizer.backend.decode(ids[1:-1], skip_special_tokens=False))
    return texts
