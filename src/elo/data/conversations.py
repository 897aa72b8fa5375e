"""Conversations for supervised fine-tuning (SFT) and for measuring chat ability, from JSON lines.

A line is in one of three forms; other keys are ignored:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}     the input may be missing or empty
    {"prompt": "...", "completion": "..."}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo.data.json_lines import read_json_lines
from elo.errors import EloError

Message = dict[str, str]
"""One turn: its `role` (system, user or assistant) and its `content`."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a user and an assistant, ending with the assistant's, and their place in the input as `file:line`."""

    messages: tuple[Message, ...]
    where: str


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read all conversations of a file (.jsonl, also .gz or .zst).

    Raises:
        EloError: the file cannot be read or is empty, or a line is not a conversation. The message names `file:line`.
    """
    return [_conversation(value, where) for where, value in read_json_lines(path, "conversations")]


def write_conversations(path: Path, conversations: list[Conversation]) -> None:
    """Write conversations as JSON lines in the messages form."""
    lines = [json.dumps({"messages": each.messages}, ensure_ascii=False) + "\n" for each in conversations]
    path.write_text("".join(lines), encoding="utf-8")


def _conversation(value: Any, where: str) -> Conversation:
    if not isinstance(value, dict):
        raise EloError(f"{where}: is {_kind(value)}; write an object, such as {{'prompt': ..., 'completion': ...}}")
    if "messages" in value:
        return Conversation(_checked_messages(value["messages"], where), where)
    if "instruction" in value or "output" in value:
        question, answer = _text(value, "instruction", where), _text(value, "output", where)
        if str(value.get("input") or "").strip():
            question = f"{question}\n\n{_text(value, 'input', where)}"
    elif "prompt" in value or "completion" in value:
        question, answer = _text(value, "prompt", where), _text(value, "completion", where)
    else:
        raise EloError(
            f"{where}: has the fields {', '.join(map(repr, value)) or 'none'}; write 'messages', 'instruction' and "
            "'output', or 'prompt' and 'completion'"
        )
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), where)


def _text(value: dict[str, Any], name: str, where: str) -> str:
    if name not in value:
        raise EloError(f"{where}: field {name!r} is missing; add it")
    text = value[name]
    if not isinstance(text, str):
        raise EloError(f"{where}: {name!r} is {_kind(text)}; write text")
    if not text.strip():
        raise EloError(f"{where}: {name!r} is empty; write its text, or remove the line")
    return text


def _checked_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise EloError(f"{where}: 'messages' is {_kind(messages)}; write a list of at least two messages")
    found: list[Message] = []
    for number, message in enumerate(messages, 1):
        at = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise EloError(f"{at}: is {_kind(message)}; write an object with 'role' and 'content'")
        role, content = _text(message, "role", at), _text(message, "content", at)
        turns = [each["role"] for each in found if each["role"] != "system"]
        expected = "assistant" if turns and turns[-1] == "user" else "user"
        if role != expected and not (role == "system" and number == 1):
            raise EloError(
                f"{at}: has role {role!r}, where {expected!r} must follow; order the messages as system (optional, "
                "first), user, assistant, user, assistant, ..."
            )
        found.append({"role": role, "content": content})
    if found[-1]["role"] != "assistant":
        raise EloError(f"{where}: ends with the role {found[-1]['role']!r}; end it with the assistant's answer")
    return tuple(found)


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
