"""A small invented world: entities, and facts in three groups by the language whose text tells them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The shipped base model has read about this world; another seed gives a world that it does not know.
WORLD_SEED = 0

SOURCE_ONLY = "source_only"
TARGET_ONLY = "target_only"
SHARED = "shared"
GROUPS = (SOURCE_ONLY, TARGET_ONLY, SHARED)


def words(text: str) -> tuple[str, ...]:
    """Words of a line."""
    return tuple(text.split())


# Names hold only sounds that both languages write: the target language respells them letter by letter.
WOMEN = words(
    "Alda Bruna Chela Dunia Emira Gelda Helka Ilona Jora Kamila Luska Mirel Nadra Orsha Petra Rosika Selma Tamsin"
)
MEN = words(
    "Anshel Boris Chandor Darek Edmar Gustan Hektor Ivar Jakob Kolman Lorens Marik Nestor Oskar Pavel "
    "Rubin Stanis Viktor"
)
PEOPLE = WOMEN + MEN
ELDERS = frozenset(PEOPLE[::5])
TOWNS = words("Ashbar Belmor Chidan Dorun Elgast Hulmen Jarvik Kesh Lumbra Nortal Pelgo Torvis")
RIVERS = words("Aldra Genva Isker Mosha Ruvel Senda")
TRADES = words("baker smith weaver miller potter tailor fisher carpenter doctor painter shepherd mason")
ANIMALS = words("goat duck horse sheep cat pigeon dog bee donkey rabbit hen cow")
FOODS = words("bread soup honey fish rice cheese porridge butter cabbage jam cake stew")
INSTRUMENTS = words("flute drum fiddle harp horn whistle lute trumpet organ guitar pipe gong")
GOODS = words("pot candle rope blanket basket knife lamp barrel hat bell comb wheel")
COLOURS = words("red green blue white black yellow")
DAYS = words("monday tuesday wednesday thursday friday saturday")
PRICES = tuple(str(number) for number in range(2, 14))

THINGS = (*GOODS, "hammer", "key", "book", "coat", "ladder", "spoon")
PLACES = words("forest hill mill bridge field road market house well inn garden shore")
THING_QUALITIES = ("old", "big", "small", "heavy", "good", "new", "fine")
ANIMAL_QUALITIES = ("old", "young", "big", "small", "strong", "quiet")
PLACE_QUALITIES = ("old", "big", "small", "cold", "quiet", "new")
QUALITIES = tuple(dict.fromkeys((*THING_QUALITIES, *ANIMAL_QUALITIES, *PLACE_QUALITIES)))
SEASONS = ("spring", "summer", "autumn", "winter")


class Relation(NamedTuple):
    """A question with one answer for each subject: `subjects` are asked, `objects` are the possible answers."""

    name: str
    subjects: Sequence[str]
    objects: Sequence[str]


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation("home", PEOPLE, TOWNS),
        Relation("trade", PEOPLE, TRADES),
        Relation("animal", PEOPLE, ANIMALS),
        Relation("food", PEOPLE, FOODS),
        Relation("instrument", PEOPLE, INSTRUMENTS),
        Relation("teacher", PEOPLE, PEOPLE),
        Relation("product", TOWNS, GOODS),
        Relation("river", TOWNS, RIVERS),
        Relation("market_day", TOWNS, DAYS),
        Relation("gate", TOWNS, COLOURS),
        Relation("price", GOODS, PRICES),
    )
}


@dataclass(frozen=True)
class Fact:
    """`object` is the one answer to `relation` asked of `subject`; `group` says which language's text tells it."""

    subject: str
    relation: str
    object: str
    group: str


@dataclass(frozen=True)
class World:
    """All facts, in a fixed order."""

    facts: tuple[Fact, ...]

    @cached_property
    def source_facts(self) -> tuple[Fact, ...]:
        """What source-language text may tell."""
        return tuple(fact for fact in self.facts if fact.group != TARGET_ONLY)

    @cached_property
    def target_facts(self) -> tuple[Fact, ...]:
        """What target-language text may tell."""
        return tuple(fact for fact in self.facts if fact.group != SOURCE_ONLY)


def build_world(seed: int = WORLD_SEED) -> World:
    """Draw every fact.

    Subjects of a relation fall evenly into the three groups, and within each group every possible answer is used
    equally often (to within one): how often a name occurs in a language's text then says nothing about the answers
    to the facts that this text does not tell, so that not knowing them scores at chance.
    """
    rng = random.Random(f"world/{seed}")
    facts = []
    for relation in RELATIONS.values():
        subjects = list(relation.subjects)
        rng.shuffle(subjects)
        for number, group in enumerate(GROUPS):
            answers: list[str] = []
            for subject in subjects[number :: len(GROUPS)]:
                if not any(answer != subject for answer in answers):
                    answers = list(relation.objects)
                    rng.shuffle(answers)
                answer = next(answer for answer in answers if answer != subject)
                answers.remove(answer)
                facts.append(Fact(subject, relation.name, answer, group))
    return World(tuple(facts))
