"""Documents as plans: which facts and events a text of each genre tells, in which order."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from meaning import (
    Answered,
    Asked,
    Clause,
    Event,
    Pair,
    Paragraph,
    Phatic,
    Phrase,
    Roll,
    Says,
    Sentence,
    Told,
    ToldTogether,
    Total,
)
from world import (
    ANIMAL_QUALITIES,
    ANIMALS,
    DAYS,
    ELDERS,
    FOODS,
    GOODS,
    PEOPLE,
    PLACE_QUALITIES,
    PLACES,
    SEASONS,
    THING_QUALITIES,
    THINGS,
    TOWNS,
    Fact,
)

TIMES = ("morning", "evening", "night", "yesterday", "noon", *SEASONS, *DAYS)
LINKS = (None, None, None, "then", "later", "but", "so", "after_that")


class Planner:
    """Draws document plans that tell facts of `facts` only.

    Args:
        facts: what this language's text may tell.
        weights: how much more often than once facts of a group are told, by group.
    """

    def __init__(self, facts: Sequence[Fact], weights: dict[str, float] | None = None) -> None:
        self.facts = list(facts)
        total = 0.0
        self.cumulative = [total := total + (weights or {}).get(fact.group, 1.0) for fact in self.facts]
        self.of_subject: dict[str, list[Fact]] = defaultdict(list)
        self.of_answer: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in self.facts:
            self.of_subject[fact.subject].append(fact)
            self.of_answer[fact.relation, fact.object].append(fact)
        self.genres: list[Callable[[random.Random], list[Paragraph]]] = [
            self.biography,
            self.biography,
            self.travel_note,
            self.market_report,
            self.dialogue,
            self.story,
            self.questions,
            self.register,
        ]

    def document(self, rng: random.Random) -> list[Paragraph]:
        """One document of a random genre."""
        return rng.choice(self.genres)(rng)

    # Facts

    def pick(self, rng: random.Random, count: int) -> list[Fact]:
        """Facts by weight, no fact twice."""
        picked: dict[Fact, None] = {}
        while len(picked) < min(count, len(self.facts)):
            picked[rng.choices(self.facts, cum_weights=self.cumulative)[0]] = None
        return list(picked)

    def about(self, rng: random.Random, subject: str, count: int) -> list[Sentence]:
        """Statements of up to `count` facts of one subject: named first, then mostly a pronoun."""
        facts = list(self.of_subject[subject])
        rng.shuffle(facts)
        facts = facts[:count]
        sentences: list[Sentence] = []
        while facts:
            pronoun = bool(sentences) and subject in PEOPLE and rng.random() < 0.5
            if len(facts) > 1 and rng.random() < 0.4:
                sentences.append(ToldTogether(facts.pop(), facts.pop(), pronoun))
            else:
                sentences.append(Told(facts.pop(), pronoun))
        return sentences

    # Genres

    def biography(self, rng: random.Random) -> list[Paragraph]:
        """A person: facts, then what they did one day; sometimes a second person whom the first meets."""
        person = self.pick_person(rng)
        paragraphs: list[Paragraph] = [self.about(rng, person, rng.randint(2, 5))]
        paragraphs[0] += [Event(self.event(rng, person, pronoun=True), rng.choice(LINKS))]
        if rng.random() < 0.5:
            friend = self.pick_person(rng)
            if friend != person:
                meeting = Clause("meet", Phrase(person), Phrase(friend), time=rng.choice(TIMES), place=self.place(rng))
                paragraphs.append([Event(meeting), *self.about(rng, friend, rng.randint(2, 3))])
        return paragraphs

    def travel_note(self, rng: random.Random) -> list[Paragraph]:
        """Somebody goes from town to town; the towns' facts and what was seen there."""
        traveller, town, following = rng.choice(PEOPLE), rng.choice(TOWNS), rng.choice(TOWNS)
        paragraph: Paragraph = [
            Event(Clause("go", Phrase(traveller), goal=Phrase(town), time=rng.choice(TIMES))),
            *self.about(rng, town, rng.randint(2, 4)),
        ]
        dwellers = self.of_answer["home", town]
        if dwellers:
            dweller = rng.choice(dwellers)
            paragraph += [Told(dweller), *self.about(rng, dweller.subject, 1)]
        paragraph.append(Event(self.event(rng, traveller), rng.choice(LINKS)))
        if following == town:
            return [paragraph]
        leaving = Clause("come", Phrase(traveller, pronoun=True), origin=Phrase(town), goal=Phrase(following))
        return [paragraph, [Event(leaving, "after_that"), *self.about(rng, following, rng.randint(1, 3))]]

    def market_report(self, rng: random.Random) -> list[Paragraph]:
        """A market: its town's facts, prices, and who bought what."""
        town = rng.choice(TOWNS)
        paragraph: Paragraph = self.about(rng, town, 2)
        for good in rng.sample(GOODS, rng.randint(2, 3)):
            told = self.of_subject[good]
            if told:
                paragraph.append(Told(told[0]))
                if rng.random() < 0.5:
                    count = rng.randint(2, 4)
                    paragraph.append(Total(good, count, count * int(told[0].object)))
            buyer, seller = rng.sample(PEOPLE, 2)
            thing = self.thing(rng, good)
            if rng.random() < 0.5:
                sale = Clause("buy", Phrase(buyer), thing, origin=Phrase(seller))
            else:
                sale = Clause("sell", Phrase(seller), thing, recipient=Phrase(buyer))
            paragraph.append(Event(sale, rng.choice(LINKS)))
        return [paragraph]

    def dialogue(self, rng: random.Random) -> list[Paragraph]:
        """Two people ask each other about facts."""
        asking, answering = rng.sample(PEOPLE, 2)
        lines: list[Sentence] = [
            Says(asking, (Phatic("greeting", answering),)),
            Says(answering, (Phatic("greeting", asking),)),
        ]
        for fact in self.pick(rng, rng.randint(2, 4)):
            lines += [Says(asking, (Asked(fact),)), Says(answering, (Answered(fact),))]
            if rng.random() < 0.3:
                lines.append(Says(asking, (Phatic("thanks"), Told(fact))))
        lines.append(Says(asking, (Phatic("farewell", answering),)))
        return [[line] for line in lines]

    def story(self, rng: random.Random) -> list[Paragraph]:
        """A few events that happen to one or two people, with a beginning and an end."""
        hero, other = rng.sample(PEOPLE, 2)
        first: Paragraph = [Phatic("opening"), Event(self.event(rng, hero)), *self.about(rng, hero, 1)]
        for _ in range(rng.randint(2, 4)):
            first.append(self.happening(rng, hero, other))
        second: Paragraph = [Event(Clause("meet", Phrase(hero), Phrase(other), place=self.place(rng)), "later")]
        second += self.about(rng, other, 2)
        for _ in range(rng.randint(1, 3)):
            second.append(self.happening(rng, other, hero))
        return [first, [*second, Phatic("closing", hero)]]

    def questions(self, rng: random.Random) -> list[Paragraph]:
        """Questions, each with its answer."""
        return [[Asked(fact), Answered(fact)] for fact in self.pick(rng, rng.randint(3, 6))]

    def register(self, rng: random.Random) -> list[Paragraph]:
        """Several facts in a row; those who have an answer in common together."""
        paragraph: Paragraph = []
        for fact in self.pick(rng, rng.randint(3, 5)):
            alike = self.of_answer[fact.relation, fact.object]
            if len(alike) > 1 and fact.relation not in ("price", "teacher", "gate") and rng.random() < 0.7:
                subjects = tuple(other.subject for other in rng.sample(alike, min(len(alike), rng.randint(2, 3))))
                paragraph.append(Roll(fact.relation, subjects, fact.object))
            else:
                paragraph.append(Told(fact))
        return [paragraph]

    # Events

    def pick_person(self, rng: random.Random) -> str:
        """A person of whom a fact picked by weight tells."""
        while True:
            subject = self.pick(rng, 1)[0].subject
            if subject in PEOPLE:
                return subject

    def happening(self, rng: random.Random, hero: str, other: str) -> Sentence:
        """An event of the hero, alone or tied to another clause in one sentence."""
        chance = rng.random()
        if chance < 0.2:
            return Pair("and", self.event(rng, hero), self.event(rng, hero, pronoun=True))
        if chance < 0.3:
            return Pair("because", self.event(rng, hero), self.weather(rng))
        if chance < 0.4:
            return Pair("when", self.event(rng, hero), self.event(rng, other))
        if chance < 0.5:
            return Event(self.weather(rng), rng.choice(LINKS))
        return Event(self.event(rng, hero, pronoun=rng.random() < 0.5), rng.choice(LINKS))

    def weather(self, rng: random.Random) -> Clause:
        """Rain, snow or wind."""
        return Clause(rng.choice(("rain", "snow", "blow")), time=rng.choice(TIMES))

    def place(self, rng: random.Random) -> Phrase:
        """A place that is no town."""
        quality = rng.choice(PLACE_QUALITIES) if rng.random() < 0.15 else None
        return Phrase(rng.choice(PLACES), definite=True, quality=quality)

    def thing(self, rng: random.Random, head: str) -> Phrase:
        """One or several of a thing."""
        number = rng.randint(2, 9) if rng.random() < 0.35 else 1
        definite = number == 1 and rng.random() < 0.25
        qualities = ANIMAL_QUALITIES if head in ANIMALS else THING_QUALITIES
        quality = rng.choice(qualities) if rng.random() < 0.35 else None
        return Phrase(head, number=number, definite=definite, quality=quality)

    def event(self, rng: random.Random, person: str, pronoun: bool = False) -> Clause:
        """Something that a person did, does or will do."""
        other = rng.choice(PEOPLE)
        agent = Phrase(person, pronoun=pronoun, quality="old" if person in ELDERS and not pronoun else None)
        tense = rng.choice(("past", "past", "past", "past", "present", "future"))
        time = rng.choice(TIMES) if rng.random() < 0.4 and tense == "past" else None
        clause = Clause("go", agent, time=time, tense=tense, negative=rng.random() < 0.08)
        if other == person:
            return clause._replace(verb="rest", place=self.place(rng))
        kind = rng.randrange(12)
        if kind == 0:
            return clause._replace(goal=Phrase(rng.choice(TOWNS)), company=Phrase(other))
        if kind == 1:
            return clause._replace(verb="come", origin=self.place(rng))
        if kind == 2:
            return clause._replace(verb="see", patient=self.thing(rng, rng.choice(ANIMALS)), place=self.place(rng))
        if kind == 3:
            return clause._replace(verb="give", patient=self.thing(rng, rng.choice(THINGS)), recipient=Phrase(other))
        if kind == 4:
            verb = rng.choice(("find", "lose", "hide"))
            return clause._replace(verb=verb, patient=self.thing(rng, rng.choice(THINGS)), place=self.place(rng))
        if kind == 5:
            verb = rng.choice(("eat", "cook"))
            return clause._replace(verb=verb, patient=Phrase(rng.choice(FOODS), number=0), company=Phrase(other))
        if kind == 6:
            verb = rng.choice(("rest", "sing", "wait", "sleep"))
            return clause._replace(verb=verb, place=self.place(rng))
        if kind == 7:
            patient = self.thing(rng, rng.choice(THINGS))
            return clause._replace(verb="carry", patient=patient, goal=Phrase(rng.choice(TOWNS)))
        if kind == 8:
            verb = rng.choice(("help", "hear", "thank"))
            return clause._replace(verb=verb, patient=Phrase(other), place=self.place(rng))
        if kind == 9:
            return clause._replace(verb="mend", patient=self.thing(rng, rng.choice(THINGS)))
        if kind == 10:
            return clause._replace(goal=self.place(rng))
        return clause._replace(verb="buy", patient=self.thing(rng, rng.choice(THINGS)), origin=Phrase(other))
