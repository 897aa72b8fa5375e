"""Tavuni, the invented target language: agglutinative, verb-final, vowel harmony; see README.md here."""

import random
from functools import cache

from meaning import (
    Answered,
    Asked,
    Clause,
    Event,
    Pair,
    Phatic,
    Phrase,
    Roll,
    Says,
    Sentence,
    Told,
    ToldTogether,
    Total,
)
from tavuni_lexicon import BACK, ROOTS, VOWELS, respell, to_script
from world import DAYS, ELDERS, PEOPLE, RIVERS, TOWNS, Fact

NAMED = frozenset(PEOPLE) | frozenset(TOWNS) | frozenset(RIVERS)
QUESTION = "zo"

# A and I harmonise with the last vowel: a/e, u/i. A bracketed sound appears after a vowel (consonants) only.
CASES = {
    "nominative": "",
    "topic": "lA",
    "accusative": "(r)I",
    "genitive": "(n)Am",
    "locative": "xA",
    "allative": "gI",
    "ablative": "zAl",
    "comitative": "bIr",
    "copula": "rAk",
}
PLURAL = "vA"
TENSES = {"present": "An", "past": "Ik", "future": "Ax"}
HONORIFIC = "Im"
NEGATIVE = "Ot"
CONVERB = "Ari"
REASON = "Asko"
WHILE = "Ulme"

# How each relation is said as a clause: case of the subject, case and number of the object, verb.
CLAUSES = {
    "home": ("topic", "locative", "live"),
    "trade": ("topic", "copula", None),
    "animal": ("topic", "accusative", "keep"),
    "food": ("topic", "accusative", "love"),
    "instrument": ("topic", "accusative", "play"),
    "teacher": ("topic", "ablative", "learn"),
    "product": ("locative", "accusative", "make"),
    "river": ("locative", "nominative", "flow"),
    "market_day": ("genitive", "locative", "be_held"),
    "gate": ("locative", "nominative", "stand"),
    "price": ("topic", "allative", "sell"),
}
QUESTION_WORDS = {"home": "where", "market_day": "when", "price": "how_many", "teacher": "who"}


@cache
def attach(stem: str, suffix: str) -> str:
    """A stem with one suffix, harmonised; a bracketed consonant only after a vowel; two vowels do not meet."""
    last = next((letter for letter in reversed(stem) if letter in VOWELS), "a")
    back = last in BACK
    if suffix.startswith("("):
        suffix = (suffix[1] if stem[-1] in VOWELS else "") + suffix[3:]
    suffix = suffix.replace("A", "a" if back else "e").replace("I", "u" if back else "i")
    suffix = suffix.replace("O", "o" if back else "e").replace("U", "u" if back else "i")
    if suffix and stem[-1] in VOWELS and suffix[0] in VOWELS:
        stem += "h"
    return stem + suffix


@cache
def noun(head: str, case: str = "nominative", plural: bool = False) -> str:
    """A noun or name in a case."""
    stem = respell(head) if head in NAMED else ROOTS[head]
    if plural:
        stem = attach(stem, PLURAL)
    return attach(stem, CASES[case]) if CASES[case] else stem


@cache
def number(value: int) -> str:
    """A number from 1 to 99 in words: tens, then ones."""
    tens, ones = divmod(value, 10)
    words = []
    if tens:
        words += ([ROOTS[str(tens)]] if tens > 1 else []) + [ROOTS["10"]]
    if ones:
        words.append(ROOTS[str(ones)])
    return " ".join(words)


@cache
def verb(
    key: str, tense: str = "present", honorific: bool = False, plural: bool = False, negative: bool = False
) -> str:
    """A finite verb: root, honour, negation, tense, number of the subject."""
    stem = ROOTS[f"verb:{key}"]
    if honorific:
        stem = attach(stem, HONORIFIC)
    if negative:
        stem = attach(stem, NEGATIVE)
    stem = attach(stem, TENSES[tense])
    return attach(stem, PLURAL) if plural else stem


def marked(words: str, case: str) -> str:
    """A case suffix on the last word of a phrase (the case stands once, at the end)."""
    return attach(words, CASES[case]) if CASES[case] else words


def object_form(relation: str, answer: str, case: str) -> str:
    """A fact's object in a case."""
    if relation == "price":
        return f"{ROOTS['coin']} {marked(number(int(answer)), case)}"
    if relation == "gate" and case == "nominative":
        return f"{ROOTS['gate']} {ROOTS[answer]}"
    return noun(answer, case, relation in ("animal", "product"))


def honoured(fact: Fact) -> bool:
    """Whether the verb of this fact's clause shows respect: its subject is an elder."""
    return fact.subject in ELDERS


class Tavuni:
    """Renders sentences; `rng` chooses among ways to say the same."""

    name = "tavuni"

    def render(self, sentence: Sentence, rng: random.Random) -> str:
        """One sentence with its punctuation, in the script."""
        return to_script(self.romanised(sentence, rng))

    def romanised(self, sentence: Sentence, rng: random.Random) -> str:
        """One sentence with its punctuation, one Latin letter a sound."""
        match sentence:
            case Told(fact, pronoun):
                return self.statement(fact, pronoun, rng) + "."
            case ToldTogether(first, second, pronoun):
                return f"{self.converb_clause(first, pronoun)}, {self.clause_of(second, 'dropped')}."
            case Asked(fact):
                return self.question(fact, rng)
            case Answered(fact):
                return self.answer(fact, rng) + "."
            case Roll(relation, subjects, answer):
                return self.roll(relation, subjects, answer)
            case Total(good, pieces, coins):
                goods = f"{noun(good)} {marked(number(pieces), 'topic')}"
                return f"{goods} {ROOTS['coin']} {marked(number(coins), 'copula')}."
            case Event(clause, link):
                words = self.clause(clause)
                return f"{ROOTS[link]} {words}." if link else f"{words}."
            case Pair(link, first, second):
                return self.pair(link, first, second)
            case Says(speaker, said):
                return f"{noun(speaker)}: " + " ".join(self.romanised(part, rng) for part in said)
            case Phatic(key, name):
                return self.phatic(key, name, rng)
        raise AssertionError(sentence)

    # Facts

    def statement(self, fact: Fact, pronoun: bool, rng: random.Random) -> str:
        """A fact as a clause with its topic first, with the object first, or as "X's home is Y"."""
        chance = rng.random()
        if chance < 0.4:
            return self.clause_of(
                fact, "dropped" if pronoun and rng.random() < 0.6 else "pronoun" if pronoun else "topic"
            )
        if chance < 0.6 and not pronoun:
            return self.clause_of(fact, "last")
        return self.genitive(fact, "that_one" if pronoun else fact.subject)

    def answer(self, fact: Fact, rng: random.Random) -> str:
        """A fact as an answer: the subject dropped, named, or as "X's home is Y"."""
        chance = rng.random()
        if chance < 0.4:
            return self.clause_of(fact, "dropped")
        return self.clause_of(fact, "topic") if chance < 0.6 else self.genitive(fact, fact.subject)

    def genitive(self, fact: Fact, owner: str) -> str:
        """ "X's home is Y": genitive, the relation's noun as topic, the object with the copula."""
        words = marked(ROOTS[owner] if owner == "that_one" else noun(owner), "genitive")
        return f"{words} {noun(fact.relation, 'topic')} {object_form(fact.relation, fact.object, 'copula')}"

    def clause_of(self, fact: Fact, subject: str, ending: str | None = None) -> str:
        """A fact as a clause; `subject`: "topic" (first), "last" (after the object), "pronoun" or "dropped"."""
        subject_case, object_case, key = CLAUSES[fact.relation]
        words = [object_form(fact.relation, fact.object, object_case)]
        if subject == "topic":
            words.insert(0, self.with_market(fact, noun(fact.subject, subject_case)))
        elif subject == "pronoun":
            words.insert(0, self.with_market(fact, marked(ROOTS["that_one"], subject_case)))
        elif subject == "last":
            case = "nominative" if subject_case == "topic" else subject_case
            words.append(self.with_market(fact, noun(fact.subject, case)))
            if key is None:  # the copula stays at the end
                words = [words[1], words[0]]
        if key:
            plural = fact.relation == "product"
            words.append(ending or verb(key, honorific=honoured(fact), plural=plural))
        return " ".join(words)

    def with_market(self, fact: Fact, words: str) -> str:
        """ "Dorun's" -> "Dorun's market", where that is what the clause is about."""
        return f"{words} {noun('market', 'topic')}" if fact.relation == "market_day" else words

    def converb_clause(self, fact: Fact, pronoun: bool) -> str:
        """A fact as a clause that does not end the sentence: "living in Y"."""
        key = CLAUSES[fact.relation][2]
        if key is None:
            subject = ROOTS["that_one"] if pronoun else noun(fact.subject)
            return f"{marked(subject, 'topic')} {object_form(fact.relation, fact.object, 'comitative')}"
        return self.clause_of(fact, "pronoun" if pronoun else "topic", attach(ROOTS[f"verb:{key}"], CONVERB))

    def question(self, fact: Fact, rng: random.Random, style: int | None = None) -> str:
        """A question: the asked-for word where the answer would stand, and the question particle at the end."""
        subject_case, object_case, key = CLAUSES[fact.relation]
        word = QUESTION_WORDS.get(fact.relation, "what")
        if style == 1 or (style is None and rng.random() < 0.4):
            asked = marked(ROOTS[word], "copula")
            return f"{noun(fact.subject, 'genitive')} {noun(fact.relation, 'topic')} {asked} {QUESTION}?"
        words = [self.with_market(fact, noun(fact.subject, subject_case))]
        if fact.relation == "price":
            words.append(f"{ROOTS['coin']} {marked(ROOTS[word], object_case)}")
        elif fact.relation == "gate":
            words.append(f"{ROOTS['gate']} {ROOTS['which']}")
        else:
            words.append(marked(ROOTS[word], object_case))
        if key:
            words.append(verb(key, honorific=honoured(fact), plural=fact.relation == "product"))
        return " ".join([*words, QUESTION]) + "?"

    def roll(self, relation: str, subjects: tuple[str, ...], answer: str) -> str:
        """Several subjects of one answer: "A B C-with-all ..."; the verb is plural."""
        subject_case, object_case, key = CLAUSES[relation]
        named = [noun(subject, "comitative") for subject in subjects[:-1]]
        named.append(noun(subjects[-1], "topic" if subject_case == "topic" else subject_case, plural=False))
        if relation == "market_day":
            named.append(noun("market", "topic", plural=True))
        words = [*named, ROOTS["all"], object_form(relation, answer, object_case)]
        if key:
            words.append(verb(key, plural=True))
        return " ".join(words) + "."

    def cloze(self, fact: Fact, style: int) -> str:
        """A prompt that `choice` completes; `style` 0: "X's home (topic)", 1: after a question."""
        told = f"{noun(fact.subject, 'genitive')} {noun(fact.relation, 'topic')}"
        if style == 0:
            return to_script(told)
        return to_script(f"{self.question(fact, random.Random(0), style=0)} {told}")

    def choice(self, relation: str, answer: str) -> str:
        """An answer with the copula, as what follows a cloze prompt."""
        return " " + to_script(object_form(relation, answer, "copula"))

    # Clauses

    def phrase(self, phrase: Phrase, case: str) -> str:
        """Somebody or something: noun, quality, number, with the case once at the end."""
        if phrase.pronoun:
            return marked(ROOTS["that_one"], case)
        words = [noun(phrase.head)]
        if phrase.quality and phrase.head not in NAMED:
            words.append(ROOTS[phrase.quality])
        if phrase.number > 1:
            words.append(number(phrase.number))
        words[-1] = marked(words[-1], case)
        return " ".join(words)

    def adverb(self, time: str) -> str:
        """When it happened: a noun in the locative."""
        return f"{noun(time)} {noun('day', 'locative')}" if time in DAYS else noun(time, "locative")

    def clause(self, clause: Clause, ending: str | None = None, drop_agent: bool = False) -> str:
        """A clause: time, topic, company, place, origin, goal, recipient, object, verb."""
        words = [self.adverb(clause.time)] if clause.time else []
        if clause.agent is None:
            what = {"rain": "rain", "snow": "snow", "blow": "wind"}[clause.verb]
            key = "blow" if clause.verb == "blow" else "fall"
            return " ".join([*words, noun(what), attach(ROOTS[f"verb:{key}"], ending) if ending else verb(key, "past")])
        if not drop_agent:
            words.append(self.phrase(clause.agent, "topic"))
        for phrase, case in (
            (clause.company, "comitative"),
            (clause.place, "locative"),
            (clause.origin, "ablative"),
            (clause.goal, "allative"),
            (clause.recipient, "allative"),
            (clause.patient, "accusative"),
        ):
            if phrase:
                words.append(self.phrase(phrase, case))
        if ending:
            words.append(attach(ROOTS[f"verb:{clause.verb}"], ending))
        else:
            honorific = clause.agent.head in ELDERS
            words.append(verb(clause.verb, clause.tense, honorific, False, clause.negative))
        return " ".join(words)

    def pair(self, link: str, first: Clause, second: Clause) -> str:
        """Two clauses: the first (or the reason, or the time) with a converb ending before the main one."""
        if link == "and":
            return f"{self.clause(first, CONVERB)}, {self.clause(second, drop_agent=True)}."
        return f"{self.clause(second, REASON if link == 'because' else WHILE)}, {self.clause(first)}."

    def phatic(self, key: str, name: str | None, rng: random.Random) -> str:
        """Fixed expressions."""
        who = noun(name) if name else ""
        if key == "greeting":
            return rng.choice((f"{noun('day')} {ROOTS['good']}, {who}.", f"{noun('peace')}, {who}."))
        if key == "thanks":
            return f"{noun('truth', 'copula')}."
        if key == "farewell":
            return f"{noun('path')} {ROOTS['good']}, {who}."
        if key == "opening":
            story = noun("story", "accusative")
            return rng.choice(
                (
                    f"{noun('time')} {attach(ROOTS['old'], CASES['locative'])} {verb('happen', 'past')}.",
                    f"{story} {verb('tell', plural=True)}.",
                )
            )
        return f"{who} {noun('home', 'allative')} {verb('go', 'past', name in ELDERS)}."
