"""What a plan has to know of a model: counted and traced without weights, and kept for the next plan of the model.

Importing PyTorch and transformers' models takes most of a plan's time. Plans of one model come in numbers, with other
batches, lengths and devices, and what is counted depends on none of these.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.checkpoint.footprint import Footprint, LayerFootprint
from elo.plan.memory import SavedActivations
from elo.store.files import write_json

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
        layers: as `elo.checkpoint.layers.parse_layers` takes them.
        also_train: parts that train with them.
        trace: `precision` and `kind`, as `elo.plan.activations.saved_activations` takes them.

    Raises:
        EloError: the config makes no causal language model, or layers or parts are not there.
        UnsupportedArchitectureError: layers of this model cannot be detached.
    """
    from elo.checkpoint.counting import footprint, text_config
    from elo.checkpoint.layers import parse_layers
    from elo.checkpoint.refusals import require_detachable
    from elo.plan.activations import saved_activations
    from elo.train.settings import check_also_train

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


def outline_place(model: str | Path, **asked: Any) -> Path | None:
    """The file to keep a model's outline in, named by all that decides it.

    Args:
        model: checkpoint folder or config.json; None is returned for what is not on this disk.
        asked: what else the outline depends on.
    """
    try:
        config = Path(model).expanduser()
        config = config / "config.json" if config.is_dir() else config
        content = config.read_bytes()
        if b'"configuration_files"' in content:  # by which transformers is sent on to other files
            return None
        package = Path(__file__).parents[1]
        code = [*sorted((package / "model").glob("*.py")), package / "layers.py", Path(__file__)]
        decides = {
            **asked,
            "versions": [version(name) for name in ("torch", "transformers")],
            "code": [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in code],
        }
        key = hashlib.sha256(content + json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
        folder = Path(os.environ.get("ELO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "elo")
        return folder.expanduser() / "plans" / f"{key[:32]}.json"
    except (OSError, ValueError, RuntimeError, PackageNotFoundError):  # no such file, no home, no name of one
        return None


def kept_outline(place: Path) -> Outline | None:
    """The outline that an earlier plan has kept there, or None."""
    # Whatever is wrong with it: it is made again.
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        value = json.loads(place.read_text())
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


def keep_outline(outline: Outline, place: Path) -> None:
    """Keep an outline for `kept_outline`, where a file can be written; it is never needed."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, asdict(outline))
