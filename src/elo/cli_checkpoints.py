"""Commands that make or upload checkpoints: `detach`, `attach`, `chat-vector`, `merge`, `push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elo.cli_options import Overwrite, Trust
from elo.cli_values import decimals, files_by_language, given, names
from elo.errors import EloError

checkpoints = typer.Typer(rich_markup_mode=None)


@checkpoints.command()
def detach(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    layers: Annotated[
        str,
        typer.Option(
            help="first:K, last:K, indices (0,1,-1) and ranges (0-3), joined by commas; or auto:K or auto:CRITERION:K, "
            "the K layers that a probe finds most important (docs/probe.md)."
        ),
    ] = "first:1,last:1",
    corpus: Annotated[
        list[str] | None, typer.Option(metavar="LANGUAGE=FILE", help="Text to probe the layers on, for auto.")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Scores for auto: probe.json of `elo probe`.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a small model of the chosen layers with embedding, final norm and LM head."""
    from elo.checkpoint.layers import parse_auto
    from elo.detach_attach import detach

    chosen: Any = layers
    if parse_auto(layers):
        if corpus and probe is not None:
            raise EloError("detach: --corpus and --probe exclude each other; give one of them")
        from elo.probe.probe import layers_to_keep

        chosen, reason = layers_to_keep(
            checkpoint,
            layers,
            saved=probe,
            corpora=files_by_language("--corpus", corpus),
            output=output.with_name(f"{output.name}-probe"),
            trust_remote_code=trust_remote_code,
        )
        typer.echo(f"layers: {reason}")
    elif corpus or probe is not None:
        raise EloError(f"detach: --corpus and --probe belong to --layers auto:K, not to --layers {layers}; remove them")
    record = detach(checkpoint, chosen, output=output, overwrite=overwrite, trust_remote_code=trust_remote_code)
    typer.echo(f"{output}: layers {', '.join(map(str, record['layers']))} of {record['num_base_layers']}")


@checkpoints.command()
def attach(
    detached: Annotated[str, typer.Argument(help="Checkpoint of the trained detached model.")],
    base: Annotated[str, typer.Option(help="Checkpoint folder or hub id that it was detached from.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    scale: Annotated[float, typer.Option(help="Attach base + scale x (trained - base).")] = 1.0,
    include: Annotated[
        str, typer.Option(help="Parts to attach besides the layers: embedding, norm, head, joined by commas.")
    ] = "",
    link: Annotated[bool, typer.Option("--link", help="Hard-link unchanged weight files to the base's.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write the base with the trained layers in their original places."""
    from elo.detach_attach import attach

    record = attach(
        detached,
        base,
        output=output,
        scale=scale,
        include=names(include),
        link=link,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    kept, files = ", ".join(map(str, record["layers"])), record["files"]
    shared = files.get("linked", 0) + files.get("cloned", 0)
    note = f"; {shared} of {sum(files.values())} weight files share their blocks with the base's" if shared else ""
    typer.echo(f"{output}: layers {kept} of {record['num_base_layers']} attached{note}")


@checkpoints.command("chat-vector")
def chat_vector(
    adapted: Annotated[str, typer.Argument(help="Adapted model: folder or hub id.")],
    base: Annotated[str, typer.Option(help="Base model of both: checkpoint folder or hub id.")],
    chat: Annotated[str, typer.Option(help="Chat model made from the base: checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    scale: Annotated[float, typer.Option(help="Add scale x (chat - base).")] = 1.0,
    leave_out: Annotated[
        str, typer.Option(help="Parts to leave unchanged: embedding, norm, head, joined by commas.")
    ] = "",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Add the change of chat training, and the chat template, to an adapted model."""
    from elo.chat.chat_vector import chat_vector

    record = chat_vector(
        adapted,
        base,
        chat,
        output=output,
        scale=scale,
        leave_out=names(leave_out),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    note = f", {record['rows_kept']:,} rows of embedding and head unchanged" if record["rows_kept"] else ""
    if record["rows_added"]:
        note += f", {record['rows_added']:,} rows that only the chat model has copied from it"
    typer.echo(f"{output}: chat vector x {scale:g} added to {record['tensors']} tensors{note}")
    _note_differences(record, "adapted")


@checkpoints.command()
def merge(
    context: typer.Context,
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
        float, typer.Option(help="Bits per byte by which any other language may exceed the base or second model.")
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

    if not search and (unused := given(context, "corpus", "target", "source_limit", "weights", "max_bytes")):
        raise EloError(f"merge: {', '.join(unused)} belong to --search; add --search, or remove them")
    if search and not corpus:
        raise EloError("merge: --search needs text; give --corpus LANGUAGE=FILE for each language")
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
    _note_differences(record, "first")


def _note_differences(record: dict[str, Any], kept: str) -> None:
    """Print the keys in which the models' configurations differ, if there are any."""
    if record["differs"]:
        keys = ", ".join(record["differs"])
        typer.echo(f"note: the models' configurations differ in {keys}; the {kept} model's values are kept")


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the files, without token or network.")
    ] = False,
) -> None:
    """Upload a model folder to the Hugging Face hub or to object storage."""
    from elo.push import push

    url = push(model, repo, private=private, dry_run=dry_run, say=typer.echo)["url"]
    if url is not None:
        typer.echo(url)
