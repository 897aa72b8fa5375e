"""Write a few dozen English and Korean conversations about generated facts, to try `elo chat` without a download.

    python examples/conversations.py FOLDER     # writes FOLDER/chat_en.jsonl and FOLDER/chat_ko.jsonl

They show the form of the data and teach the chat format. They are far too few and too simple for a useful model.
"""

import json
import random
import sys
from pathlib import Path

_DAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "ko": ["월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일"],
}
_THINGS = {
    "en": ["apple", "book", "chair", "river", "house", "bread"],
    "ko": ["사과", "책", "의자", "강", "집", "빵"],
}
_COLOURS = {
    "en": ["red", "blue", "green", "white", "black", "yellow"],
    "ko": ["빨간", "파란", "푸른", "하얀", "까만", "노란"],
}


def conversations(language: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return different questions with their answers, in the prompt and completion form."""
    draw = random.Random(f"{language} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        prompt, completion = _fact(language, draw)
        found[prompt] = completion
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def _fact(language: str, draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(["sum", "larger", "day", "colour"])
    if kind == "sum":
        a, b = draw.randint(1, 20), draw.randint(1, 20)
        if language == "en":
            return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        return f"{a} 더하기 {b}는 얼마입니까?", f"{a} 더하기 {b}의 답은 {a + b}입니다."
    if kind == "larger":
        a, b = draw.sample(range(1, 100), 2)
        if language == "en":
            return f"Which number is larger, {a} or {b}?", f"The larger number is {max(a, b)}."
        return f"{a}, {b} 가운데 더 큰 수는 무엇입니까?", f"더 큰 수는 {max(a, b)}입니다."
    if kind == "day":
        days = _DAYS[language]
        at, step = draw.randrange(7), draw.randint(1, 3)
        after = days[(at + step) % 7]
        if language == "en":
            return f"Which day is {step} after {days[at]}?", f"It is {after}."
        return f"{days[at]}에서 {step}일 뒤는 무슨 요일입니까?", f"그날은 {after}입니다."
    colour, thing = (draw.randrange(6) for _ in range(2))
    colours, things = _COLOURS[language], _THINGS[language]
    if language == "en":
        said = f"I have a {colours[colour]} {things[thing]}."
        return f"{said} What colour is it?", f"Your {things[thing]} is {colours[colour]}."
    said = f"저에게는 {colours[colour]} {things[thing]} 하나가 있습니다."
    return f"{said} 무슨 색입니까?", f"{colours[colour]} 색입니다."


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for language in ("en", "ko"):
        rows = conversations(language, 60, 0)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"chat_{language}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
