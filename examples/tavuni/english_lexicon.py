"""Words and fact templates of the source language."""

from world import words

IRREGULAR_PLURALS = {"sheep": "sheep", "donkey": "donkeys", "fish": "fish", "knife": "knives", "key": "keys"}
NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)

# base, third person present, past
VERBS = {
    "go": ("go", "goes", "went"),
    "come": ("come", "comes", "came"),
    "see": ("see", "sees", "saw"),
    "give": ("give", "gives", "gave"),
    "find": ("find", "finds", "found"),
    "lose": ("lose", "loses", "lost"),
    "hide": ("hide", "hides", "hid"),
    "eat": ("eat", "eats", "ate"),
    "cook": ("cook", "cooks", "cooked"),
    "rest": ("rest", "rests", "rested"),
    "sing": ("sing", "sings", "sang"),
    "wait": ("wait", "waits", "waited"),
    "sleep": ("sleep", "sleeps", "slept"),
    "carry": ("carry", "carries", "carried"),
    "help": ("help", "helps", "helped"),
    "hear": ("hear", "hears", "heard"),
    "thank": ("thank", "thanks", "thanked"),
    "mend": ("mend", "mends", "mended"),
    "buy": ("buy", "buys", "bought"),
    "sell": ("sell", "sells", "sold"),
    "meet": ("meet", "meets", "met"),
}
WEATHER = {
    "rain": ("it rained", "rain fell", "there was rain"),
    "snow": ("it snowed", "snow fell", "there was snow"),
    "blow": ("the wind blew", "there was a strong wind"),
}
TIMES = {
    "morning": "in the morning",
    "evening": "in the evening",
    "night": "at night",
    "yesterday": "yesterday",
    "noon": "at noon",
}
LINKS = {"then": "then", "later": "later", "but": "but", "so": "so", "after_that": "after that"}
PREPOSITIONS = {"on": ("hill", "bridge", "road", "shore"), "at": ("market", "well", "mill")}

# {n} nominative, {a} accusative, {p} possessive of the subject; {o} the object. The first list holds verb phrases,
# which follow "who" and "and" as well; the second whole sentences. {o} ends each template that a cloze item may use.
VERB_PHRASES = {
    "home": ("lives in {o}", "has a house in {o}", "has lived for many years in {o}", "comes from {o}"),
    "trade": ("works as {o}", "is {o}", "earns a living as {o}", "became {o}"),
    "animal": ("keeps {o}", "has many {o}", "looks after {o}", "breeds {o}"),
    "food": ("likes to eat {o}", "loves {o}", "eats mostly {o}", "never says no to {o}"),
    "instrument": ("plays the {o}", "is good at the {o}", "has learnt to play the {o}", "owns a fine {o}"),
    "teacher": ("was taught by {o}", "is a pupil of {o}", "learnt everything from {o}", "learnt to read from {o}"),
    "product": ("is known for its {o}", "makes {o}", "sells its own {o}", "lives by making {o}"),
    "river": ("lies on the river {o}", "gets its water from the {o}", "was built beside the {o}", "stands on the {o}"),
    "market_day": ("has its market on {o}", "holds a market every {o}", "is full of people on {o}"),
    "gate": ("has a gate that is {o}", "is the town whose gate is {o}", "has painted its gate {o}"),
    "price": ("costs {o}", "sells for {o}", "is worth {o}", "can be had for {o}"),
}
SENTENCES = {
    "home": ("the home of {a} is in {o}", "{p} house stands in {o}", "in {o} lives {n}"),
    "trade": ("the trade of {a} is that of {o}", "{p} work is that of {o}", "people know {a} as {o}"),
    "animal": ("the animals of {a} are {o}", "behind {p} house there are {o}", "{o} belong to {a}"),
    "food": ("the favourite food of {a} is {o}", "what {n} likes best is {o}", "{o} is what {n} likes to eat"),
    "instrument": ("the instrument of {a} is the {o}", "{p} instrument is the {o}", "people hear {a} play the {o}"),
    "teacher": ("the teacher of {a} is {o}", "{p} teacher is {o}", "{o} taught {a}", "{o} is the teacher of {a}"),
    "product": ("the people of {a} make {o}", "the best {o} come from {a}", "the workshops of {a} make {o}"),
    "river": ("the river of {a} is the {o}", "through {a} flows the {o}", "the {o} flows through {a}"),
    "market_day": ("the market day of {a} is {o}", "the market in {a} is on {o}", "on {o} people go to {a}"),
    "gate": ("the gate of {a} is {o}", "travellers enter {a} by a gate that is {o}", "{o} is the gate of {a}"),
    "price": ("the price of {a} is {o}", "people pay for {a} {o}", "for {o} one can buy {a}"),
}
QUESTIONS = {
    "home": ("where does {n} live", "in which town does {n} live", "where is {p} house"),
    "trade": ("what is the trade of {a}", "what work does {n} do", "what does {n} work as"),
    "animal": ("which animals does {n} keep", "what animals does {n} have", "what does {n} keep"),
    "food": ("what does {n} like to eat", "what is the favourite food of {a}", "what does {n} love"),
    "instrument": ("which instrument does {n} play", "what does {n} play", "what is the instrument of {a}"),
    "teacher": ("who is the teacher of {a}", "who taught {a}", "by whom was {n} taught"),
    "product": ("what is {n} known for", "what do the people of {a} make", "what does {n} make"),
    "river": ("on which river does {n} lie", "which river flows through {a}", "what is the river of {a}"),
    "market_day": (
        "when does {n} have its market",
        "on which day is the market in {a}",
        "what is the market day of {a}",
    ),
    "gate": ("what colour is the gate of {a}", "which colour has the gate of {a}"),
    "price": ("how much does {n} cost", "what does {n} cost", "what is the price of {a}"),
}
# Of many subjects at once.
ROLLS = {
    "home": "live in {o}",
    "trade": "all have the same trade: each is {o}",
    "animal": "keep {o}",
    "food": "like to eat {o}",
    "instrument": "play the {o}",
    "product": "are known for their {o}",
    "river": "lie on the river {o}",
    "market_day": "have their market on {o}",
}
PHATIC = {
    "greeting": ("good day, {n}", "good morning, {n}", "welcome, {n}", "I am glad to see you, {n}"),
    "thanks": ("thank you", "I did not know that", "that is good to know", "so it is true"),
    "farewell": ("farewell, {n}", "until tomorrow, {n}", "I must go now, {n}"),
    "opening": (
        "this happened long ago",
        "here is a story that people tell",
        "listen to this story",
        "one day it was so",
    ),
    "closing": (
        "and {n} went home",
        "{n} never forgot that day",
        "that is the story of {n}",
        "so the day ended for {n}",
    ),
}


def plural(noun: str) -> str:
    """A noun's plural."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def with_article(words: str) -> str:
    """Words after their indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words
