"""Quality over size: remove layers by the scores of a probe, heal the smaller models, and measure bits per byte.

    python benchmarks/pruning.py MODEL --corpus ko=ko.jsonl --corpus en=en.jsonl --heldout ko=ko_heldout.jsonl \
        --heldout en=en_heldout.jsonl --keep 28,26,24 --criteria skipping,importance --heal 1000000 --output pruning

Writes OUTPUT/pruning.json and pruning.svg, one line per criterion and language. `--heal 0` measures the models as they
are cut. An interrupted call resumes the probe and the training of each model.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from measuring import write_report

from elo.api import detach, evaluate, probe, run
from elo.cli_values import files_by_language, names, numbers
from elo.probe.choice import choose
from elo.report.drawing import COLOURS, STYLE, finish, new_figure


def main() -> None:
    """Cut, heal and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", action="append", required=True, help="LANGUAGE=FILE, to probe and heal on")
    parser.add_argument("--heldout", action="append", required=True, help="LANGUAGE=FILE, to measure on")
    parser.add_argument("--keep", required=True, help="numbers of layers to keep, joined by commas")
    parser.add_argument("--criteria", default="skipping", help="criteria of the probe, joined by commas")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per language of the probe")
    parser.add_argument("--heal", type=int, default=0, help="training tokens of `method: full` for each smaller model")
    parser.add_argument("--tokens-per-step", type=int, default=512, help="tokens per update of the healing")
    parser.add_argument("--max-bytes", type=int, default=20_000, help="held-out text per language, in bytes")
    parser.add_argument("--dtype", default="auto", help="as in `evaluation.dtype` of a run")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    corpora, heldout = files_by_language("--corpus", given.corpus), files_by_language("--heldout", given.heldout)
    languages = list(corpora)
    scores = probe(
        given.model, corpora, output=given.output / "probe", criteria=names(given.criteria), tokens=given.tokens
    )

    def measure(model: str | Path) -> dict[str, Any]:
        dtype = None if given.dtype == "auto" else given.dtype
        found = evaluate(
            model, corpora=heldout, max_bytes=given.max_bytes, sequence_length=512, dtype=dtype, progress=False
        )
        return {"parameters": found["model"]["parameters"], "bpb": found["bpb"]}

    points = [{"criterion": None, "layers": scores["num_layers"], **measure(given.model)}]
    for criterion, record in scores["criteria"].items():
        for count in numbers("--keep", given.keep):
            kept = choose(record["scores"], criterion, count, "layer", languages).layers
            small = given.output / f"{criterion}-{count}"
            detach(given.model, kept, output=small, overwrite=True)
            found = heal(small, given, corpora, heldout) if given.heal else measure(small)
            points.append({"criterion": criterion, "layers": count, "kept": kept, **found})
            print(points[-1], flush=True)
    settings = {key: value for key, value in vars(given).items() if key not in ("corpus", "heldout", "output")}
    write_report(given.output / "pruning.json", settings, points=points)
    (given.output / "pruning.svg").write_bytes(chart(points, languages))


def heal(small: Path, given: argparse.Namespace, corpora: dict[str, str], heldout: dict[str, str]) -> dict[str, Any]:
    """Train a smaller model on equal parts of all languages; return its size, and bits per byte before and after."""
    target, *sources = corpora
    data = {"target": target, "source": sources, "corpora": corpora, "heldout": heldout, "sequence_length": 512}
    data["replay_ratio"] = len(sources) / len(corpora)
    results = run(
        {
            "model": str(small),
            "output": str(given.output / f"{small.name}-healed"),
            "method": "full",
            "tokens": given.heal,
            "data": data,
            "training": {"tokens_per_step": given.tokens_per_step, "evaluations": 0, "save_steps": 100_000},
            "evaluation": {"max_bytes": given.max_bytes, "dtype": given.dtype},
        }
    )
    (trial,) = results["trials"]
    return {
        "parameters": results["model"]["parameters"],
        "bpb": results["base"]["bpb"],
        "healed": trial["measured"]["bpb"],
    }


def chart(points: list[dict[str, Any]], languages: list[str]) -> bytes:
    """Draw bits per byte over parameters: one line per criterion and language, dashed before healing."""
    whole, *smaller = points
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for number, criterion in enumerate(dict.fromkeys(point["criterion"] for point in smaller)):
            for language, width in zip(languages, (2.0, 1.0, 0.6), strict=False):
                own = [whole, *(point for point in smaller if point["criterion"] == criterion)]
                sizes = [point["parameters"] / 1e6 for point in own]
                for key, line in (("bpb", "--"), ("healed", "-")):
                    if all(key in point for point in own[1:]):
                        values = [(point.get(key) or point["bpb"])[language] for point in own]
                        label = f"{criterion}, {language}, {'healed' if key == 'healed' else 'as cut'}"
                        colour = list(COLOURS.values())[number % len(COLOURS)]
                        axes.plot(sizes, values, line, color=colour, linewidth=width, marker="o", label=label)
        axes.set_xlabel("parameters (millions)")
        axes.set_ylabel("bits per byte")
        return finish(figure, "pruning", "Quality over size", "Lower and further left is better.").svg


if __name__ == "__main__":
    main()
