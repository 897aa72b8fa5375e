"""`elo chat-vector`: add the chat abilities of a base's chat model to an adapted model, without training."""

import tempfile
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from elo.check_output import check_output
from elo.checkpoint.counting import read_config
from elo.checkpoint.folder import TEMPLATE_PATTERNS, TOKENIZER_PATTERNS, copy_side_files, copy_tokenizer, put_first
from elo.checkpoint.new_rows import read_new_rows
from elo.checkpoint.tensor_files import StoredTensor
from elo.data.tokenizer import load_tokenizer, save_with_backend
from elo.detach_attach import check_replaceable, resolve_checkpoint
from elo.errors import EloError
from elo.merge.weights import Place, check_models, merge_weights
from elo.report.card import chat_vector_card
from elo.store.files import readable_disk_errors
from elo.surgery.in_memory import INCLUDABLE


def chat_vector(
    adapted: str | Path,
    base: str | Path,
    chat: str | Path,
    *,
    output: str | Path,
    scale: float = 1.0,
    leave_out: Sequence[str] = (),
    with_card: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write adapted + scale * (chat - base) (arXiv 2310.04799), with the chat model's template.

    The tokenizer is the chat model's. If the adapted model's tokenizer has more tokens, it is that one with the chat
    model's settings and template.

    Args:
        adapted: checkpoint folder or hub id of a model trained from `base`.
        base: checkpoint folder or hub id of the base of both models.
        chat: checkpoint folder or hub id of the chat (instruct) model made from `base`.
        output: folder to write. It appears only when complete.
        scale: factor for the change of chat training; 1 adds all of it.
        leave_out: parts to which nothing is added, among "embedding", "norm" and "head".
        with_card: write a model card as README.md, and keep that of the chat model, or else of the adapted model, as
            README_base.md.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoints' own Python code to define the model.

    Returns:
        {"adapted", "base", "chat", "scale", "leave_out", "tensors" (number of tensors the vector was added to),
        "rows_kept" (unchanged rows of embedding and head), "rows_added" (rows that only the chat model has), "differs"
        (keys of config.json in which the models differ; the adapted model's values are kept)}

    Raises:
        EloError: an argument is invalid, the models do not match, or the output exists or cannot be written.
    """
    if not (isfinite(scale) and abs(scale) <= 100):
        raise EloError(f"scale: must be a number from -100 to 100, got {scale}; 1 adds all that chat training changed")
    check_replaceable(Path(output), overwrite)
    ours, theirs, chats = (
        resolve_checkpoint(each, trust_remote_code=trust_remote_code) for each in (adapted, base, chat)
    )
    card = None
    if with_card:
        card = chat_vector_card(str(adapted), str(base), str(chat), ours, chats, scale, leave_out)
    with readable_disk_errors(Path(output)):
        return add_chat_vector(
            ours,
            theirs,
            chats,
            Path(output),
            save_tokenizer=lambda folder: _save_tokenizer(ours, theirs, chats, folder, trust_remote_code),
            check=lambda folder: check_output(
                folder,
                remedy="give a chat model and an adapted model with a row for every token; nothing was written",
                trust_remote_code=trust_remote_code,
            ),
            num_chat_tokens=lambda: load_tokenizer(chats, trust_remote_code).vocab_size,
            card=card,
            scale=scale,
            leave_out=leave_out,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )


def check_chat_vector(adapted: Path, base: Path, chat: Path, *, trust_remote_code: bool = False) -> None:
    """Raise EloError if `chat_vector` would refuse these checkpoints, without reading weights."""
    check_models((adapted, base, chat), trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        _save_tokenizer(adapted, base, chat, Path(scratch), trust_remote_code)


def _save_tokenizer(adapted: Path, base: Path, chat: Path, folder: Path, trust_remote_code: bool) -> None:
    """Write the output's tokenizer: chat settings and, if it was extended, the adapted model's vocabulary.

    Raises:
        EloError: the adapted model has another token, or none, at the id of a token of the chat model.
    """
    ours, theirs = (load_tokenizer(each, trust_remote_code).backend for each in (adapted, chat))
    ids, chat_ids = (each.get_vocab(with_added_tokens=True) for each in (ours, theirs))
    recorded = read_new_rows(read_config(str(adapted), trust_remote_code=trust_remote_code))
    if recorded is None and set(ids.values()) <= set(chat_ids.values()):  # other tools write no record
        renamed = {number for token, number in ids.items() if chat_ids.get(token) != number}
        if not renamed or renamed <= set(
            load_tokenizer(base, trust_remote_code).backend.get_vocab(with_added_tokens=True).values()
        ):
            copy_tokenizer(chat, folder)
            return
    for token, number in sorted(chat_ids.items(), key=lambda pair: pair[1]):
        if ids.get(token) != number:
            found = ours.id_to_token(number)
            raise EloError(
                f"{adapted}: its tokenizer has {'no token' if found is None else repr(found)} at id {number}, where "
                f"{chat} has {token!r}; give a chat model that has only the base's tokens, or extend the chat model "
                "first (elo vocab extend CHAT --target FILE --source FILE -o BOTH), then the base with that tokenizer "
                "(elo vocab extend BASE --tokenizer BOTH), and adapt again"
            )
    save_with_backend(chat, ours, folder, trust_remote_code)


def add_chat_vector(
    adapted: Path,
    base: Path,
    chat: Path,
    output: Path,
    *,
    save_tokenizer: Callable[[Path], None],
    check: Callable[[Path], None] = lambda folder: None,
    num_chat_tokens: Callable[[], int] | None = None,
    card: str | None = None,
    scale: float = 1.0,
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write adapted + scale * (chat - base), tensor by tensor, without holding a model in memory.

    Sums are computed in float64 and rounded once, to the adapted model's dtype. Tensors in which the adapted model
    equals the base become those of the chat model, bit for bit.

    Embedding and head rows that base and chat do not have, such as those of `elo vocab`, are kept. Rows that only the
    chat model has, such as those of ChatML's tokens, are copied from it, even in parts that are left out. If the
    adapted model's vocabulary was extended, these are the rows of the chat model's tokens that the base does not have.

    The bos, eos and pad token ids and generation_config.json come from the chat model, the rest of config.json from the
    adapted model.

    Args:
        adapted, base, chat: checkpoint folders.
        output: folder to write. It appears only when complete.
        save_tokenizer: writes the tokenizer's files and chat template into a folder.
        check: called with the complete folder before it is renamed to `output`; raises EloError to reject it.
        num_chat_tokens: returns the highest id of the chat model's tokenizer plus one. The adapted model's tokenizer
            needs the same tokens at these ids. None copies no row of the chat model before rows of the adapted model.
        card: content of README.md; None keeps that of the chat model, or else of the adapted model.
        leave_out: parts to which nothing is added, among "embedding", "norm" and "head". If embedding and head are
            tied, either name covers both.

    Returns:
        The arguments, and what elo.merge.weights.merge_weights returns.

    Raises:
        EloError: a folder cannot be used, or the three models do not match. The message names the first tensor.
    """
    for name in leave_out:
        if name not in INCLUDABLE:
            raise EloError(f"leave_out: there is no {name!r}; choose among {', '.join(INCLUDABLE)}")
    tied = {"embedding", "head"}

    def factors(place: Place, tensors: Sequence[StoredTensor], elements: int) -> tuple[float, float, float]:
        groups = tied if place.tied and place.group in tied else {place.group}
        return (1.0, 0.0, 0.0) if groups & {*leave_out} else (1.0, -scale, scale)

    def copy_files(folder: Path) -> None:
        save_tokenizer(folder)
        copy_side_files(chat, folder, python=trust_remote_code, leave_out=TOKENIZER_PATTERNS)
        without = (*TOKENIZER_PATTERNS, *TEMPLATE_PATTERNS, "generation_config.json")
        copy_side_files(adapted, folder, python=trust_remote_code, leave_out=without)
        if card is not None:
            put_first(folder, card)

    record = merge_weights(
        (adapted, base, chat),
        output,
        factors,
        copy_files=copy_files,
        check=check,
        token_ids_of=2,
        inner_rows=None if num_chat_tokens is None else (2, num_chat_tokens),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        label="chat vector",
    )
    given = {"adapted": str(adapted), "base": str(base), "chat": str(chat)}
    return {**given, "scale": scale, "leave_out": list(leave_out), **record}
