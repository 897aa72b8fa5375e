"""Add a chat vector, the change of chat training, to a model adapted from the same base (arXiv 2310.04799)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elo.checkpoint.folder import TEMPLATE_PATTERNS, TOKENIZER_PATTERNS, copy_side_files
from elo.checkpoint.tensor_files import MAX_SHARD_BYTES, StoredTensor
from elo.errors import EloError
from elo.merge.weights import Place, merge_weights
from elo.surgery.in_memory import INCLUDABLE


def add_chat_vector(
    adapted: Path,
    base: Path,
    chat: Path,
    output: Path,
    *,
    save_tokenizer: Callable[[Path], None],
    check: Callable[[Path], None] = lambda folder: None,
    num_chat_tokens: Callable[[], int] | None = None,
    scale: float = 1.0,
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str | None = None,
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
        adapted: folder of a checkpoint trained from `base`.
        base: folder of the base of both models.
        chat: folder of the chat model made from `base`.
        output: folder to write. It appears only when complete.
        save_tokenizer: writes the tokenizer's files and chat template into a folder.
        check: called with the complete folder before it is renamed to `output`; raises EloError to reject it.
        num_chat_tokens: returns the highest id of the chat model's tokenizer plus one. The adapted model's tokenizer
            needs the same tokens at these ids. None copies no row of the chat model before rows of the adapted model.
        scale: factor for the vector.
        leave_out: parts to which nothing is added, among "embedding", "norm" and "head". If embedding and head are
            tied, either name covers both.
        overwrite: replace an existing output.
        trust_remote_code: allow the checkpoints' own Python code to define the model.
        max_shard_bytes: maximum size of a weight file, in bytes.
        label: label of the progress bar; None shows no progress.

    Returns:
        {"adapted", "base", "chat", "scale", "leave_out", "tensors" (number of tensors the vector was added to),
        "rows_kept" (unchanged rows of embedding and head), "rows_added" (rows that only the chat model has), "differs"
        (keys of config.json in which the models differ; the adapted model's values are kept)}

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
        max_shard_bytes=max_shard_bytes,
        label=label,
    )
    given = {"adapted": str(adapted), "base": str(base), "chat": str(chat)}
    return {**given, "scale": scale, "leave_out": list(leave_out), **record}
