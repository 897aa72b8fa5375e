"""How a checkpoint is read, decided once: which class of transformers loads it, and what its special ids must fit.

Which files hold the weights is decided in `elo.checkpoint.tensor_files`, which tokenizer in `elo.data.tokenizer`. All
three read what transformers reads, or refuse and name both readings.
"""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from elo.checkpoint.model_config import text_config_of
from elo.errors import EloError


def auto_class(config: PretrainedConfig) -> Any:
    """The class whose `from_config` and `from_pretrained` make the model of `config`.

    A multimodal wrapper (Gemma 3, Llama 4, Mistral 3) is read whole. AutoModelForCausalLM takes only the text part of
    some wrappers, under another model type, and does not know others.
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
    """Raise EloError if the padding id has no embedding row: PyTorch refuses to build such an embedding."""
    for part in (config, text_config_of(config)):
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and rows > 0 and not -rows <= pad < rows:
            raise EloError(
                f"pad_token_id: {where}: is {pad}, but the model has {rows} embedding rows (vocab_size); set it to a "
                "token id below that, or to null"
            )
