"""The source language: renders plans as English with a small grammar."""

import random

import english_lexicon as lexicon
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
from world import DAYS, GOODS, PEOPLE, SEASONS, TOWNS, WOMEN, Fact

NAMED = frozenset(PEOPLE) | frozenset(TOWNS)
FEMALE = frozenset(WOMEN)


def capitalise(text: str) -> str:
    """Upper-case the first letter only."""
    return text[0].upper() + text[1:]


def listed(words: tuple[str, ...]) -> str:
    """Words as "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def pronouns(person: str) -> tuple[str, str, str]:
    """Nominative, accusative, possessive."""
    return ("she", "her", "her") if person in FEMALE else ("he", "him", "his")


def subject_forms(subject: str, pronoun: bool = False) -> dict[str, str]:
    """The forms of a fact's subject that templates ask for."""
    if pronoun:
        return dict(zip("nap", pronouns(subject), strict=True))
    words = lexicon.with_article(subject) if subject in GOODS else subject
    return {"n": words, "a": words, "p": f"{words}'s"}


def object_form(relation: str, answer: str) -> str:
    """A fact's object as templates take it."""
    if relation == "trade":
        return lexicon.with_article(answer)
    if relation in ("animal", "product"):
        return lexicon.plural(answer)
    if relation == "market_day":
        return answer.capitalize()
    if relation == "price":
        return f"{lexicon.NUMBERS[int(answer)]} coins"
    return answer


class English:
    """Renders sentences; `rng` chooses among ways to say the same."""

    name = "en"

    def render(self, sentence: Sentence, rng: random.Random) -> str:
        """One sentence with its punctuation (a line of dialogue may hold several)."""
        match sentence:
            case Told(fact, pronoun):
                return capitalise(self.statement(fact, pronoun, rng)) + "."
            case ToldTogether():
                return capitalise(self.together(sentence, rng)) + "."
            case Asked(fact):
                words = rng.choice(lexicon.QUESTIONS[fact.relation])
                return capitalise(words.format(**subject_forms(fact.subject))) + "?"
            case Answered(fact):
                return capitalise(self.answer(fact, rng)) + "."
            case Roll(relation, subjects, answer):
                words = lexicon.ROLLS[relation].format(o=object_form(relation, answer))
                return f"{listed(subjects)} {words}."
            case Total(good, pieces, coins):
                total = lexicon.NUMBERS[coins] if coins < len(lexicon.NUMBERS) else str(coins)
                return f"{capitalise(lexicon.NUMBERS[pieces])} {lexicon.plural(good)} cost {total} coins."
            case Event(clause, link):
                words = self.clause(clause, rng)
                if link:
                    words = f"{lexicon.LINKS[link]} {words}"
                return capitalise(words) + "."
            case Pair(link, first, second):
                if link == "when" and rng.random() < 0.5:
                    return f"When {self.clause(second, rng)}, {self.clause(first, rng)}."
                return f"{capitalise(self.clause(first, rng))} {link} {self.clause(second, rng)}."
            case Says(speaker, said):
                words = " ".join(self.render(part, rng) for part in said)
                return f"{speaker}: {words}"
            case Phatic(key, name):
                return capitalise(rng.choice(lexicon.PHATIC[key]).format(n=name)) + "."
        raise AssertionError(sentence)

    def statement(self, fact: Fact, pronoun: bool, rng: random.Random) -> str:
        """A fact as a clause."""
        forms = subject_forms(fact.subject, pronoun)
        forms["o"] = object_form(fact.relation, fact.object)
        if rng.random() < 0.6:
            return "{n} ".format(**forms) + rng.choice(lexicon.VERB_PHRASES[fact.relation]).format(**forms)
        return rng.choice(lexicon.SENTENCES[fact.relation]).format(**forms)

    def together(self, sentence: ToldTogether, rng: random.Random) -> str:
        """Two facts of one subject: with "and", or one of them after "who"/"which"."""
        first, second = (
            rng.choice(lexicon.VERB_PHRASES[fact.relation]).format(o=object_form(fact.relation, fact.object))
            for fact in (sentence.first, sentence.second)
        )
        subject = sentence.first.subject
        name = subject_forms(subject, sentence.pronoun)["n"]
        if sentence.pronoun or rng.random() < 0.5:
            return f"{name} {first} and {second}"
        return f"{name}, {'who' if subject in PEOPLE else 'which'} {first}, {second}"

    def answer(self, fact: Fact, rng: random.Random) -> str:
        """A fact as an answer: a whole sentence, mostly led by the subject."""
        forms = subject_forms(fact.subject, fact.subject in PEOPLE and rng.random() < 0.3)
        forms["o"] = object_form(fact.relation, fact.object)
        phrase = rng.choice(lexicon.VERB_PHRASES[fact.relation][:2])
        return f"{forms['n']} {phrase.format(**forms)}"

    def cloze(self, fact: Fact, style: int) -> str:
        """A prompt that a fact's object (after a space) completes; `style` 0: statement, 1: after a question."""
        forms = {**subject_forms(fact.subject), "o": ""}
        told = capitalise(f"{forms['n']} {lexicon.VERB_PHRASES[fact.relation][0].format(**forms).rstrip()}")
        if style == 0:
            return told
        return f"{capitalise(lexicon.QUESTIONS[fact.relation][0].format(**forms))}? {told}"

    def choice(self, relation: str, answer: str) -> str:
        """An answer, as what follows a cloze prompt."""
        return " " + object_form(relation, answer)

    # Clauses

    def phrase(self, phrase: Phrase, accusative: bool = False) -> str:
        """Somebody or something."""
        head = phrase.head
        if phrase.pronoun:
            return pronouns(head)[accusative]
        if head in NAMED:
            return f"old {head}" if phrase.quality else head
        quality = f"{phrase.quality} " if phrase.quality else ""
        if phrase.number == 0:
            return quality + head
        if phrase.number > 1:
            return f"{lexicon.NUMBERS[phrase.number]} {quality}{lexicon.plural(head)}"
        return f"the {quality}{head}" if phrase.definite else lexicon.with_article(quality + head)

    def adverb(self, time: str) -> str:
        """When it happened."""
        if time in DAYS:
            return f"on {time.capitalize()}"
        return f"in {time}" if time in SEASONS else lexicon.TIMES[time]

    def clause(self, clause: Clause, rng: random.Random) -> str:
        """A clause: subject, verb, objects, places; the time at either end."""
        if clause.agent is None:
            weather = rng.choice(lexicon.WEATHER[clause.verb])
            return f"{weather} {self.adverb(clause.time)}" if clause.time else weather
        base, present, past = lexicon.VERBS[clause.verb]
        if clause.tense == "future":
            verb = f"will not {base}" if clause.negative else f"will {base}"
        elif clause.negative:
            verb = f"{'did' if clause.tense == 'past' else 'does'} not {base}"
        else:
            verb = past if clause.tense == "past" else present
        words = [self.phrase(clause.agent), verb]
        if clause.patient and clause.verb == "give" and clause.recipient and rng.random() < 0.5:
            words += [self.phrase(clause.recipient), self.phrase(clause.patient)]
        else:
            if clause.patient:
                words.append(self.phrase(clause.patient, accusative=True))
            if clause.recipient:
                words.append(f"to {self.phrase(clause.recipient, accusative=True)}")
        if clause.company:
            words.append(f"with {self.phrase(clause.company, accusative=True)}")
        if clause.origin:
            words.append(f"from {self.phrase(clause.origin, accusative=True)}")
        if clause.goal:
            words.append(f"to {self.phrase(clause.goal)}")
        if clause.place:
            head = clause.place.head
            preposition = next((word for word, heads in lexicon.PREPOSITIONS.items() if head in heads), "in")
            words.append(f"{preposition} {self.phrase(clause.place)}")
        text = " ".join(words)
        if clause.time:
            adverb = self.adverb(clause.time)
            text = f"{adverb} {text}" if rng.random() < 0.5 else f"{text} {adverb}"
        return text
