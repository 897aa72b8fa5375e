"""Load models from disk or the hub for measurements."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from elo.checkpoint.counting import read_config
from elo.checkpoint.local_names import require_path_or_id
from elo.checkpoint.reading import auto_class
from elo.checkpoint.tensor_files import open_checkpoint
from elo.errors import EloError, error_line

log = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from safetensors, in evaluation mode, and check that no weight is missing.

    Args:
        name: checkpoint folder or hub id.
        device: device to load to; by default cuda if available, else cpu.
        dtype: dtype of the weights; by default the checkpoint's on a GPU, and float32 on a CPU, where half precision is
            slow.

    Raises:
        EloError: there is no such checkpoint, it is damaged or incomplete, or it does not fit on the device.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EloError(f"{folder}: has no config.json, so it is not a checkpoint; give the folder of a model")
        open_checkpoint(folder)
    elif folder.exists():
        raise EloError(f"{name}: is not a folder; give a checkpoint folder or a Hugging Face hub id")
    else:
        require_path_or_id(name, "give a checkpoint folder or a Hugging Face hub id")
    config = read_config(name, trust_remote_code=trust_remote_code)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if torch.device(place).type == "cpu" else "auto"
    try:
        with _warning_of_untied_head(name):
            loaded: Any = auto_class(config).from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and a family's own code raise many types
        raise EloError(f"{name}: the model cannot be loaded ({type(error).__name__}: {error_line(error)})") from None
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EloError(
            f"{name}: transformers adds an adapter (adapter_config.json) to its weights; merge it first (peft: "
            "model.merge_and_unload().save_pretrained(NEW_FOLDER)), or remove that file if it is already merged"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EloError(
            f"{name}: {len(missing)} tensors are missing (first {missing[0]}), so part of the model would be random; "
            "complete the checkpoint, or correct its config.json"
        )
    move(model, place)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


class _Collector(logging.Handler):
    """Collects messages instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _warning_of_untied_head(name: str) -> Iterator[None]:
    """Suppress progress bars and messages of transformers, and warn if it does not tie the head."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    library, collector = logging.getLogger("transformers"), _Collector()
    handlers, propagate = library.handlers[:], library.propagate
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_warning()
    library.handlers, library.propagate = [collector], False
    try:
        yield
    finally:
        library.handlers, library.propagate = handlers, propagate
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    if any("NOT tie" in message for message in collector.messages):
        log.warning(
            "warning: %s: config.json ties the head to the embedding (tie_word_embeddings), but both are stored and "
            "differ, so transformers does not tie them; set tie_word_embeddings to false if this is intended",
            name,
        )


def move(model: PreTrainedModel, device: str) -> None:
    """Move `model` to `device`.

    Raises:
        EloError: there is no such device, or not enough memory on it.
    """
    try:
        nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise EloError(
            f"device: the model cannot be moved to {device!r} ({' '.join(str(error).split())[:200]})"
        ) from None
