"""What of a method's work needs the whole base in memory: fitting a bridge, and searching the scale of an attach."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elo.data.mixture import MixtureRows


def write_bridge(
    base: Path, layers: Sequence[int], rows: "MixtureRows", output: Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Fit a linear bridge over what `layers` leave out of the base and write it to the file `output`.

    Returns:
        {"tokens": used, "explained": [a gap each]}
    """
    from elo.evaluation.loading import load_model
    from elo.training.bridge import fit_bridge

    model = load_model(str(base), None, None, None, trust_remote_code)
    bridge = fit_bridge(model, layers, (rows[index] for index in range(len(rows))))
    output.parent.mkdir(parents=True, exist_ok=True)
    bridge.save(output)
    return {"bridge_tokens": len(rows) * rows.mixture.sequence_length, "explained": list(bridge.explained)}


def choose_scale(
    base: Path,
    detached: Path,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    include: Sequence[str],
    *,
    trust_remote_code: bool = False,
) -> tuple[float, dict[str, float]]:
    """The scale at which attaching `detached` to `base` predicts each language's `rows` best, and nats by scale."""
    import torch

    from elo.evaluation.attach_scale import search_scale
    from elo.evaluation.loading import load_model
    from elo.model.counting import read_config
    from elo.model.new_rows import share_record
    from elo.model.provenance import PROVENANCE_KEY
    from elo.records import read_json

    model = load_model(str(base), None, None, None, trust_remote_code)
    trained = load_model(str(detached), "cpu", torch.float32, None, trust_remote_code)
    # Where transformers loads the decoder of a wrapper alone, what the wrapper's configuration records is missing.
    share_record(read_config(base, trust_remote_code=trust_remote_code), model.config)
    setattr(trained.config, PROVENANCE_KEY, read_json(detached / "config.json").get(PROVENANCE_KEY))
    scale, tried = search_scale(model, trained, rows, include)
    return scale, {f"{each:g}": nats for each, nats in tried.items()}
