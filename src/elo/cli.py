"""The command line: each command parses its arguments and calls one function."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from elo.cli_checkpoints import checkpoints
from elo.cli_measuring import measuring
from elo.cli_observing import observing
from elo.cli_options import Config, LostText, Overwrite, Set, SplitSpecials, Trust
from elo.cli_values import files_by_language, given, numbers
from elo.errors import EloError, StoppedBySignalError
from elo.store.files import disk_problem

app = typer.Typer(
    name="elo",
    help="Teach an existing LLM a new language, and measure what each way of doing it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

vocab = typer.Typer(
    help="Measure tokens per language, and extend a vocabulary.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(checkpoints)
app.add_typer(measuring)
app.add_typer(vocab, name="vocab")
app.add_typer(observing)


@app.command()
def run(
    config: Config,
    set_: Set = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Stop when this stage is done: prepare, bridge, detach, attach, scale, the name of a phase, "
            "chat_vector, or sft.",
        ),
    ] = None,
) -> None:
    """Run all stages, or resume an interrupted run."""
    from elo.run import run

    run(config, overrides=set_, until=until)


@app.command()
def prepare(
    config: Config,
    set_: Set = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Tokenise on a Ray cluster: auto for the one that this machine belongs to, or HOST:PORT (extra ray).",
        ),
    ] = None,
) -> None:
    """Tokenise the corpora of a run into token shards."""
    from elo.run import run

    run(config, overrides=set_, until="prepare", ray=ray)


@app.command("config")
def config_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE", help="Checkpoint folder or hub id; with --from, the other tool's configuration file."
        ),
    ] = "MODEL",
    tool: Annotated[
        str | None,
        typer.Option("--from", metavar="TOOL", help="Translate a configuration of llamafactory or axolotl."),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a run's configuration.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
) -> None:
    """Write a commented configuration with every key and its default, or translate another tool's (--from)."""
    from elo.config.document import commented_yaml, json_schema
    from elo.config.translate import render, translate
    from elo.store.files import write_text
    from elo.store.remote import output_file

    target = output_file(output)
    if tool is not None and schema:
        raise EloError("config: --from and --schema exclude each other; give one of them")
    if tool is not None:
        text = render(translate(tool, Path(model)))
    else:
        text = json_schema() if schema else commented_yaml(model)
    if target is None:
        typer.echo(text)
    elif target.exists():
        raise EloError(f"--output {target}: exists already; choose another file")
    else:
        write_text(target, text)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Adapted model: checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; OUTPUT/chat is the chat model.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Conversations (.jsonl) to train on; may be repeated."),
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Conversations to measure on; by default a part of --data."),
    ] = None,
    chat: Annotated[
        str | None, typer.Option(help="Chat model made from --base, whose change is added before training.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base of the adapted model and of --chat.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY.PATH=VALUE",
            help="Any key of the section chat (docs/configuration.md), such as method=full; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the conversations.")] = 42,
    trust_remote_code: Trust = False,
) -> None:
    """Make a chat model from an adapted one by chat vector and fine-tuning, and measure before and after."""
    from elo.chat.chat import chat as make_chat

    section = {
        "model": chat,
        "base": base,
        "data": files_by_language("--data", data),
        "heldout": files_by_language("--heldout", heldout),
    }
    make_chat(model, section, output=output, overrides=set_, seed=seed, trust_remote_code=trust_remote_code)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of a run or a comparison, or its results.json.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write into; by default that of the results.")
    ] = None,
) -> None:
    """Write report.html, report.md and charts of a run or a comparison from its results.json."""
    from elo.report.write import report

    typer.echo(report(results, output))


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.yaml|MODEL",
            help="Configuration of a run; or a checkpoint folder, config.json or hub id, for a run with defaults.",
        ),
    ],
    set_: Set = None,
    method: Annotated[
        str | None, typer.Option(help="Method; by default the configuration's, and for a MODEL the common ones.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Token budget; by default the configuration's, or 1e9.")] = None,
    device: Annotated[str | None, typer.Option(help="A GPU, such as A100-80GB or L4; by default H100.")] = None,
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train each phase for three updates on this machine, and plan for it.")
    ] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one device, in your currency.")] = None,
    vocabulary_rows: Annotated[
        int | None, typer.Option(help="Number of vocabulary rows in training, for training.vocabulary: corpus.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here as JSON.")] = None,
) -> None:
    """Estimate parameters, FLOPs, memory, time and cost without loading weights (docs/plan.md)."""
    from rich.console import Console

    from elo.plan.plan import COMMON_METHODS, DEFAULT_BASELINES, is_configuration, plan, planned_run
    from elo.plan.table import render_plan
    from elo.store.files import write_json
    from elo.store.remote import output_file

    target = output_file(output)
    chosen = method is not None or is_configuration(source)
    planned = plan(
        planned_run(source, set_, method=method, tokens=tokens),
        device=device,
        devices=devices,
        measure=measure,
        price_per_hour=price_per_hour,
        vocabulary_rows=vocabulary_rows,
        compare_with=DEFAULT_BASELINES if chosen else COMMON_METHODS,
    )
    Console().print(render_plan(planned))
    if target is not None:
        write_json(target, planned.model_dump(mode="json"))


@app.command()
def compare(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration of the comparison (docs/comparing.md).")
    ],
    set_: Set = None,
) -> None:
    """Compare methods within the same budget, each tuned, over several seeds."""
    from elo.compare import compare

    compare(config, overrides=set_)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the comparison.")] = Path("elo-quickstart"),
    set_: Set = None,
) -> None:
    """Compare three methods on a small built-in model and corpus, in minutes on a CPU."""
    from elo.quickstart.quickstart import quickstart

    quickstart(output, set_)


@vocab.command("measure")
def vocab_measure(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; no weights are read.")],
    corpus: Annotated[list[str], typer.Option(metavar="LANGUAGE=FILE", help="Text of a language; may be repeated.")],
    target: Annotated[list[str] | None, typer.Option(help="Language to try new pieces for; may be repeated.")] = None,
    pieces: Annotated[
        str, typer.Option(help="Numbers of new pieces to try, joined by commas.")
    ] = "2000,4000,8000,16000",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if it is not in the model's folder.")] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds a document's text.")] = "text",
    split_special_tokens: SplitSpecials = True,
    allow_lost_text: LostText = False,
    max_characters: Annotated[
        int | None, typer.Option(min=1, help="Read at most this many characters per language.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here as JSON.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Report bytes per token and fertility; with --target, whether extending the vocabulary is worth it."""
    from rich.console import Console

    from elo.vocab.table import render_vocabulary
    from elo.vocab.vocabulary import measure_vocabulary

    if not target and given(context, "pieces"):
        raise EloError("vocab measure: --pieces belongs to --target; give --target LANGUAGE, or remove it")
    measured = measure_vocabulary(
        model,
        files_by_language("--corpus", corpus),
        target=target or (),
        pieces=numbers("--pieces", pieces),
        tokenizer=tokenizer,
        text_column=text_column,
        split_special_tokens=split_special_tokens,
        allow_lost_text=allow_lost_text,
        max_characters=max_characters,
        output=output,
        trust_remote_code=trust_remote_code,
    )
    Console().print(render_vocabulary(measured))


@vocab.command("extend")
def vocab_extend(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Text to learn pieces from; one for each language, may be repeated.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Text whose words must keep their tokens; may be repeated.")
    ] = None,
    pieces: Annotated[int, typer.Option(help="Number of new pieces.")] = 8000,
    tokenizer: Annotated[str | None, typer.Option(help="Use this extended tokenizer instead of learning one.")] = None,
    init: Annotated[
        str, typer.Option(help="New embedding rows: pieces, first, mean or noise (docs/vocabulary.md).")
    ] = "pieces",
    head_init: Annotated[str | None, typer.Option(help="New LM head rows; by default as --init.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Safetensors file with embedding rows computed elsewhere.")] = None,
    pad_to: Annotated[int, typer.Option(help="Round the number of rows up to a multiple of this.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of --init noise.")] = 0,
    text_column: Annotated[str, typer.Option(help="Field that holds a document's text.")] = "text",
    max_characters: Annotated[
        int | None, typer.Option(min=1, help="Read at most this many characters per language.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a checkpoint with new vocabulary pieces; words of the source languages keep their tokens."""
    from elo.vocab.table import extension_line
    from elo.vocab.vocabulary import extend_vocabulary

    record = extend_vocabulary(
        model,
        target or (),
        source or (),
        output=output,
        pieces=pieces,
        tokenizer=tokenizer,
        init=init,
        head_init=head_init,
        rows=rows,
        pad_to_multiple_of=pad_to,
        seed=seed,
        text_column=text_column,
        max_characters=max_characters,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(_one_line(f"{output}: {extension_line(record)}"))


# Newer versions of typer include a copy of click, so the exception class is taken from typer.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can fix prints one message, with exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # If waiting threads spin, work is several times slower as soon as another process needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft imports bitsandbytes, which warns that a package for 4-bit kernels is missing. Nothing here uses them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(args=arguments, standalone_mode=False)
    except _UsageError as error:
        error.show()
        sys.exit(2)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except EloError as error:
        print(f"elo: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # disk full, permission denied, a folder that is not there
        print(f"elo: {_one_line(disk_problem(error))}", file=sys.stderr)
        sys.exit(2)
    except StoppedBySignalError as error:
        print(f"elo: {error}; the same command resumes from there", file=sys.stderr)
        sys.exit(128 + error.number)


def _one_line(message: Any) -> str:
    """Return a message on one line, with control characters escaped, because it may quote a user's text."""
    text = " ".join(str(message).split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


if __name__ == "__main__":
    main()
