"""Draw what several comparisons of one base model found over training time: one panel per language.

    cd benchmarks/results
    python ../over_time.py real_smollm2_seeds.json neighbours_smollm2.json:elo_lora smollm2_10min.json \
        smollm2_40min.json:lora_low smollm2_40min_seeds.json \
        --contestants elo_lora,full,lora,lora_low --output ../../docs/images/smollm2_over_time.png

Each contestant is a line through its mean over seeds in each file. After a colon stand the contestants to take from a
file, all of --contestants by default. The dashed line is the base model.
"""

import argparse
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from elo.report.charts import cost_of
from elo.report.drawing import COLOURS, FAINT, MARKERS, STYLE, finish
from elo.report.files import read_results
from elo.report.schema import Results


def main() -> None:
    """Read the results and write the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="FILE or FILE:NAME,NAME, results of comparisons with one budget")
    parser.add_argument("--contestants", required=True, help="names of contestants, joined by commas")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    given = parser.parse_args()
    by_contestant: dict[str, list[Results]] = {name: [] for name in given.contestants.split(",")}
    for each in given.results:
        path, _, names = each.partition(":")
        results = read_results(path)
        for name in names.split(",") if names else by_contestant:
            if results.finished(name, results.budgets[0].name):
                by_contestant[name].append(results)
    with matplotlib.rc_context(STYLE):
        given.output.write_bytes(finish(draw(by_contestant), "over_time", "", "").png)


def draw(by_contestant: dict[str, list[Results]]) -> Figure:
    """Return a figure of bits per byte over training time, with a panel for each language.

    Args:
        by_contestant: results that have finished trials of a contestant, at their first budget.
    """
    base = next(results for each in by_contestant.values() for results in each).base.bpb
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    for axes, (language, untrained) in zip(figure.subplots(1, len(base)), base.items(), strict=True):
        axes.axhline(untrained, color=FAINT, linestyle="--", linewidth=1.2, label="Base model")
        for number, (name, files) in enumerate(by_contestant.items()):
            contestant = next(each for each in files[-1].contestants if each.name == name)
            colour, marker = COLOURS[contestant.method], MARKERS[number]
            points = sorted(point(results, name, language) for results in files)
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.8, label=contestant.title)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.set_xlabel("training time (minutes, logarithmic)")
        axes.set_ylabel(f"{language}: bits per byte (lower is better)")
    return figure


def point(results: Results, contestant: str, language: str) -> tuple[float, float]:
    """Return a contestant's training time, in minutes, and bits per byte in a language, each the mean over seeds."""
    _, cost = cost_of(results)
    trials = results.finished(contestant, results.budgets[0].name)
    return fmean(cost(trial) or 0.0 for trial in trials) / 60, fmean(trial.measured.bpb[language] for trial in trials)


if __name__ == "__main__":
    main()
