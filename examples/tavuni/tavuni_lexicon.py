"""Sounds, letters and roots of Tavuni, the invented target language.

Inside the code Tavuni is written with one Latin letter a sound; `to_script` turns that into the script it is read in.
No root is taken from a real language: each is drawn from the language's own phonology by its meaning's key.
"""

import random

from world import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    INSTRUMENTS,
    PLACES,
    QUALITIES,
    SEASONS,
    THINGS,
    TRADES,
    words,
)

BACK, FRONT = "aou", "ei"
VOWELS = BACK + FRONT
CONSONANTS = "pbtdkgmnlrszxcvhj"  # x = sh, c = ch, j = zh
CODAS = "nlrsm"
# One letter a sound: 22 letters of the Georgian block, three bytes each in UTF-8.
LETTERS = dict(zip("aeioupbtdkgmnlrszxcvhj", "აეიოუპბთდკგმნლრსზშჩვჰჟ", strict=True))
TO_SCRIPT = str.maketrans(LETTERS)
# How the names' spelling maps to sounds.
RESPELL = (("sh", "x"), ("ch", "c"), ("y", "i"), ("w", "v"), ("f", "p"))

VERB_KEYS = words(
    "go come see give find lose hide eat cook rest sing wait sleep carry help hear thank mend buy sell "
    "meet live keep love play learn make flow be_held stand fall blow happen "
    "tell"
)
NOUN_KEYS = words(
    "home trade animal food instrument teacher product river market_day gate price coin market "
    "day rain snow wind morning evening night yesterday noon story time truth path peace "
)
OTHER_KEYS = words("that_one who what where when how_many which then later but so after_that all")


def root(key: str, kind: str, taken: set[str]) -> str:
    """Draw the root of a meaning: nouns CVCV(C) or CV(C)CVC, verbs (C)VC or CVCVC (a root ends in a consonant)."""
    rng = random.Random(f"tavuni/{kind}/{key}")
    while True:
        # Vowels of a root agree: all front or all back.
        vowels = rng.choice((BACK, FRONT))
        length = rng.choice((2, 2, 2, 3)) if kind == "noun" else rng.choice((1, 2, 2))
        word = "".join(rng.choice(CONSONANTS) + rng.choice(vowels) for _ in range(length))
        if kind == "verb" or (kind != "particle" and rng.random() < 0.5):
            word += rng.choice(CODAS)
        if word not in taken and len(word) > 2:
            taken.add(word)
            return word


def build_roots() -> dict[str, str]:
    """Roots of all meanings by key; verbs under "verb:key". No two are alike."""
    taken: set[str] = set()
    nouns = [*NOUN_KEYS, *TRADES, *ANIMALS, *FOODS, *INSTRUMENTS, *THINGS, *PLACES, *SEASONS, *DAYS]
    roots = {key: root(key, "noun", taken) for key in dict.fromkeys([*nouns, *COLOURS, *QUALITIES])}
    roots |= {f"verb:{key}": root(key, "verb", taken) for key in VERB_KEYS}
    roots |= {key: root(key, "particle", taken) for key in OTHER_KEYS}
    roots |= {str(number): root(str(number), "particle", taken) for number in range(1, 11)}
    return roots


ROOTS = build_roots()


def respell(name: str) -> str:
    """A name in Tavuni's sounds."""
    name = name.lower()
    for spelling, sound in RESPELL:
        name = name.replace(spelling, sound)
    return name


def to_script(text: str) -> str:
    """From one Latin letter a sound to the script; punctuation, digits and spaces stay."""
    return text.translate(TO_SCRIPT)
