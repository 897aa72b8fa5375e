"""What options of the command line hold: names, numbers, a text or a file for each language."""

from elo.errors import EloError


def names(joined: str) -> list[str]:
    """What is joined by commas."""
    return [name.strip() for name in joined.split(",") if name.strip()]


def numbers(option: str, joined: str) -> list[int]:
    """Whole numbers joined by commas."""
    try:
        return [int(number) for number in names(joined)]
    except ValueError:
        raise EloError(f"{option} {joined!r}: write whole numbers joined by commas, such as 4000,8000") from None


def texts_by_language(pairs: list[str] | None) -> dict[str, list[str]]:
    """Texts by language, of any number of LANGUAGE=TEXT."""
    found: dict[str, list[str]] = {}
    for pair in pairs or []:
        language, equals, text = pair.partition("=")
        if not equals or not language or not text:
            raise EloError(f"--prompt {pair!r}: write LANGUAGE=TEXT, for example --prompt 'ko=강 건너 마을에는'")
        found.setdefault(language, []).append(text)
    return found


def files_by_language(option: str, pairs: list[str] | None) -> dict[str, str]:
    """A file for each language, of LANGUAGE=FILE."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        language, equals, path = pair.partition("=")
        if not equals or not language or not path:
            raise EloError(f"{option} {pair!r}: write LANGUAGE=FILE, for example {option} ko=heldout.jsonl")
        if language in found:
            raise EloError(f"{option}: {language!r} is given twice")
        found[language] = path
    return found
