"""Judge how much text a tokenizer may lose, and encode special tokens that occur in documents as text."""

import json
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer

from elo.errors import EloError

WARN_ABOVE = 0.001
"""Share of a text's bytes lost in the tokenizer above which there is a warning."""
REFUSE_ABOVE = 0.05
"""Share of a text's bytes lost in the tokenizer above which the text is rejected."""


def judge_loss(
    where: str, tokenizer: str, lost_bytes: int, checked_bytes: int, *, allowed: bool, key: str
) -> str | None:
    """Return a warning if the tokenizer loses much of a text, else None.

    Args:
        where: name of the text for the message: file or language.
        tokenizer: name of the tokenizer, for the message.
        lost_bytes: UTF-8 bytes that the tokenizer loses of the `checked_bytes` that were decoded again.
        allowed: whether any loss is accepted.
        key: setting or option by which the user accepts the loss.

    Raises:
        EloError: more than `REFUSE_ABOVE` is lost and not `allowed`.
    """
    share = lost_bytes / max(checked_bytes, 1)
    if share <= WARN_ABOVE:
        return None
    found = (
        f"{where}: tokenizer {tokenizer} loses {share:.2%} of the text: unknown tokens, dropped "
        f"characters, or white space taken by special tokens "
        f"(measured on {checked_bytes:,} bytes)"
    )
    if share > REFUSE_ABOVE and not allowed:
        raise EloError(
            f"{found}; training and bits per byte would be unreliable: use a tokenizer that covers the language, "
            f"or accept the loss with {key}"
        )
    return f"warning: {found}"


def special_spellings(backend: Tokenizer, frame: Collection[int]) -> list[str]:
    """Return the text of the tokens that the tokenizer marks as special or whose ids are in `frame`.

    Tokens of one character are left out.
    """
    added = backend.get_added_tokens_decoder()
    found = {token.content for token in added.values() if token.special}
    found |= {token for index in frame if (token := backend.id_to_token(index)) is not None}
    # A single character, such as a newline used as eos, mostly occurs as text.
    return sorted(token for token in found if len(token) > 1)


def text_encoder(backend: Tokenizer, special_tokens: Collection[str]) -> Tokenizer:
    """Return a copy of `backend`, with the same ids, that encodes `special_tokens` in a document as text.

    `Tokenizer.encode_special_tokens` does not suffice: it is not stored with the tokenizer, and Unigram models,
    word-level models and byte-pair merges can still produce the special token. Instead, the special tokens are renamed
    to strings that occur in no text.
    """
    state: dict[str, Any] = json.loads(backend.to_str())
    # U+FDD0 is a noncharacter: Unicode excludes it from text interchange.
    renamed = {token: f"\ufdd0{number}\ufdd0" for number, token in enumerate(special_tokens)}
    for added in state["added_tokens"]:
        if added["content"] in renamed:
            added.update(
                content=renamed[added["content"]], lstrip=False, rstrip=False, single_word=False, normalized=False
            )
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if not renamed.keys() & {*pair, "".join(pair)}]
    state["post_processor"] = None  # it adds special tokens by name, which text encoding does not need
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
