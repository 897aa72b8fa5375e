"""Draw what several comparisons of one base model found over training time: one panel per language.

    cd benchmarks/results
    python ../over_time.py real_smollm2_seeds.json neighbours_smollm2.json:elo_lora smollm2_10min.json \
        smollm2_40min.json --contestants elo_lora,full,lora --output ../../docs/images/smollm2_over_time.png

Each contestant is a line through the means over seeds of each file; after a colon stand the contestants to take from a
file, all by default. The dashed line is the base model.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

from elo.report.drawing import COLOURS, FAINT, STYLE, finish
from elo.report.schema import Results

_NAMES = {"ko": "Korean", "en": "English", "ja": "Japanese", "eu": "Basque"}


def main() -> None:
    """Read the results and write the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="FILE or FILE:NAME,NAME, results of comparisons with one budget")
    parser.add_argument("--contestants", required=True, help="names of contestants, joined by commas")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    given = parser.parse_args()
    contestants = given.contestants.split(",")
    files = []
    for each in given.results:
        path, _, names = each.partition(":")
        results = Results.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        files.append((results, names.split(",") if names else contestants))
    with matplotlib.rc_context(STYLE):
        given.output.write_bytes(finish(draw(files, contestants), "over_time", "", "").png)


def draw(files: list[tuple[Results, list[str]]], contestants: list[str]) -> Figure:
    """Return a figure of bits per byte over training time, with a panel for each language of the base model.

    Args:
        files: results, and the contestants to take from them.
        contestants: contestants in the order of their colours.
    """
    base = files[0][0].base.bpb
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    for axes, (language, untrained) in zip(figure.subplots(1, len(base)), base.items(), strict=True):
        axes.axhline(untrained, color=FAINT, linestyle="--", linewidth=1.2, label="Base model")
        for name, (colour, marker) in zip(contestants, zip(COLOURS.values(), "osD^v", strict=True), strict=False):
            points, label = [], ""
            for results, names in files:
                own = [each for each in results.trials if each.contestant == name and not each.tuning and each.measured]
                if own and name in names:
                    minutes = (
                        fmean(sum(stage.cpu_seconds or stage.seconds for stage in each.stages) for each in own) / 60
                    )
                    points.append((minutes, fmean(each.measured.bpb[language] for each in own if each.measured)))
                    label = next(each.label or name for each in results.contestants if each.name == name)
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, linewidth=1.8, label=label)
        axes.set_xscale("log")
        axes.set_xticks([2.5, 5, 10, 20, 40], ["2.5", "5", "10", "20", "40"])
        axes.minorticks_off()
        axes.set_xlabel("training time (CPU minutes, logarithmic)")
        axes.set_ylabel(f"{_NAMES.get(language, language)}, bits per byte (lower is better)")
    return figure


if __name__ == "__main__":
    main()
