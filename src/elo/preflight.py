"""What is wrong with a run is told before anything is prepared, loaded or hired; weights are not read."""

import logging
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from elo.check_output import generation_problem
from elo.checkpoint.architecture import find_architecture, is_recurrent
from elo.checkpoint.counting import read_config
from elo.checkpoint.layers import parse_layers
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.new_rows import share_record
from elo.checkpoint.refusals import require_detachable
from elo.checkpoint.tensor_files import open_checkpoint
from elo.config import RunConfig
from elo.errors import EloError
from elo.evaluate.cloze import read_cloze
from elo.evaluate.scoring import longest_sequence, takes_position_ids
from elo.methods import Phase
from elo.methods.base import first_new_row
from elo.surgery.equivalence import build_hollow_causal_lm
from elo.train.attention import VARLEN, require_own_positions
from elo.train.loop import check_settings
from elo.train.settings import TrainingSettings, check_also_train

log = logging.getLogger(__name__)


def check_inputs(config: RunConfig) -> None:
    """Find what is missing before anything is loaded."""

    for phase in config.method.phases:
        _check_divided(phase, config.settings(phase))
    for phase in config.method.phases:
        check_settings(config.settings(phase), config.data.sequence_length, "training")
    config.method.check()
    output = Path(config.output)
    if output.is_dir() and any(output.iterdir()) and not (output / "stages").is_dir():
        raise EloError(f"output: {output}: the folder is not empty and is not an ELO run; choose another")
    for language, path in config.evaluation.cloze.items():
        if language not in (config.data.target, config.data.source):
            raise EloError(f"evaluation.cloze: {language!r} is neither the target nor the source language")
        if not Path(path).is_file():
            raise EloError(f"evaluation.cloze.{language}: {path}: no such file")
        read_cloze(Path(path))
    for language in config.evaluation.prompts:
        if language not in (config.data.target, config.data.source):
            raise EloError(f"evaluation.prompts: {language!r} is neither the target nor the source language")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise EloError(f"output: {config.output}: is a file; name a folder for the run")


def _check_divided(phase: Phase, settings: TrainingSettings) -> None:
    """Raise EloError where a phase needs whole weights that FSDP or DeepSpeed divide."""
    if not settings.divides_model:
        return
    needs_whole = "low-rank adapters train on" if phase.middle == "adapted" else None
    if settings.vocabulary == "corpus":
        needs_whole = "training.vocabulary: corpus takes rows out of"
    if needs_whole:
        raise EloError(
            f"training.training_arguments: {phase.name}: {needs_whole} whole weights, which FSDP and DeepSpeed divide "
            "among processes; leave fsdp and deepspeed out"
        )


def check_model(config: RunConfig, base: Path) -> tuple[int, ...]:
    """The layers to train, once the model is known to take them, the rows and their length; weights are not read."""

    open_checkpoint(base)
    model_config = read_config(str(base), trust_remote_code=config.trust_remote_code)
    if any(phase.detached for phase in config.method.phases):
        require_detachable(model_config)
    _check_ids(base, model_config)
    model = build_hollow_causal_lm(model_config, trust_remote_code=config.trust_remote_code)
    share_record(model_config, model.config)
    _check_attention(config, model)
    layers = parse_layers(config.layers, find_architecture(model).num_layers)
    if (
        any(phase.middle == "bridged" for phase in config.method.phases)
        and len(layers) == find_architecture(model).num_layers
    ):
        raise EloError(f"layers: {config.layers!r} leaves out no layer, so there is nothing to bridge; choose fewer")
    for phase in config.method.phases:
        check_also_train(phase.also_train, tied=find_architecture(model).tied)
    if config.method.needs_new_rows:
        first_new_row(model)
    length, limit = config.data.sequence_length, longest_sequence(model)
    if limit is not None and length > limit:
        raise EloError(f"data.sequence_length: {length} is beyond the {limit} positions of {config.model}")
    for batch_size in {config.settings(phase).per_device_train_batch_size for phase in config.method.phases}:
        require_own_positions(
            model_config, length, packed=config.data.packing, batch_size=batch_size, section="training"
        )
    if config.data.packing and (is_recurrent(model) or not takes_position_ids(model)):
        raise EloError(
            f"data.packing: {model_config.model_type} does not keep packed documents apart (it has layers other than "
            "attention, or takes no position ids); write data.packing: false"
        )
    return layers


def _check_ids(base: Path, model_config: PretrainedConfig) -> None:
    """Refuse generation settings that transformers refuses, and warn of a padding id that is another token's."""

    if problem := generation_problem(base, model_config):
        raise EloError(f"{base / 'generation_config.json'}: {problem}; mend or remove the file, the model needs none")
    decoder = text_config_of(model_config)
    pad = getattr(decoder, "pad_token_id", None)
    if pad is not None and pad == getattr(decoder, "bos_token_id", None):
        log.warning(
            "warning: %s: pad_token_id is %s, which is bos_token_id, too; transformers gives the padding row of the "
            "embedding no gradient, so the row of bos stays as it is in whatever trains embeddings; set pad_token_id "
            "to the end-of-text id or an unused one",
            base / "config.json",
            pad,
        )


def _check_attention(config: RunConfig, model: PreTrainedModel) -> None:
    """Raise EloError where an attention that is asked for by name cannot be had; `model` is on the meta device."""

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
