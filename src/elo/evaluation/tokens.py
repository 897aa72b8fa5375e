"""Text as a model saw it in training: a prefix token, then the text's tokens."""

from transformers import PreTrainedTokenizerBase

from elo.errors import EloError


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that leads a document: begin-of-text where the tokenizer has one, else end-of-text.

    Raises:
        EloError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise EloError("tokenizer: it has neither a bos_token nor an eos_token; set one in its tokenizer_config.json")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the text alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
