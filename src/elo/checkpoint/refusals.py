"""Refuse models whose configuration shows that their layers cannot be detached, with the reason and an alternative."""

from transformers import PretrainedConfig

from elo.checkpoint import quirks
from elo.checkpoint.model_config import text_config_of
from elo.errors import UnsupportedArchitectureError


def refuse_quantised(config: PretrainedConfig) -> None:
    """Raise UnsupportedArchitectureError if the weights are quantised, which can be neither trained nor merged."""
    for part in (config, text_config_of(config)):
        if getattr(part, "quantization_config", None):
            raise UnsupportedArchitectureError(
                f"model type {config.model_type!r}: this checkpoint is quantised (quantization_config); give the "
                "bfloat16 or float32 original, or dequantise it once: from_pretrained(..., "
                "quantization_config=CLASS(dequantize=True)), then save_pretrained"
            )


def require_detachable(config: PretrainedConfig) -> None:
    """Raise UnsupportedArchitectureError if layers cannot be detached from a model with this configuration."""
    model_type, text_config = config.model_type, text_config_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: is an encoder-decoder; choose a decoder-only causal language model"
        )
    if model_type in quirks.CAUSAL_ONLY_AS_DECODER and not getattr(config, "is_decoder", False):
        raise UnsupportedArchitectureError(
            f"model type {model_type!r}: attends in both directions (is_decoder is false); "
            "choose a causal language model"
        )
    refuse_quantised(config)
    for part in (text_config, config):
        for key, reason in quirks.REFUSED_IF_SET.items():
            if getattr(part, key, None):
                raise UnsupportedArchitectureError(
                    f"model type {model_type!r}: {key} is {getattr(part, key)}: {reason}"
                )
    refusal = quirks.REFUSED.get(text_config.model_type) or quirks.REFUSED.get(model_type)
    if refusal:
        raise UnsupportedArchitectureError(f"model type {model_type!r}: {refusal}")
