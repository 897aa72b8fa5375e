"""What a document says, before it is said in any language.

Genres build these; each language renders them by its own grammar. Heads, verbs and adverbs are keys that both
lexicons know.
"""

from typing import NamedTuple

from world import Fact


class Phrase(NamedTuple):
    """Somebody or something: a name, or a noun with a number, a quality and definiteness."""

    head: str
    number: int = 1
    quality: str | None = None
    definite: bool = False
    pronoun: bool = False
    also: str | None = None  # a second name: "Marik and Petra"


class Clause(NamedTuple):
    """Somebody does something. Without an agent it is the weather."""

    verb: str
    agent: Phrase | None = None
    patient: Phrase | None = None
    place: Phrase | None = None
    goal: Phrase | None = None
    origin: Phrase | None = None
    recipient: Phrase | None = None
    company: Phrase | None = None
    time: str | None = None
    tense: str = "past"
    negative: bool = False


class Told(NamedTuple):
    """A fact, as a statement. `pronoun`: the subject was just named."""

    fact: Fact
    pronoun: bool = False


class ToldTogether(NamedTuple):
    """Two facts of one subject in one sentence."""

    first: Fact
    second: Fact
    pronoun: bool = False


class Asked(NamedTuple):
    """The question whose answer is the fact's object."""

    fact: Fact


class Answered(NamedTuple):
    """The fact as the answer to its question."""

    fact: Fact


class Roll(NamedTuple):
    """All of `subjects` have the same answer to one relation."""

    relation: str
    subjects: tuple[str, ...]
    object: str


class Total(NamedTuple):
    """`number` pieces of a good cost `coins` altogether."""

    good: str
    number: int
    coins: int


class Event(NamedTuple):
    """A clause, after a word that ties it to what went before."""

    clause: Clause
    link: str | None = None


class Pair(NamedTuple):
    """Two clauses in one sentence: `link` is "and" (same agent), "because" or "when"."""

    link: str
    first: Clause
    second: Clause


class Says(NamedTuple):
    """A line of dialogue."""

    speaker: str
    said: tuple["Sentence", ...]


class Phatic(NamedTuple):
    """A fixed expression: greeting, thanks, farewell, an opening or a closing of a story."""

    key: str
    name: str | None = None


Sentence = Told | ToldTogether | Asked | Answered | Roll | Total | Event | Pair | Says | Phatic
Paragraph = list[Sentence]
