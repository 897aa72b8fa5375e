"""Run one training phase on disk, from a checkpoint folder to a trained checkpoint folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from elo.checkpoint.counting import read_config
from elo.checkpoint.new_rows import share_record
from elo.checkpoint.tensor_files import open_checkpoint
from elo.data.heldout import cut_corpus
from elo.data.shards import PreparedData
from elo.data.tokenizer import TextTokenizer
from elo.errors import EloError
from elo.evaluate.base import Measure, Subject
from elo.evaluate.bits_per_byte import bits_per_byte
from elo.evaluate.loading import load_model
from elo.store.files import atomic_directory, readable_disk_errors
from elo.store.processes import from_main, is_main
from elo.train.arguments import wants_bf16
from elo.train.distributed import main_alone_loads, whole_parts, without_weights
from elo.train.loop import Evaluate, train
from elo.train.prepared import Prepared
from elo.train.settings import TrainingSettings
from elo.train.trained_files import TrainedFiles
from elo.train.vocabulary_cut import CutSequences, VocabularyCut


def train_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    rows: Dataset,
    prepare: Callable[[PreTrainedModel], Prepared],
    seed: int,
    settings: TrainingSettings,
    scratch: Path,
    vocabulary: Path | None = None,
    evaluate: Evaluate | None = None,
    finish: Callable[[Path], None] | None = None,
    trust_remote_code: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Train the checkpoint in folder `checkpoint` and write the result to `output`.

    Args:
        rows: sequences to train on.
        prepare: function that sets which parameters train and installs the phase's hooks; see `Method.prepare`.
        seed: seed of all random generators.
        settings: settings of the phase.
        scratch: folder for training checkpoints, from which an interrupted call resumes.
        vocabulary: file with the vocabulary rows that training computes with; None computes with all rows.
        evaluate: function that measures the model during training.
        finish: function that changes the files beside the weights, before the output appears.
        trust_remote_code: run code that ships with the checkpoint, and copy it.
        label: label of the progress lines; None shows no progress.

    Returns:
        The record of the stage: the fields of `TrainingResult`, tokens_per_second, and precision (`bf16` or `fp32`).

    Raises:
        EloError: the checkpoint cannot be read, or cannot be trained with these settings.
        TrainingDivergedError: the loss is not finite, or it rose and stayed high.
        StoppedBySignalError: SIGTERM or SIGINT arrived; a checkpoint has been written.
    """
    model, _, main_alone = load_trainable(checkpoint, settings, trust_remote_code=trust_remote_code)
    files = TrainedFiles(checkpoint, model)
    stored = files.stored_dtypes(model)
    prepared = prepare(model)
    files.set_trained(model)
    if keeps_frozen_as_stored(settings):
        freeze_in(model, stored, empty=main_alone and not is_main())
    cut = None
    if vocabulary is not None:
        cut = VocabularyCut(model, vocabulary)
        rows = CutSequences(rows, cut)
        prepared = replace(prepared, first_row=cut.first_row(prepared.first_row))
        if evaluate is not None:
            evaluate = _on_whole_vocabulary(evaluate, cut)

    def save(trained: PreTrainedModel, parts: Iterator[dict[str, Tensor]] | None) -> None:
        if cut is not None:
            cut.restore()
        if parts is not None and prepared.fold_parts is not None:
            parts = map(prepared.fold_parts(), parts)
        else:
            prepared.fold()
        save_checkpoint(trained, parts, files, output, finish=finish, python=trust_remote_code)

    result = train(
        model,
        rows,
        settings=settings,
        output_dir=scratch,
        seed=seed,
        prepared=prepared,
        evaluate=evaluate,
        save=save,
        main_alone=main_alone,
        label=label,
    )
    record = asdict(result)
    return record | {"tokens_per_second": result.tokens / result.seconds, "precision": _precision(settings)}


def _on_whole_vocabulary(evaluate: Evaluate, cut: VocabularyCut) -> Evaluate:
    def measure(model: PreTrainedModel) -> dict[str, Any]:
        with cut.whole():
            return evaluate(model)

    return measure


def load_trainable(
    checkpoint: Path, settings: TrainingSettings, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any, bool]:
    """Load a checkpoint in fp32, so that trained parameters have fp32 master weights.

    Returns:
        The model, the dtype of most of its stored weights, and whether only the main process has the weights. Under
        FSDP, only the main process loads them if possible. The other processes then have uninitialised parameters until
        they receive their shards.

    Raises:
        EloError: the folder has no safetensors checkpoint that transformers can load, or DeepSpeed would round its
            weights.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = read_config(str(checkpoint), trust_remote_code=trust_remote_code)
    dtype = open_checkpoint(checkpoint).main_dtype()  # config.json may have another dtype, or none
    if settings.training_arguments.get("deepspeed") and wants_bf16(settings) and dtype == torch.float32:
        raise EloError(f"{checkpoint}: its weights are fp32, which DeepSpeed would round to bf16; write bf16: false")
    loaded: list[PreTrainedModel] = []

    def load() -> None:
        loaded.append(
            load_model(str(checkpoint), device="cpu", dtype=torch.float32, trust_remote_code=trust_remote_code)
        )
        share_record(config, loaded[0].config)

    if settings.training_arguments.get("fsdp"):
        model = without_weights(config, torch.float32, trust_remote_code=trust_remote_code)
        share_record(config, model.config)
        if main_alone_loads(settings, model):
            from_main(load)
            return (loaded[0] if loaded else model), dtype, True
    load()
    return loaded[0], dtype, False


def save_checkpoint(
    model: PreTrainedModel,
    parts: Iterator[dict[str, Tensor]] | None,
    files: TrainedFiles,
    output: Path,
    *,
    finish: Callable[[Path], None] | None = None,
    python: bool = False,
) -> None:
    """Write a trained model as a copy of its base with the changed weights.

    The folder appears only when it is complete.

    Args:
        parts: iterator over the weights, part by part, if the model holds only shards; None reads them from the model.
        files: files of the base.
        finish: function that changes the files beside the weights, before the folder appears.
        python: copy the base's Python files too.
    """
    with readable_disk_errors(output), atomic_directory(output, overwrite=True) as folder:
        files.write(folder, model, whole_parts(model) if parts is None else parts, python=python)
        if finish is not None:
            finish(folder)


def evaluator(
    prepared: PreparedData,
    languages: Sequence[str],
    tokenizer: TextTokenizer,
    *,
    sequence_length: int,
    max_bytes: int | None,
    settings: TrainingSettings,
    measures: Sequence[Measure] = (),
    trust_remote_code: bool = False,
) -> Evaluate:
    """Return a function for measurements during training: bits per byte on held-out text, and further measures.

    The text is the same as in `elo evaluate`, so that curves and final values are comparable.

    Args:
        languages: languages to measure bits per byte on.
        max_bytes: maximum UTF-8 bytes of held-out text per language; None uses all.
        measures: further measures.
    """
    tokenizer = replace(tokenizer, split_special_tokens=prepared.split_special_tokens)
    corpora = {language: cut_corpus(prepared.heldout(language), tokenizer, max_bytes) for language in languages}
    autocast = torch.bfloat16 if wants_bf16(settings) else None

    def evaluate(model: PreTrainedModel) -> dict[str, Any]:
        bpb = {
            language: bits_per_byte(
                model, corpus, sequence_length=sequence_length, autocast_dtype=autocast
            ).bits_per_byte
            for language, corpus in corpora.items()
        }
        subject = Subject(model, tokenizer, tokenizer, trust_remote_code=trust_remote_code)
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            values = [value for each in measures for value in each.measure(subject).values if not value.is_detail]
        return {"bpb": bpb, "measures": [value.model_dump(mode="json", exclude={"per_item"}) for value in values]}

    return evaluate


def keeps_frozen_as_stored(settings: TrainingSettings) -> bool:
    """Return whether frozen parameters keep their stored dtype, which saves memory."""
    return torch.cuda.is_available() and wants_bf16(settings)


def freeze_in(model: PreTrainedModel, stored: dict[int, Any], *, empty: bool = False) -> None:
    """Convert frozen parameters to their stored half precision, because they need no master weights.

    Args:
        stored: stored dtype by the parameter's `id`.
        empty: allocate the converted parameters without values.
    """
    for parameter in model.parameters():
        dtype = stored.get(id(parameter))
        if not parameter.requires_grad and dtype in (torch.bfloat16, torch.float16):
            parameter.data = torch.empty_like(parameter, dtype=dtype) if empty else parameter.data.to(dtype)


def _precision(settings: TrainingSettings) -> str:
    return "bf16" if wants_bf16(settings) else "fp32"
