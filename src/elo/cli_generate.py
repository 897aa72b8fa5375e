"""The command `elo generate`."""

from pathlib import Path
from typing import Annotated

import typer

from elo.cli_options import Trust
from elo.cli_values import files_by_language

generation = typer.Typer(rich_markup_mode=None)


@generation.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of any causal LM.")],
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; may be repeated.")] = None,
    exit_layer: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Layer to exit at, 0-based, negative from the end; may be repeated."),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Exit at the first exit layer whose most likely token has a probability above this. Without "
            "--exit-layer, a token may exit after each quarter of the layers.",
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Text to measure bits per byte on; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a continuation, in tokens.")] = 64,
    max_bytes: Annotated[
        int | None, typer.Option(min=1000, help="Measure on at most this many UTF-8 bytes per language.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if it is not in the model's folder.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here as JSON.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue prompts greedily with exit at internal layers; report speed and bits per byte by exit layer."""
    from elo.generate import generate

    generate(
        model,
        prompt or (),
        exit_layers=exit_layer or (),
        confidence=confidence,
        corpora=files_by_language("--corpus", corpus),
        max_new_tokens=max_new_tokens,
        max_bytes=max_bytes,
        tokenizer=tokenizer,
        output=output,
        trust_remote_code=trust_remote_code,
    )
