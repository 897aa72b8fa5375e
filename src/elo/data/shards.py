"""Token shards on disk: memory-mapped token ids with document offsets, and the manifest that marks them complete.

Every document is stored as ``[prefix] text tokens [eos]``. A shard consists of three or four files:

=================  ===================================================================================
``NAME.tokens``    token ids, little-endian uint16 (vocabulary up to 65536) or uint32
``NAME.offsets``   int64 [documents + 1], begin of each document in ``NAME.tokens``, in tokens
``NAME.bytes``     int64 [documents], UTF-8 bytes of each document's text
``NAME.text``      concatenated UTF-8 text of the documents; only for held-out and validation text
=================  ===================================================================================

Evaluation text is stored because it is cut at bytes, so that every tokenizer is evaluated on the same text.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elo.errors import EloError, UnfinishedError
from elo.store.files import read_json, sha256_file, sha256_json

MANIFEST = "manifest.json"
SCHEMA = 2
SPECIALS_PER_DOCUMENT = 2
"""Tokens of a document that are not text: prefix and eos (end of text)."""

SPLITS = ("train", "heldout", "validation")
SHARD_NAME = re.compile(rf"[\w-]+/({'|'.join(SPLITS)})/[0-9]+/[0-9]+-[0-9]+")
SHARD_FILES = ("tokens", "offsets", "bytes", "text")
MAPPED_SHARDS = 64  # each mapping holds file descriptors, so only recently used shards stay mapped
_verified: set[tuple[str, str]] = set()


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that stores token ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


class ShardArrays(NamedTuple):
    """A shard's contents: token ids [tokens], document offsets [documents + 1], bytes of text [documents].

    If the shard stores text: its UTF-8 bytes [bytes], and the offset of each document in them [documents + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray
    byte_lengths: np.ndarray
    text: np.ndarray | None = None
    text_offsets: np.ndarray | None = None


@dataclass(frozen=True)
class Shard:
    """One token shard: its sizes, and its arrays, which are mapped on first use."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    stem: Path | None = None
    dtype: str = "<u2"
    sha256: tuple[str, ...] | None = None
    """Checksum of each file: four files if text is stored, otherwise three."""
    in_memory: ShardArrays | None = None

    @property
    def arrays(self) -> ShardArrays:
        """The shard's arrays, read-only.

        Raises:
            UnfinishedError: a file is missing, or its checksum differs from the manifest.
        """
        if self.in_memory is not None:
            return self.in_memory
        assert self.stem is not None
        return _map_shard(self.stem, self.dtype, self.num_tokens, self.num_documents, self.num_bytes, self.sha256)

    def check_sizes(self) -> None:
        """Raise UnfinishedError, naming the file, unless all files exist with the expected size."""
        assert self.stem is not None
        has_text = self.sha256 is not None and len(self.sha256) == len(SHARD_FILES)
        itemsize = np.dtype(self.dtype).itemsize
        sizes = shard_sizes(self.num_tokens, self.num_documents, self.num_bytes, itemsize)
        for path, size in zip(shard_paths(self.stem, has_text=has_text), sizes, strict=False):
            try:
                found = path.stat().st_size
            except OSError as error:
                raise UnfinishedError(f"{path}: token shard is missing ({error.strerror}); run prepare again") from None
            if found != size:
                raise UnfinishedError(
                    f"{path}: token shard is damaged: it has {found} bytes, expected {size}; "
                    "remove the folder it is in and run prepare again"
                )


def shard_paths(stem: Path, *, has_text: bool) -> list[Path]:
    """Return the files of the shard at `stem`, in the order of `SHARD_FILES`."""
    return [stem.with_name(f"{stem.name}.{kind}") for kind in SHARD_FILES[: 4 if has_text else 3]]


def shard_sizes(tokens: int, documents: int, num_bytes: int, itemsize: int) -> tuple[int, int, int, int]:
    """Return the bytes on disk of a shard's files, in the order of `SHARD_FILES`."""
    return (tokens * itemsize, (documents + 1) * 8, documents * 8, num_bytes)


@lru_cache(maxsize=MAPPED_SHARDS)
def _map_shard(
    stem: Path, dtype: str, tokens: int, documents: int, num_bytes: int, sha256: tuple[str, ...] | None
) -> ShardArrays:
    paths = shard_paths(stem, has_text=sha256 is not None and len(sha256) == len(SHARD_FILES))
    try:
        if sha256 is not None:
            for path, expected in zip(paths, sha256, strict=True):
                if (str(path), expected) not in _verified and sha256_file(path) != expected:
                    raise UnfinishedError(
                        f"{path}: token shard is damaged: its checksum differs from the manifest; "
                        "remove the folder it is in and run prepare again"
                    )
                _verified.add((str(path), expected))
        arrays = ShardArrays(
            np.memmap(paths[0], dtype, "r", shape=(tokens,)),
            np.memmap(paths[1], "<i8", "r", shape=(documents + 1,)),
            np.memmap(paths[2], "<i8", "r", shape=(documents,)),
        )
        if len(paths) == len(SHARD_FILES):
            text = np.memmap(paths[3], np.uint8, "r", shape=(num_bytes,))
            arrays = arrays._replace(text=text, text_offsets=np.concatenate([[0], np.cumsum(arrays.byte_lengths)]))
    except (OSError, ValueError) as error:
        if isinstance(error, EloError):
            raise
        raise UnfinishedError(f"{stem}: token shard cannot be read ({error}); run prepare again") from None
    return arrays


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """The documents of one corpus as token ids, in reading order."""

    shards: tuple[Shard, ...]
    name: str = "corpus"
    weight: float = 1.0
    fingerprint: str = ""

    @classmethod
    def from_documents(
        cls, documents: Sequence[np.ndarray], byte_lengths: Sequence[int] | np.ndarray, name: str = "corpus"
    ) -> "TokenCorpus":
        """Build a corpus in memory from documents with their prefix and eos, and the UTF-8 bytes of each text."""
        lengths = np.fromiter((len(document) for document in documents), np.int64, len(documents))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.concatenate(documents) if len(documents) else np.zeros(0, np.uint32)
        sizes = np.asarray(byte_lengths, dtype=np.int64)
        if len(sizes) != len(documents):
            raise ValueError(f"{len(documents)} documents but {len(sizes)} byte lengths")
        digest = hashlib.sha256(tokens.tobytes() + offsets.tobytes() + sizes.tobytes()).hexdigest()
        arrays = ShardArrays(tokens, offsets, sizes)
        shard = Shard(len(documents), len(tokens), int(sizes.sum()), dtype=tokens.dtype.str, in_memory=arrays)
        return cls((shard,), name, fingerprint=digest)

    @cached_property
    def num_documents(self) -> int:
        """Number of documents in the corpus."""
        return sum(shard.num_documents for shard in self.shards)

    @cached_property
    def num_tokens(self) -> int:
        """Number of stored tokens, including each document's prefix and eos."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_text_tokens(self) -> int:
        """Number of text tokens, without prefix and eos."""
        return self.num_tokens - SPECIALS_PER_DOCUMENT * self.num_documents

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def _first_document(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([shard.num_documents for shard in self.shards])])

    def _find(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        which = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return self.shards[which], index - int(self._first_document[which])

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of document `index`, including its prefix and eos."""
        shard, inside = self._find(index)
        arrays = shard.arrays
        return arrays.tokens[int(arrays.offsets[inside]) : int(arrays.offsets[inside + 1])]

    def document_text(self, index: int) -> str:
        """Return the text of document `index`.

        Raises:
            EloError: the corpus stores no text. Training corpora and most corpora in memory store none.
        """
        shard, inside = self._find(index)
        arrays = shard.arrays
        if arrays.text is None or arrays.text_offsets is None:
            raise EloError(f"{self.name}: has token ids but no text, so it cannot be cut at bytes; give the text")
        begin, end = arrays.text_offsets[inside : inside + 2]
        return arrays.text[begin:end].tobytes().decode()

    @cached_property
    def document_sizes(self) -> np.ndarray:
        """UTF-8 bytes of every document's text, int64 [documents]."""
        return np.concatenate([np.zeros(0, np.int64), *(shard.arrays.byte_lengths for shard in self.shards)])

    def lengths(self, shard_index: int) -> np.ndarray:
        """Return the tokens of each document of one shard, int64 [documents], including prefix and eos."""
        return np.diff(self.shards[shard_index].arrays.offsets)


@dataclass(frozen=True)
class PreparedData:
    """A folder that `elo prepare` completed: token shards by language and split."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "PreparedData":
        """Open a prepared folder and check the size of every shard file. Checksums are checked on first use of a shard.

        Raises:
            UnfinishedError: the folder, its manifest or a shard is missing, incomplete or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            what = "no such folder" if not path.exists() else f"is unfinished (no {MANIFEST})"
            raise UnfinishedError(f"{path}: {what}; run `elo prepare`, which resumes unfinished work")
        manifest = read_json(path / MANIFEST)
        _check_manifest(path / MANIFEST, manifest)
        prepared = cls(path, manifest)
        for shard in prepared.shards_by_name.values():
            shard.check_sizes()
        return prepared

    @property
    def languages(self) -> list[str]:
        """Prepared languages: those with training text in the order given, then those with only held-out text."""
        return list(self.manifest["languages"])

    @property
    def vocab_size(self) -> int:
        """Highest token id that the tokenizer can produce, plus one."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def split_special_tokens(self) -> bool:
        """Whether special tokens that occur in the text were tokenised as text."""
        return bool(self.manifest["tokenizer"].get("split_special_tokens", False))

    @property
    def eos_token_id(self) -> int:
        """The token that ends every document."""
        return int(self.manifest["tokenizer"]["eos_token_id"])

    @property
    def prefix_token_id(self) -> int:
        """The token that begins every document."""
        return int(self.manifest["tokenizer"]["prefix_token_id"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the contents: tokenizer and checksums of all shards, but not names, weights or paths."""
        languages = {
            language: {
                split: [[shard["sha256"] for shard in corpus["shards"]] for corpus in corpora]
                for split, corpora in splits.items()
            }
            for language, splits in self.manifest["languages"].items()
        }
        return sha256_json([self.manifest["tokenizer"]["sha256"], self.manifest["dtype"], languages])

    @cached_property
    def shards_by_name(self) -> dict[str, Shard]:
        """Every shard of every language and split, by its path relative to the folder."""
        return {
            entry["name"]: self._shard(entry)
            for splits in self.manifest["languages"].values()
            for split in SPLITS
            for corpus in splits[split]
            for entry in corpus["shards"]
        }

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return documents, tokens, text_tokens, bytes and bytes_per_token by split (`SPLITS`) and language.

        If text was decoded again, also return `lost_text`, the share of it that the tokenizer loses, and
        `special_tokens`, the number of special tokens that occur in the text.
        """
        found: dict[str, dict[str, dict[str, float]]] = {split: {} for split in SPLITS}
        for language, splits in self.manifest["languages"].items():
            for split, corpora in splits.items():
                keys = ("documents", "tokens", "text_tokens", "bytes")
                totals: dict[str, float] = {key: sum(corpus[key] for corpus in corpora) for key in keys}
                totals["bytes_per_token"] = totals["bytes"] / max(totals["text_tokens"], 1)
                if checked := sum(corpus.get("checked_bytes", 0) for corpus in corpora):
                    totals["lost_text"] = sum(corpus.get("lost_bytes", 0) for corpus in corpora) / checked
                    totals["special_tokens"] = sum(corpus.get("special_tokens", 0) for corpus in corpora)
                found[split][language] = totals
        return found

    def _shard(self, entry: dict[str, Any]) -> Shard:
        sums = entry["sha256"]
        return Shard(
            entry["documents"],
            entry["tokens"],
            entry["bytes"],
            self.path / entry["name"],
            self.manifest["dtype"],
            tuple(sums[kind] for kind in SHARD_FILES if kind in sums),
        )

    def _corpora(self, language: str, split: str) -> list[dict[str, Any]]:
        languages = self.manifest["languages"]
        if language not in languages:
            raise EloError(f"{self.path}: has no language {language!r}, only {', '.join(languages)}; prepare it too")
        corpora: list[dict[str, Any]] = languages[language][split]
        return corpora

    def train(self, language: str) -> list[TokenCorpus]:
        """Return the training corpora of a language, each with its name and weight.

        Raises:
            EloError: the language was not prepared.
        """
        return [
            TokenCorpus(
                tuple(self.shards_by_name[entry["name"]] for entry in corpus["shards"]),
                corpus["name"],
                corpus["weight"],
                sha256_json(corpus["shards"]),
            )
            for corpus in self._corpora(language, "train")
        ]

    def heldout(self, language: str) -> TokenCorpus:
        """Return the held-out documents of a language, which are in none of its training corpora.

        Raises:
            EloError: the language was not prepared, or has no held-out text.
        """
        corpus = self._evaluation_text(language, "heldout")
        if not corpus.shards:
            raise EloError(
                f"{self.path}: no held-out text for {language!r}; prepare again with heldout text or a heldout_share"
            )
        return corpus

    def validation(self, language: str) -> TokenCorpus:
        """Return the documents cut out of a language's training corpora for choices such as learning rates.

        Raises:
            EloError: the language was not prepared, or has no validation text.
        """
        corpus = self._evaluation_text(language, "validation")
        if not corpus.shards:
            raise EloError(
                f"{self.path}: no validation text for {language!r}; prepare again with a validation_share above 0 and "
                "at least two training documents"
            )
        return corpus

    def _evaluation_text(self, language: str, split: str) -> TokenCorpus:
        entries = [entry for corpus in self._corpora(language, split) for entry in corpus["shards"]]
        shards = tuple(self.shards_by_name[entry["name"]] for entry in entries)
        return TokenCorpus(shards, f"{language} {split}", fingerprint=sha256_json(entries))


def _check_manifest(path: Path, manifest: Any) -> None:
    """Raise UnfinishedError unless `manifest` has the keys, types and safe names that readers rely on."""
    try:
        if manifest["schema"] != SCHEMA:
            raise UnfinishedError(
                f"{path}: has format {manifest['schema']!r}, but this version reads {SCHEMA}; run prepare again"
            )
        if manifest["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"dtype {manifest['dtype']!r}")
        for key in ("vocab_size", "prefix_token_id", "eos_token_id"):
            if type(manifest["tokenizer"][key]) is not int:
                raise TypeError(f"{key} {manifest['tokenizer'][key]!r}")
        str(manifest["tokenizer"]["sha256"])
        for language, splits in manifest["languages"].items():
            if set(splits) != set(SPLITS):
                raise ValueError(f"splits of {language!r} are {sorted(splits)}, not {', '.join(sorted(SPLITS))}")
            for split in SPLITS:
                for corpus in splits[split]:
                    _check_corpus(corpus, has_text=split != "train")
    except UnfinishedError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnfinishedError(
            f"{path}: the manifest of prepared data is damaged ({type(error).__name__}: {error}); run prepare again"
        ) from None


def _check_corpus(corpus: dict[str, Any], *, has_text: bool) -> None:
    if not isinstance(corpus["name"], str) or not isinstance(corpus["weight"], (int, float)):
        raise TypeError("name or weight of a corpus")
    for key in ("documents", "tokens", "text_tokens", "bytes"):
        if type(corpus[key]) is not int or corpus[key] < 0:
            raise ValueError(f"{key} {corpus[key]!r} of corpus {corpus['name']!r}")
    for entry in corpus["shards"]:
        # Open only names that prepare generates, so that a path in a manifest cannot leave its folder.
        if not SHARD_NAME.fullmatch(entry["name"]):
            raise ValueError(f"shard name {entry['name']!r}")
        for key in ("documents", "tokens", "bytes"):
            if type(entry[key]) is not int or entry[key] < 0:
                raise ValueError(f"{key} {entry[key]!r} of {entry['name']}")
        for key in SHARD_FILES[: 4 if has_text else 3]:
            if not isinstance(entry["sha256"][key], str):
                raise TypeError(f"sha256 of {entry['name']}")
