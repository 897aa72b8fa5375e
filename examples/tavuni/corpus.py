"""Write the quickstart's corpora: documents, held-out documents, cloze items and prompts in both languages.

python examples/tavuni/corpus.py FOLDER           # plain files
python examples/tavuni/corpus.py FOLDER --pack    # zstd, as src/elo/quickstart/data ships them
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from english import English
from genres import Planner
from tavuni import Tavuni
from world import RELATIONS, SHARED, TARGET_ONLY, WORLD_SEED, World, build_world

SOURCE = English.name
TARGET = Tavuni.name
# One document in so many is held out, by its text: no training corpus of any seed or size contains it.
HELDOUT_MODULUS = 16
CHOICES = 4
# Target text dwells on what only it can teach; source text on what it should keep.
MADE_UP_WORLDS = 500
TARGET_WEIGHTS = {TARGET_ONLY: 2.0, SHARED: 1.0}


class CorpusPaths(NamedTuple):
    """Files written; the two pretraining files are None where no size was asked for them."""

    pretrain_source: Path | None
    pretrain_target: Path | None
    adapt_source: Path
    adapt_target: Path
    heldout_source: Path
    heldout_target: Path
    cloze_source: Path
    cloze_target: Path
    prompts: Path


def is_heldout(text: str) -> bool:
    """Whether a document may be used for evaluation only."""
    return zlib.crc32(text.encode()) % HELDOUT_MODULUS == 0


def documents(language: English | Tavuni, planners: Sequence[Planner], stream: str) -> Iterator[str]:
    """Endless documents, each planned by one of `planners`; `stream` names the random sequence."""
    rng = random.Random(stream)
    render = language.render
    while True:
        plan = rng.choice(planners).document(rng)
        yield "\n".join(" ".join(render(sentence, rng) for sentence in paragraph) for paragraph in plan)


def cloze_items(world: World, language: English | Tavuni, seed: int = 0) -> list[dict[str, Any]]:
    """Two items a fact: a statement, and a question with the answer begun.

    The three wrong choices are drawn from the relation's other answers, and the right one's place at random.
    """
    rng = random.Random(f"cloze/{seed}")
    items = []
    for fact in world.facts:
        for style in (0, 1):
            wrong = [answer for answer in RELATIONS[fact.relation].objects if answer not in (fact.object, fact.subject)]
            choices = [*rng.sample(wrong, CHOICES - 1), fact.object]
            rng.shuffle(choices)
            items.append(
                {
                    "prompt": language.cloze(fact, style),
                    "choices": [language.choice(fact.relation, choice) for choice in choices],
                    "answer": choices.index(fact.object),
                    "group": fact.group,
                    "relation": fact.relation,
                    "style": ("statement", "question")[style],
                }
            )
    return items


def write_lines(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def take_bytes(texts: Iterator[str], size: int, keep: Callable[[str], bool]) -> Iterator[dict[str, str]]:
    """Distinct documents that `keep` accepts, until they hold `size` UTF-8 bytes."""
    seen: set[str] = set()
    left = size
    while left > 0:
        text = next(texts)
        if keep(text) and text not in seen:
            seen.add(text)
            left -= len(text.encode())
            yield {"text": text}


def first_words(text: str, count: int) -> str:
    """The beginning of a document, as a prompt."""
    return " ".join(text.split("\n")[0].split(" ")[:count])


def write_corpus(
    output: Path,
    seed: int = 0,
    *,
    pretrain_source_bytes: int = 0,
    pretrain_target_bytes: int = 0,
    adapt_source_bytes: int = 250_000,
    adapt_target_bytes: int = 4_000_000,
    heldout_bytes: int = 120_000,
    num_prompts: int = 4,
    world_seed: int = WORLD_SEED,
) -> CorpusPaths:
    """Write all files into the new folder `output`.

    Args:
        seed: draws the documents; the same seed and sizes give the same bytes.
        pretrain_source_bytes, pretrain_target_bytes: text to make a base model of; 0 writes no such file.
        adapt_source_bytes, adapt_target_bytes: replay text and target text to adapt it on.
        heldout_bytes: held-out text of the source language; the target language's takes twice as many bytes.
        num_prompts: beginnings of held-out documents of each language, to generate from.
        world_seed: the facts. The shipped base model knows those of the default only.

    Raises:
        FileExistsError: `output` exists.
    """
    world = build_world(world_seed)
    source, target = English(), Tavuni()

    def texts(stream: str) -> Iterator[str]:
        kind, language = stream.split("_")
        name = f"{stream}/{world_seed}/{seed}"
        if language == "source":
            return documents(source, [Planner(world.source_facts)], name)
        if kind == "pretrain":
            # The base has seen the script and the words, but no fact: each text is of another, made-up world.
            others = [build_world(world_seed + 1 + number) for number in range(MADE_UP_WORLDS)]
            return documents(target, [Planner(other.facts) for other in others], name)
        return documents(target, [Planner(world.target_facts, TARGET_WEIGHTS)], name)

    sizes = {
        "pretrain_source": pretrain_source_bytes,
        "pretrain_target": pretrain_target_bytes,
        "adapt_source": adapt_source_bytes,
        "adapt_target": adapt_target_bytes,
    }
    folder = Path(output)
    folder.mkdir(parents=True)
    for stream, size in sizes.items():
        if size:
            write_lines(folder / f"{stream}.jsonl", take_bytes(texts(stream), size, lambda text: not is_heldout(text)))
    prompts = {}
    for stream, language in (("heldout_source", source), ("heldout_target", target)):
        size = heldout_bytes if language is source else heldout_bytes * 2
        rows = list(take_bytes(texts(stream), size, is_heldout))
        write_lines(folder / f"{stream}.jsonl", rows)
        prompts[language.name] = [first_words(row["text"], 5) for row in rows[:num_prompts]]
    write_lines(folder / "cloze_source.jsonl", cloze_items(world, source))
    write_lines(folder / "cloze_target.jsonl", cloze_items(world, target))
    (folder / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def path(stream: str) -> Path:
        return folder / f"{stream}.jsonl"

    return CorpusPaths(
        path("pretrain_source") if pretrain_source_bytes else None,
        path("pretrain_target") if pretrain_target_bytes else None,
        path("adapt_source"),
        path("adapt_target"),
        path("heldout_source"),
        path("heldout_target"),
        path("cloze_source"),
        path("cloze_target"),
        folder / "prompts.json",
    )


def pack(folder: Path) -> None:
    """Replace every .jsonl file in a folder by its zstd compression."""
    for path in folder.glob("*.jsonl"):
        packed = zstandard.ZstdCompressor(level=22).compress(path.read_bytes())
        path.with_suffix(".jsonl.zst").write_bytes(packed)
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="draws the documents")
    parser.add_argument("--pack", action="store_true", help="compress the .jsonl files")
    args = parser.parse_args()
    write_corpus(args.output, args.seed)
    if args.pack:
        pack(args.output)


if __name__ == "__main__":
    main()
