"""Text that a tokenizer does not carry: how much of it is too much; and special tokens that a document spells."""

import json
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer

from elo.errors import EloError

WARN_ABOVE = 0.001
"""Share of a text's bytes, lost in the tokenizer, above which a warning is given."""
REFUSE_ABOVE = 0.05
"""Share above which the text is refused."""


def judge_loss(
    where: str, tokenizer: str, lost_bytes: int, checked_bytes: int, *, allowed: bool, key: str
) -> str | None:
    """A warning where much of a text is lost in the tokenizer, else None.

    Args:
        where: the text: file or language.
        allowed: whether any loss is accepted.
        key: how the user accepts it.

    Raises:
        EloError: more than `REFUSE_ABOVE` is lost, and that is not accepted.
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
            f"{found}; bits per byte and training mean little on such text: use a tokenizer that covers the language, "
            f"or accept the loss with {key}"
        )
    return f"warning: {found}"


def special_spellings(backend: Tokenizer, frame: Collection[int]) -> list[str]:
    """Spellings of the special tokens: those marked as special in the tokenizer, and those with the ids in `frame`."""
    added = backend.get_added_tokens_decoder()
    found = {token.content for token in added.values() if token.special}
    found |= {token for index in frame if (token := backend.id_to_token(index)) is not None}
    # A single character, such as a newline that ends documents, is text above all.
    return sorted(token for token in found if len(token) > 1)


def text_encoder(backend: Tokenizer, special_tokens: Collection[str]) -> Tokenizer:
    """A copy of `backend`, with the same ids, to which `special_tokens` in a text are text.

    `Tokenizer.encode_special_tokens` would not do: it is not stored with the tokenizer, and Unigram models, word-level
    ones and byte-pair merges can still make a special token out of its spelling. So the tokens get spellings that no
    text has.
    """
    state: dict[str, Any] = json.loads(backend.to_str())
    # U+FDD0 is a noncharacter: Unicode keeps it out of the interchange of text.
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
    state["post_processor"] = None  # it adds special tokens by name, and text is encoded without
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
