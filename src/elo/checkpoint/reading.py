"""Choose the transformers class that loads a checkpoint, and check its padding id.

`elo.checkpoint.tensor_files` chooses the weight files and `elo.data.tokenizer` the tokenizer. All three modules read
what transformers reads. If that is ambiguous, they raise an error that names both interpretations.
"""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from elo.checkpoint.model_config import text_config_of
from elo.errors import EloError


def auto_class(config: PretrainedConfig) -> Any:
    """Return the auto class whose `from_config` and `from_pretrained` build the model of `config`.

    A multimodal wrapper (Gemma 3, Llama 4, Mistral 3) is read as a whole. AutoModelForCausalLM would read only the text
    part of some wrappers, as another model type, and does not know others.
    """
    text = text_config_of(config)
    is_wrapper = text is not config and not getattr(config, "is_encoder_decoder", False)
    if (
        is_wrapper
        and not getattr(text, "is_encoder_decoder", False)
        and type(config) in AutoModelForImageTextToText._model_mapping
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def require_pad_row(config: PretrainedConfig, where: str) -> None:
    """Raise EloError if the padding id has no embedding row, since PyTorch cannot build such an embedding."""
    for part in (config, text_config_of(config)):
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and rows > 0 and not -rows <= pad < rows:
            raise EloError(
                f"pad_token_id: {where}: is {pad}, but the model has {rows} embedding rows (vocab_size); set it to a "
                f"token id below {rows}, or to null"
            )
