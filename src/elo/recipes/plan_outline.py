"""What a plan has to know of a model: counted and traced without weights, and kept for the next plan of the model.

Importing PyTorch and transformers' models takes most of a plan's time. Plans of one model come in numbers, with other
batches, lengths and devices, and what is counted depends on none of these.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.model.footprint import Footprint, LayerFootprint
from elo.model.memory import SavedActivations
from elo.records import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Outline:
    """A model as a plan sees it.

    Attributes:
        counted: its footprint.
        kept: what the chosen layers keep for the backward, and what trains with them.
        frozen: the same of all layers, with the others frozen but computed and differentiated.
        whole: the same of all layers, all of them trained.
        longest: positions it was made for, where its config tells.
        multimodal: whether its text decoder is but a part of it.
    """

    counted: Footprint
    kept: SavedActivations
    frozen: SavedActivations
    whole: SavedActivations
    longest: int | None
    multimodal: bool


def draw_outline(config: "PretrainedConfig", layers: Any, also_train: tuple[str, ...], **trace: Any) -> Outline:
    """Count and trace the model of `config`.

    Args:
        layers: as `elo.layers.parse_layers` takes them.
        also_train: parts that train with them.
        trace: `precision` and `kind`, as `elo.model.activations.saved_activations` takes them.

    Raises:
        EloError: the config makes no causal language model, or layers or parts are not there.
        UnsupportedArchitectureError: layers of this model cannot be detached.
    """
    from elo.layers import parse_layers
    from elo.model.activations import saved_activations
    from elo.model.counting import footprint, text_config
    from elo.model.refusals import require_detachable
    from elo.training.settings import check_also_train

    require_detachable(config)
    counted = footprint(config)
    check_also_train(also_train, tied=counted.tied)  # type: ignore[arg-type]
    chosen = parse_layers(layers, counted.num_layers)
    longest = getattr(text_config(config), "max_position_embeddings", None)
    return Outline(
        counted=counted,
        kept=saved_activations(config, counted, chosen, also_train=also_train, **trace),
        frozen=saved_activations(config, counted, chosen, also_train=also_train, in_place=True, **trace),
        whole=saved_activations(config, counted, **trace),
        longest=longest if isinstance(longest, int) else None,
        multimodal=text_config(config) is not config,
    )


def kept_outline(model: str | Path, **asked: Any) -> Outline | None:
    """The outline of a model on this disk that an earlier plan has kept, or None.

    Args:
        model: checkpoint folder or config.json.
        asked: all else that the outline depends on.
    """
    path = _place(model, asked)
    if path is None:
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):  # whatever is wrong with it: it is made again
        value = json.loads(path.read_text())
        counted = value["counted"]
        counted["layers"] = tuple(LayerFootprint(**layer) for layer in counted["layers"])
        saved = {name: value[name] for name in ("kept", "frozen", "whole")}
        for each in saved.values():
            each["per_layer"] = tuple(each["per_layer"])
        return Outline(
            counted=Footprint(**counted),
            **{name: SavedActivations(**each) for name, each in saved.items()},
            longest=value["longest"],
            multimodal=value["multimodal"],
        )
    return None


def keep_outline(outline: Outline, model: str | Path, **asked: Any) -> None:
    """Keep an outline for `kept_outline`, where there is a folder for it; it is never needed."""
    path = _place(model, asked)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(outline))


def _place(model: str | Path, asked: dict[str, Any]) -> Path | None:
    """The file of an outline, named by all that decides it; None for a model that is not on this disk."""
    config = Path(model).expanduser()
    config = config / "config.json" if config.is_dir() else config
    try:
        content = hashlib.sha256(config.read_bytes())
    except OSError:
        return None
    code = sorted((Path(__file__).parents[1] / "model").glob("*.py"))
    decides = {
        **asked,
        "versions": [version(name) for name in ("torch", "transformers")],
        "code": [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in code],
    }
    content.update(json.dumps(decides, sort_keys=True, default=str).encode())
    folder = Path(os.environ.get("ELO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "elo")
    return folder.expanduser() / "plans" / f"{content.hexdigest()[:32]}.json"
