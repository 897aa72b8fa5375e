"""The command `elo fewshot`."""

from pathlib import Path
from typing import Annotated

import typer

from elo.cli_options import Trust
from elo.cli_values import names, numbers, words_by_label

app = typer.Typer(rich_markup_mode=None)


@app.command()
def fewshot(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    train: Annotated[Path, typer.Option(help="Labelled examples to draw from (.jsonl).")],
    test: Annotated[Path, typer.Option(help="Labelled items to predict (.jsonl).")],
    examples: Annotated[
        str, typer.Option(help="Numbers of examples, drawn evenly over the labels, joined by commas.")
    ] = "8,32",
    ways: Annotated[
        str, typer.Option(help="Ways to learn from them: in-context, sft, instruction, joined by commas.")
    ] = "in-context,sft,instruction",
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas; each draws its own examples.")] = "1,2,3",
    text_field: Annotated[str, typer.Option(help="Field that holds an item's text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Field that holds an item's label.")] = "label",
    word: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=WORD", help="Word that stands for a label; by default the label. May be repeated."),
    ] = None,
    template: Annotated[
        str, typer.Option(help="Text in front of the label's word, with {text}; \\n is a line break.")
    ] = "{text}\\nLabel:",
    instruction: Annotated[
        str | None, typer.Option(help="Instruction; by default one that lists the words. The way sft has none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Predict only this many items, drawn at random.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the examples in training.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate; it falls linearly to 0.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Examples per update.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank adapters.")] = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here as JSON.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if it is not in the model's folder.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare in-context learning, SFT and instruction tuning on a labelled task, with their cost."""
    from elo.fewshot.fewshot import Training, few_shot
    from elo.fewshot.task import read_task

    few_shot(
        model,
        read_task(
            train,
            test,
            text_field=text_field,
            label_field=label_field,
            words=words_by_label(word),
            template=template.replace("\\n", "\n"),
            instruction=instruction,
            limit=limit,
        ),
        ways=names(ways),
        examples=numbers("--examples", examples),
        seeds=numbers("--seeds", seeds),
        training=Training(epochs, learning_rate, batch_size, rank),
        tokenizer=tokenizer,
        output=output,
        trust_remote_code=trust_remote_code,
    )
