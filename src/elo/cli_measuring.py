"""Commands that measure a model: `evaluate`, `generate`, `probe`, `fewshot`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elo.checkpoint.layers import PROBE_LENGTH, PROBE_TOKENS
from elo.cli_options import LostText, SplitSpecials, Trust
from elo.cli_values import files_by_language, given, names, numbers, texts_by_language, words_by_label
from elo.errors import EloError

measuring = typer.Typer(rich_markup_mode=None)


@measuring.command()
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of any causal LM.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Text to measure bits per byte on; may be repeated."),
    ] = None,
    cloze: Annotated[
        list[str] | None, typer.Option(metavar="LANGUAGE=FILE", help="Cloze items (.jsonl); may be repeated.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="LANGUAGE=TEXT", help="Text to continue greedily; may be repeated.")
    ] = None,
    in_context: Annotated[
        bool,
        typer.Option("--in-context", help="Measure copying, recall and pattern completion on random pieces; no data."),
    ] = False,
    chat: Annotated[
        list[str] | None,
        typer.Option(metavar="LANGUAGE=FILE", help="Conversations to measure chat ability on; may be repeated."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template for --chat: a Jinja file, chatml or plain.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, joined by commas; ko=TASK reports one under a language (extra eval)."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Languages whose common lm-eval tasks to run, joined by commas; korean=ko renames (extra eval)."
        ),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of --tasks.")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Questions of each task: the first ones, or a share below 1.")
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            help="Sequences per forward pass of --tasks; auto takes as many as fit on a GPU, and 1 on a CPU or if "
            "padding changes values."
        ),
    ] = "auto",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with your own task files (.yaml) for --tasks.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MEASURE.KEY=VALUE",
            help="Configure any measure as in the section evaluation (docs/configuration.md), such as "
            "translation.path=FILE; may be repeated.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here as JSON.")] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=2, help="Context in tokens; by default the model's number of positions, at most 2048."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1000, help="Measure on at most this many UTF-8 bytes per language, cut from all documents."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if it is not in the model's folder.")] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds a document's text.")] = "text",
    split_special_tokens: SplitSpecials = True,
    allow_lost_text: LostText = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure bits per byte, cloze accuracy, in-context ability and benchmarks of any Hugging Face causal LM."""
    from elo.config import load_measures
    from elo.evaluate.chat import Chat
    from elo.evaluate.evaluate import evaluate
    from elo.evaluate.in_context import InContext
    from elo.evaluate.lm_eval import benchmark_tasks

    corpora, items = files_by_language("--corpus", corpus), files_by_language("--cloze", cloze)
    prompts = texts_by_language(prompt)
    measures: list[Any] = [InContext()] if in_context else []
    if chat:
        measures.append(Chat(data=files_by_language("--chat", chat), template=template))
    elif template is not None:
        raise EloError("evaluate: --template belongs to --chat; give --chat LANGUAGE=FILE")
    if tasks is not None or suite is not None:
        measures.append(benchmark_tasks(tasks, suite, num_fewshot, limit, batch_size, include_path))
    elif unused := given(context, "num_fewshot", "limit", "batch_size", "include_path"):
        raise EloError(f"evaluate: {', '.join(unused)} belong to --tasks; give --tasks TASK, or remove them")
    for measure in load_measures(set_ or []):
        if any(type(measure) is type(each) for each in measures):
            raise EloError(f"--set {measure.name}: the measure also has an option of its own here; use one of the two")
        measures.append(measure)
    if not corpora and not items and not prompts and not measures:
        raise EloError(
            "evaluate: nothing to measure; give --corpus LANGUAGE=FILE, --cloze LANGUAGE=FILE, --in-context, "
            "--chat LANGUAGE=FILE, --tasks TASK, --suite LANGUAGE or --set MEASURE.KEY=VALUE"
        )
    evaluate(
        model,
        tokenizer=tokenizer,
        corpora=corpora,
        cloze=items,
        prompts=prompts,
        measures=measures,
        sequence_length=sequence_length,
        max_bytes=max_bytes,
        text_column=text_column,
        split_special_tokens=split_special_tokens,
        allow_lost_text=allow_lost_text,
        output=output,
        trust_remote_code=trust_remote_code,
    )


@measuring.command()
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


@measuring.command()
def probe(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of any causal LM.")],
    corpus: Annotated[list[str], typer.Option(metavar="LANGUAGE=FILE", help="Text of a language; may be repeated.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for probe.json and charts.")],
    parallel: Annotated[
        Path | None, typer.Option(help="Parallel sentences (.jsonl) with one field per language.")
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="Criteria, joined by commas; by default all that the text allows.")
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per language.")] = PROBE_TOKENS,
    sequence_length: Annotated[int, typer.Option(min=8, help="Length of a sequence, in tokens.")] = PROBE_LENGTH,
    text_column: Annotated[str, typer.Option(help="Field that holds a document's text.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if it is not in the model's folder.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Score every decoder layer, its attention and its feed-forward part, by several criteria."""
    from elo.probe.probe import probe

    probe(
        model,
        files_by_language("--corpus", corpus),
        output=output,
        parallel=parallel,
        criteria=names(criteria),
        tokens=tokens,
        sequence_length=sequence_length,
        text_column=text_column,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"{output / 'probe.json'}: all scores")


@measuring.command()
def fewshot(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    train: Annotated[str, typer.Option(help="Labelled examples to draw from (.jsonl).")],
    test: Annotated[str, typer.Option(help="Labelled items to predict (.jsonl).")],
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
        str, typer.Option(help="Text before the label's word, with {text}; \\n is a line break.")
    ] = "{text}\\nLabel:",
    instruction: Annotated[
        str | None, typer.Option(help="Instruction; by default one that lists the words. sft does not use it.")
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
