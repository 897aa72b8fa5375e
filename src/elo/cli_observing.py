"""Commands that change nothing: `elo watch` and `elo doctor`."""

from pathlib import Path
from typing import Annotated

import typer

observing = typer.Typer(rich_markup_mode=None)


@observing.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a comparison.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 2.0,
) -> None:
    """Show stages, progress, time left, losses and bits per byte of a run or a comparison."""
    from elo.watch import watch

    watch(folder, once=once, every=every)


@observing.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Report hardware, versions, memory and disk, and what each feature lacks on this machine."""
    import json as json_module

    from rich.console import Console

    from elo.doctor import examine, render

    found = examine()
    if json:
        typer.echo(json_module.dumps(found, indent=2, ensure_ascii=False))
    else:
        Console().print(render(found))
