"""Commands for finished models: `elo merge` and `elo push`."""

from pathlib import Path
from typing import Annotated

import typer

from elo.cli_options import Overwrite, Trust
from elo.cli_values import decimals, files_by_language, names
from elo.errors import EloError

checkpoints = typer.Typer(rich_markup_mode=None)


@checkpoints.command()
def merge(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; or a mergekit YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    other: Annotated[
        str | None, typer.Option("--with", metavar="MODEL", help="Second model: checkpoint folder or hub id.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="linear (default), slerp or task_arithmetic (docs/merging.md).")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Factor of the second model, by default 0.5; 0 is the first model.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base of both models, for --method task_arithmetic.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search the weight by bits per byte of held-out text (--corpus).")
    ] = False,
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Held-out text of a language for --search; may be repeated."),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="LANGUAGE", help="Target languages of --search, joined by commas.")
    ] = "",
    source_limit: Annotated[
        float, typer.Option(help="Bits per byte that every other language may be above the base or second model.")
    ] = 0.02,
    weights: Annotated[
        str, typer.Option(help="Weights that --search tries, joined by commas.")
    ] = "0,0.125,0.25,0.375,0.5,0.625,0.75,0.875,1",
    max_bytes: Annotated[
        int | None, typer.Option(min=1000, help="Measure on at most this many UTF-8 bytes per language.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Merge an adapted model with its base or another model, tensor by tensor."""
    from elo.merge.merge import Search, merge

    if search != bool(corpus):
        raise EloError("--search: needs held-out text; give --search with --corpus LANGUAGE=FILE for every language")
    record = merge(
        model,
        other,
        output=output,
        method=method,
        weight=weight,
        base=base,
        search=Search(
            files_by_language("--corpus", corpus),
            names(target),
            source_limit,
            decimals("--weights", weights),
            max_bytes,
        )
        if search
        else None,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    found = f", weight {record['weight']:g}" if "weight" in record else ""
    typer.echo(f"{output}: {record['method']}{found}: {record['tensors']} tensors merged")
    if record["rows_kept"] or record["rows_added"]:
        rows = record["rows_kept"] + record["rows_added"]
        typer.echo(f"note: {rows:,} rows of embedding and head are kept from the one model that has them")
    if record["differs"]:
        typer.echo(
            f"note: the models' configurations differ in {', '.join(record['differs'])}; the first model's values "
            "are kept"
        )


@checkpoints.command()
def push(
    model: Annotated[Path, typer.Argument(help="Model folder, for example RUN/model.")],
    repo: Annotated[
        str,
        typer.Option(
            metavar="OWNER/NAME",
            help="Hub repository, created if it does not exist; or an address such as s3://BUCKET/PATH.",
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; no token, no network.")] = False,
) -> None:
    """Upload a model folder to the Hugging Face hub or to object storage."""
    from elo.push import push

    url = push(model, repo, private=private, dry_run=dry_run, say=typer.echo)["url"]
    if url is not None:
        typer.echo(url)
