"""Draw what depth does: bits per byte and peak memory of each contestant over the number of decoder layers.

    python benchmarks/plot_depth.py 16=RUN 32=RUN 64=RUN --output dev/depth.png

Each RUN is a folder of `elo compare benchmarks/compare_depth.yaml`. Points are seeds, lines go through their means.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from elo.report.drawing import COLOURS, MARKERS, STYLE

LABELS = {
    "bridge": "ELO detached, with bridge, no alignment",
    "full": "full CPT",
    "elo": "ELO, forward-only middle (default)",
}
PALETTE = {"bridge": COLOURS["lora"], "full": COLOURS["full"], "elo": COLOURS["elo"]}


def _is_shown(trial: dict[str, Any], contestant: str) -> bool:
    return trial["contestant"] == contestant and not trial["tuning"] and not trial["failed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LAYERS=RUN")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[int, Any] = {}
    for given in args.runs:
        layers, _, folder = given.partition("=")
        runs[int(layers)] = json.loads((Path(folder) / "results.json").read_text())
    target, source = (next(iter(runs.values()))["languages"][role][0] for role in ("targets", "sources"))
    panels = {
        f"{target}, bits per byte": lambda trial: trial["measured"]["bpb"][target],
        f"{source}, bits per byte": lambda trial: trial["measured"]["bpb"][source],
        "peak memory, MiB": lambda trial: max(stage["peak_memory_bytes"] for stage in trial["stages"]) / 2**20,
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for marker, (name, shown) in zip(MARKERS, LABELS.items(), strict=False):
                points = [
                    (layers, [value(trial) for trial in comparison["trials"] if _is_shown(trial, name)])
                    for layers, comparison in sorted(runs.items())
                ]
                points = [(layers, values) for layers, values in points if values]
                xs, means = [layers for layers, _ in points], [statistics.mean(values) for _, values in points]
                axes.plot(xs, means, color=PALETTE[name], marker=marker, label=shown)
                for layers, values in points:
                    axes.plot([layers] * len(values), values, ".", color=PALETTE[name], alpha=0.5)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(runs), labels=[str(layers) for layers in runs])
            axes.set_xlabel("decoder layers")
            axes.set_title(label, fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(LABELS))
        figure.savefig(args.output, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
