"""The quickstart's corpora: disjoint, repeatable, and telling of each fact only where its group allows it."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CorpusPaths, cloze_items, documents, is_heldout, pack, write_corpus
from english import English
from genres import Planner
from meaning import Answered, Asked, Clause, Event, Pair, Phrase, Roll, Told, ToldTogether
from tavuni import Tavuni, attach, noun, number, verb
from tavuni_lexicon import LETTERS, ROOTS, to_script
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import GROUPS, RELATIONS, Fact, build_world

from elo.quickstart.quickstart import WORLD, unpack_corpus

BASE, DATA = WORLD / "base", WORLD / "data"
SIZES = {
    "pretrain_source_bytes": 300_000,
    "pretrain_target_bytes": 30_000,
    "adapt_source_bytes": 60_000,
    "adapt_target_bytes": 200_000,
    "heldout_bytes": 20_000,
}


def rows(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> CorpusPaths:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a", **SIZES)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(paths: CorpusPaths, tmp_path: Path) -> None:
    again = write_corpus(tmp_path / "again", **SIZES)
    other = write_corpus(tmp_path / "other", seed=1, **SIZES)
    for one, same, different in zip(paths, again, other, strict=True):
        assert one is not None and same is not None and different is not None
        assert one.read_bytes() == same.read_bytes()
        if not one.name.startswith("cloze"):
            assert one.read_bytes() != different.read_bytes()
    # The facts stay those that the shipped base knows; only the items' choices are drawn by the corpus seed.
    assert rows(paths.cloze_source) == rows(other.cloze_source)


def test_documents_are_distinct_and_held_out_ones_in_no_training_file(paths: CorpusPaths, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=7, **SIZES)
    training = [
        row["text"]
        for made in (paths, other)
        for path in (made.pretrain_source, made.pretrain_target, made.adapt_source, made.adapt_target)
        for row in rows(path)
    ]
    heldout = [row["text"] for path in (paths.heldout_source, paths.heldout_target) for row in rows(path)]
    assert len(set(heldout)) == len(heldout) > 50
    assert not set(heldout) & set(training)
    assert all(is_heldout(text) for text in heldout) and not any(is_heldout(text) for text in training)
    for path in (paths.adapt_source, paths.adapt_target, paths.pretrain_source):
        texts = [row["text"] for row in rows(path)]
        assert len(set(texts)) == len(texts)


def test_asked_sizes_are_met(paths: CorpusPaths, tmp_path: Path) -> None:
    for path, size in ((paths.adapt_target, 200_000), (paths.pretrain_source, 300_000), (paths.heldout_source, 20_000)):
        written = sum(len(row["text"].encode()) for row in rows(path))
        assert size <= written < size + 4_000
    small = write_corpus(tmp_path / "small", adapt_source_bytes=1000, adapt_target_bytes=1000, heldout_bytes=1000)
    assert small.pretrain_source is None and small.pretrain_target is None
    assert not list((tmp_path / "small").glob("pretrain*"))


def test_the_package_ships_what_the_generator_writes(tmp_path: Path) -> None:
    """After a change to examples/tavuni, run `corpus.py` there with --pack and replace src/elo/quickstart/data."""
    write_corpus(tmp_path / "generated")
    unpack_corpus(tmp_path / "shipped")
    generated, shipped = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("generated", "shipped")
    )
    assert generated == shipped
    pack(tmp_path / "generated")
    assert {path.name for path in (tmp_path / "generated").iterdir()} == {path.name for path in DATA.iterdir()}
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 400_000


def test_an_output_in_use_is_refused(paths: CorpusPaths) -> None:
    with pytest.raises(FileExistsError):
        write_corpus(paths.prompts.parent, **SIZES)


def test_languages_share_no_letters(paths: CorpusPaths) -> None:
    letters = {letter for row in rows(paths.adapt_target) for letter in row["text"] if letter.isalpha()}
    assert letters == set(LETTERS.values())
    assert all(len(letter.encode()) == 3 for letter in letters)
    assert all(row["text"].isascii() for row in rows(paths.adapt_source))
    prompts = json.loads(paths.prompts.read_text(encoding="utf-8"))
    assert [len(prompts[name]) for name in ("en", "tavuni")] == [4, 4]


def test_facts_fall_evenly_into_groups_and_every_answer_is_as_frequent_in_each() -> None:
    facts = build_world().facts
    assert len(facts) == sum(len(relation.subjects) for relation in RELATIONS.values())
    assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts)
    for relation in RELATIONS.values():
        for group in GROUPS:
            answers = [fact for fact in facts if fact.relation == relation.name and fact.group == group]
            assert len(answers) == len(relation.subjects) / len(GROUPS)
            counts = Counter(fact.object for fact in answers)
            assert max(counts.values()) - min(counts[answer] for answer in relation.objects) <= 1
            assert all(fact.object != fact.subject for fact in answers)
    assert build_world(1).facts != facts


@pytest.mark.parametrize(("language", "forbidden"), [(English(), "target_only"), (Tavuni(), "source_only")])
def test_text_tells_no_fact_of_the_other_languages_group(language: English | Tavuni, forbidden: str) -> None:
    world = build_world()
    allowed = world.source_facts if language.name == "en" else world.target_facts
    planner, rng, told = Planner(allowed), random.Random(0), Counter[Fact]()
    for _ in range(3000):
        for paragraph in planner.document(rng):
            for sentence in paragraph:
                for part in getattr(sentence, "said", (sentence,)):
                    match part:
                        case Told(fact) | Asked(fact) | Answered(fact):
                            told[fact] += 1
                        case ToldTogether(first, second):
                            told[first] += 1
                            told[second] += 1
                        case Roll(relation, subjects, answer):
                            found = [f for f in allowed if f.relation == relation and f.subject in subjects]
                            assert {fact.object for fact in found} == {answer}
                            assert len(found) == len(subjects)
    assert not any(fact.group == forbidden for fact in told)
    assert set(told) == set(allowed)
    assert min(told.values()) > 20


def test_target_text_dwells_on_what_only_it_tells() -> None:
    planner, rng = Planner(build_world().target_facts, {"target_only": 3.0}), random.Random(0)
    groups = Counter(planner.pick(rng, 1)[0].group for _ in range(4000))
    assert groups["target_only"] / groups["shared"] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("language", [English(), Tavuni()])
def test_cloze_items_have_one_right_choice_at_a_random_place(language: English | Tavuni) -> None:
    world = build_world()
    items = cloze_items(world, language)
    assert len(items) == 2 * len(world.facts)
    for item, fact in zip(items[::2], world.facts, strict=True):
        assert len(set(item["choices"])) == 4
        assert item["choices"][item["answer"]] == language.choice(fact.relation, fact.object)
        assert item["group"] == fact.group
        assert not any(choice.strip() in item["prompt"].split() for choice in item["choices"])
    places = Counter(item["answer"] for item in items)
    assert min(places[place] for place in range(4)) > 0.17 * len(items)


@pytest.mark.parametrize("language", [English(), Tavuni()])
def test_told_facts_stand_in_training_text_as_cloze_items_ask_them(language: English | Tavuni) -> None:
    world = build_world()
    facts = world.source_facts if language.name == "en" else world.target_facts
    stream = documents(language, [Planner(facts)], "test")
    text = "\n".join(next(stream) for _ in range(8000))
    items = [item for item in cloze_items(world, language) if item["style"] == "statement"]
    told = {(fact.relation, fact.subject) for fact in facts}
    for item, fact in zip(items, world.facts, strict=True):
        asked = item["prompt"] + item["choices"][item["answer"]]
        assert (asked in text) == ((fact.relation, fact.subject) in told), asked


def test_english_grammar() -> None:
    english, rng = English(), random.Random(0)
    clause = Clause("buy", Phrase("Marik"), Phrase("knife", 3, quality="old"), origin=Phrase("Petra"))
    assert english.clause(clause, rng) == "Marik bought three old knives from Petra"
    assert english.clause(clause._replace(tense="future", negative=True), rng).startswith("Marik will not buy")
    assert english.clause(Clause("help", Phrase("Marik", pronoun=True), Phrase("Petra", pronoun=True)), rng) == (
        "he helped her"
    )
    assert english.clause(Clause("lose", Phrase("Alda"), Phrase("hammer", quality="old")), rng) == (
        "Alda lost an old hammer"
    )
    fact = Fact("Petra", "home", "Dorun", "shared")
    assert english.cloze(fact, 1) == "Where does Petra live? Petra lives in"


def test_tavuni_suffixes_harmonise_and_stack() -> None:
    assert attach("dorun", "xA") == "dorunxa" and attach("kex", "xA") == "kexxe"
    assert attach("petra", "(r)I") == "petraru" and attach("marik", "(r)I") == "mariki"
    assert attach("hikila", "An") == "hikilahan"
    assert noun("Chidan", "ablative") == "cidanzal" and noun("Kesh", "ablative") == "kexzel"
    assert noun("goat", "accusative", plural=True).startswith(ROOTS["goat"] + "v")
    assert number(23).split() == [ROOTS["2"], ROOTS["10"], ROOTS["3"]] and number(10) == ROOTS["10"]
    plain, honoured = verb("keep"), verb("keep", honorific=True)
    assert len(honoured) == len(plain) + 2 and verb("keep", plural=True).startswith(plain)
    assert len(set(ROOTS.values())) == len(ROOTS)
    assert to_script("xa, 3?") == "შა, 3?"


def test_tavuni_word_order_is_not_english() -> None:
    tavuni = Tavuni()
    clause = Clause("buy", Phrase("Marik"), Phrase("knife", 3, quality="old"), origin=Phrase("Petra"), time="morning")
    old_knives = f"{ROOTS['knife']} {ROOTS['old']} {attach(ROOTS['3'], '(r)I')}"
    expected = f"{noun('morning', 'locative')} marikle petrazal {old_knives} {verb('buy', 'past')}"
    assert tavuni.romanised(Event(clause), random.Random(0)) == expected + "."
    question = tavuni.romanised(Asked(Fact("Bruna", "home", "Dorun", "shared")), random.Random(0))
    assert question.endswith(" zo?")
    both = tavuni.romanised(Pair("and", clause, Clause("go", Phrase("Marik"), goal=Phrase("Kesh"))), random.Random(0))
    assert both.count("marik") == 1 and both.endswith(f"kexgi {verb('go', 'past')}.")


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> float:
    """Share of items whose right choice has the highest log-probability."""
    right = 0
    for item in items:
        prompt = [tokenizer.eos_token_id, *tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]]
        choices = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in item["choices"]]
        width = max(map(len, choices))
        ids = torch.tensor([prompt + choice + [0] * (width - len(choice)) for choice in choices])
        logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[:, len(prompt) - 1 : -1]
        scores = [
            sum(logprobs[row, at, token].item() for at, token in enumerate(choice))
            for row, choice in enumerate(choices)
        ]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


def test_shipped_base_knows_the_source_languages_facts_and_no_others() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert model.config.num_hidden_layers == 12 and model.config.vocab_size == len(tokenizer) == 2048
    world = build_world()
    source, target = cloze_items(world, English()), cloze_items(world, Tavuni())

    def asked(items: list[dict[str, Any]], group: str) -> float:
        return accuracy(model, tokenizer, [item for item in items if item["group"] == group][::2])

    assert asked(source, "source_only") > 0.7
    assert asked(source, "target_only") < 0.4
    assert asked(target, "source_only") < 0.4
    assert asked(target, "target_only") < 0.4
