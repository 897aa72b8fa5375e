"""The choices of KoBEST COPA, whose fields are called 1 and 2, which no template can name."""

from typing import Any


def choices(item: dict[str, Any]) -> list[str]:
    """Both sentences of an item."""
    return [item["1"], item["2"]]
