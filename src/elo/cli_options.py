"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration of the run (docs/configuration.md).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the configuration; may be repeated."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that ships with the checkpoint. Only if you trust it."),
]
SplitSpecials = Annotated[
    bool,
    typer.Option(help="Tokenise names of special tokens in the text as ordinary text, or as special tokens."),
]
LostText = Annotated[
    bool, typer.Option("--allow-lost-text", help="Accept text of which the tokenizer loses more than 5 %.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
