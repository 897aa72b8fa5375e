"""Charts of a probe: the scores of a criterion over depth, by language and module."""

import matplotlib

from elo.probe.base import MODULES, Scores
from elo.report.drawing import COLOURS, SPARE_COLOURS, STYLE, Chart, drawable, finish, new_figure

_LINES = {"layer": "-", "attention": "--", "mlp": ":"}


def draw_scores(name: str, label: str, scores: Scores) -> Chart:
    """Draw one line per language and module over depth."""
    colours = (*COLOURS.values(), *SPARE_COLOURS)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for which in MODULES:
            for number, (language, values) in enumerate(scores[which].items()):
                axes.plot(
                    range(len(values)),
                    values,
                    linestyle=_LINES[which],
                    color=colours[number % len(colours)],
                    linewidth=1.8 if which == "layer" else 1.2,
                    label=f"{drawable(language, f'language {number + 1}')}, {which}",
                )
        axes.set_xlabel("decoder layer")
        axes.set_title(label, loc="left")  # the label is too long for the y axis
        return finish(figure, name, name.replace("_", " "), "Higher is more important.")
