"""Models from disk or hub, ready to be measured."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from elo.errors import EloError


def load_model(
    name: str,
    device: str | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Load a causal LM to be measured: all its weights, from safetensors, each in its place.

    Args:
        name: checkpoint folder or hub id.
        device: by default cuda where there is one, else cpu.
        dtype: by default the checkpoint's on a GPU, fp32 on a CPU (where half precision is slow).
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that ships with the checkpoint.

    Raises:
        EloError: there is no such checkpoint, it is damaged or incomplete, or it does not fit on the device.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EloError(f"{folder}: holds no config.json, so it is not a checkpoint; give the folder of a model")
        if not any(folder.glob("*.safetensors")):
            raise EloError(
                f"{folder}: holds no .safetensors weights (pickled .bin files are never opened); "
                "save the model again with save_pretrained"
            )
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EloError(f"{name}: no such folder; give a checkpoint folder or a Hugging Face hub id")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if torch.device(place).type == "cpu" else "auto"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        TypeError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise EloError(f"{name}: the model cannot be loaded ({type(error).__name__}: {reason})") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EloError(
            f"{name}: {len(missing)} tensors are missing (first {missing[0]}), so part of the model would be random; "
            "the checkpoint is incomplete, or its config is not its own"
        )
    move(model, place)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def move(model: PreTrainedModel, device: str) -> None:
    """Put `model` on `device`.

    Raises:
        EloError: there is no such device, or not enough memory on it.
    """
    try:
        nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise EloError(
            f"device: the model cannot be put on {device!r} ({' '.join(str(error).split())[:200]})"
        ) from None
