"""Find errors in a run before data is prepared, weights are loaded or worker processes start."""

import logging
from contextlib import suppress
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from elo.check_output import generation_problem
from elo.checkpoint.architecture import find_architecture, require_module
from elo.checkpoint.counting import read_config
from elo.checkpoint.layers import assumed_layers, parse_auto
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.naming import find_layer_names, map_names, refuse_more_layers
from elo.checkpoint.new_rows import share_record
from elo.checkpoint.refusals import refuse_quantised, require_detachable
from elo.checkpoint.tensor_files import Checkpoint, open_checkpoint
from elo.config import RunConfig
from elo.errors import EloError, UnsupportedArchitectureError
from elo.evaluate.cloze import read_cloze
from elo.evaluate.scoring import longest_sequence
from elo.methods.base import Setup, check_supervision, first_new_row
from elo.probe.choice import check_auto
from elo.store.remote import require_local
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.train.arguments import check_settings, check_sharding
from elo.train.attention import VARLEN, require_own_positions, separates_documents
from elo.train.loss import LogitTransform, require_transform
from elo.train.settings import check_also_train

log = logging.getLogger(__name__)


def check_inputs(config: RunConfig) -> None:
    """Raise EloError if the configuration or an input file is invalid, without loading a model."""
    for phase in config.method.phases:
        settings = config.settings(phase)
        corpus, measured = settings.vocabulary == "corpus", config.evaluation.during_training
        if settings.divides_model and (corpus or measured):
            raise EloError(
                f"{'training.vocabulary: corpus' if corpus else 'evaluation.during_training'}: needs whole weights, "
                f"but FSDP or DeepSpeed shards them in {phase.name}; remove it, or fsdp and deepspeed"
            )
        check_settings(settings, config.data.sequence_length, "training")
    config.data.filters.check(config.data.corpora)
    require_local(config.output, "output")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise EloError(f"output: {output}: is a file; give a folder for the run")
    if output.is_dir() and any(output.iterdir()) and not (output / "stages").is_dir():
        raise EloError(f"output: {output}: the folder is not empty and is not an ELO run; choose another")
    for language, path in config.evaluation.cloze.items():
        _check_language(config, language, "evaluation.cloze")
        try:
            read_cloze(path)
        except EloError as error:
            raise EloError(f"evaluation.cloze.{language}: {error}") from None
    for measure in config.evaluation.measures:
        measure.check(f"evaluation.{measure.name}")
    for language in config.evaluation.prompts:
        _check_language(config, language, "evaluation.prompts")


def _check_language(config: RunConfig, language: str, key: str) -> None:
    if language not in config.data.languages:
        raise EloError(
            f"{key}: {language!r} is neither a target nor a source language; "
            f"choose among {', '.join(config.data.languages)}"
        )


def check_processes(config: RunConfig) -> None:
    """Raise EloError if this launch cannot shard weights over its processes as the settings of a phase require."""
    for phase in config.method.phases:
        check_sharding(config.settings(phase), config.data.sequence_length)


def check_model(config: RunConfig, base: Path) -> tuple[int, ...]:
    """Check that the model supports the run's layers, vocabulary rows and sequence length, without reading weights.

    Returns:
        Indices of the decoder layers to train, for a method that uses them; for `layers: auto`, an estimate.

    Raises:
        EloError: the model does not support a setting.
    """

    weights = open_checkpoint(base)
    model_config = read_config(str(base), trust_remote_code=config.trust_remote_code)
    refuse_quantised(model_config)
    if any(phase.detached for phase in config.method.phases):
        require_detachable(model_config)
    _check_ids(base, model_config)
    model = build_hollow_causal_lm(model_config, trust_remote_code=config.trust_remote_code)
    share_record(model_config, model.config)
    _check_weights(weights, model)
    _check_attention(config, model)
    num_layers = find_architecture(model).num_layers
    layers: tuple[int, ...] = ()
    if config.method.uses_layers:
        if auto := parse_auto(config.layers):
            check_auto(auto, num_layers, has_parallel=config.probe.parallel is not None, where=str(config.layers))
        layers = assumed_layers(config.layers, num_layers)
    require_module(model, config.method.module, "method.module")
    for phase in config.method.phases:
        config.method.lora_ranks(phase, num_layers)
        check_also_train(phase.also_train, tied=find_architecture(model).tied)
        check_supervision(phase, config.settings(phase), layers, num_layers)
        require_transform(config.settings(phase).head_loss, LogitTransform.of(model_config.get_text_config()))
    if config.method.needs_new_rows:
        first_new_row(model)
    length, limit = config.data.sequence_length, longest_sequence(model)
    if limit is not None and length > limit:
        raise EloError(
            f"data.sequence_length: got {length}, but {config.model} has {limit} positions; write at most {limit}"
        )
    for batch_size in {config.settings(phase).per_device_train_batch_size for phase in config.method.phases}:
        require_own_positions(
            model_config, length, packed=config.data.packing, batch_size=batch_size, section="training"
        )
    if config.data.packing and not separates_documents(model):
        raise EloError(
            f"data.packing: {model_config.model_type} does not separate packed documents (it has layers other than "
            "attention, takes no position ids, or ignores where they restart); write data.packing: false"
        )
    # Last, because it changes the model. It raises EloError if an adapter cannot be added.
    for phase in config.method.phases:
        if phase.middle == "adapted":
            config.method.prepare(model, phase, Setup(layers))
    return layers


def _check_weights(weights: Checkpoint, model: PreTrainedModel) -> None:
    """Raise EloError if the weights are not those of the model that config.json describes, or cannot train."""

    with suppress(UnsupportedArchitectureError):  # only detaching needs the names of layers, and raises this again
        refuse_more_layers(weights, find_layer_names(model, weights))
    state = model.state_dict()
    for link in map_names(model, weights.meta_state_dict()).links:
        for tensor in (weights.tensors[name] for name in link.stored):
            if state[link.loaded[0]].is_floating_point() and tensor.dtype not in ("F64", "F32", "F16", "BF16"):
                raise EloError(
                    f"{tensor.file}: {tensor.name}: is stored as {tensor.dtype}, which rounds trained values too much; "
                    "give a checkpoint with float32, float16 or bfloat16 weights"
                )


def _check_ids(base: Path, model_config: PretrainedConfig) -> None:
    """Raise EloError for generation settings that transformers rejects; warn if the padding id is the bos id."""

    if problem := generation_problem(base, model_config):
        raise EloError(f"{base / 'generation_config.json'}: {problem}; correct the file or remove it")
    decoder = text_config_of(model_config)
    pad = getattr(decoder, "pad_token_id", None)
    if pad is not None and pad == getattr(decoder, "bos_token_id", None):
        log.warning(
            "warning: %s: pad_token_id and bos_token_id are both %s; the padding row of the embedding gets no "
            "gradient in transformers, so the bos row will not train; set pad_token_id to the end-of-text id or an "
            "unused id",
            base / "config.json",
            pad,
        )


def _check_attention(config: RunConfig, model: PreTrainedModel) -> None:
    """Raise EloError if `model` (on the meta device) cannot use an attention implementation that is set by name."""

    for name in {config.settings(phase).attn_implementation for phase in config.method.phases}:
        if name in ("auto", VARLEN):
            continue
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError, OSError) as error:
            raise EloError(
                f"training.attn_implementation: this model cannot use {name!r} here "
                f"({' '.join(str(error).split())[:300]}); write auto, sdpa or eager"
            ) from None
