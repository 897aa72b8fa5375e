"""What is wrong with a run is told before anything is prepared, loaded or hired; weights are not read."""

from pathlib import Path
from typing import TYPE_CHECKING

from elo.config import RunConfig
from elo.errors import EloError
from elo.layers import parse_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elo.training.methods import Method


def check_inputs(config: RunConfig) -> None:
    """Find what is missing before anything is loaded."""
    from elo.evaluation.cloze import read_cloze
    from elo.training.loop import check_settings

    for section in _sections(config):
        check_settings(getattr(config, section), config.data.sequence_length, section)
    for method in methods_of(config):
        method.check()
    output = Path(config.output)
    if output.is_dir() and any(output.iterdir()) and not (output / "stages").is_dir():
        raise EloError(f"output: {output}: the folder holds other things than a run of ELO's; choose another")
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


def methods_of(config: RunConfig) -> "list[Method]":
    """The run's own method and its controls."""
    from elo.training.methods import Options, find_method

    options = Options(config.elo, config.lora, config.lisa)
    return [find_method(name, options) for name in (config.method, *config.controls)]


def check_model(config: RunConfig, base: Path) -> tuple[int, ...]:
    """The layers to train, once the model is known to take them, the rows and their length; weights are not read."""
    from elo.evaluation.scoring import longest_sequence, takes_position_ids
    from elo.model.architecture import find_architecture, is_recurrent
    from elo.model.counting import build_on_meta, read_config
    from elo.model.refusals import require_detachable
    from elo.model.tensor_files import open_checkpoint
    from elo.training.attention import require_own_positions
    from elo.training.methods import first_new_row
    from elo.training.settings import check_also_train

    open_checkpoint(base)
    model_config = read_config(str(base), trust_remote_code=config.trust_remote_code)
    if any(phase.detached for method in methods_of(config) for phase in method.phases):
        require_detachable(model_config)
    model = build_on_meta(model_config, trust_remote_code=config.trust_remote_code)
    _check_attention(config, model)
    layers = parse_layers(config.layers, find_architecture(model).num_layers)
    bridged = any(phase.needs_bridge for method in methods_of(config) for phase in method.phases)
    if bridged and len(layers) == find_architecture(model).num_layers:
        raise EloError(
            f"layers: {config.layers!r} leaves out no layer, so there is nothing for elo.stand_in to replace"
        )
    for method in methods_of(config):
        check_also_train(method.also_train, tied=find_architecture(model).tied)
    if any(method.needs_new_rows for method in methods_of(config)):
        first_new_row(model)
    length, limit = config.data.sequence_length, longest_sequence(model)
    if limit is not None and length > limit:
        raise EloError(f"data.sequence_length: {length} is beyond the {limit} positions of {config.model}")
    for section in _sections(config):
        batch_size = getattr(config, section).per_device_train_batch_size
        require_own_positions(model_config, length, packed=config.data.packing, batch_size=batch_size, section=section)
    if config.data.packing and (is_recurrent(model) or not takes_position_ids(model)):
        raise EloError(
            f"data.packing: {model_config.model_type} does not keep packed documents apart (it has layers other than "
            "attention, or takes no position ids); write data.packing: false"
        )
    return layers


def _sections(config: RunConfig) -> list[str]:
    """Sections of the configuration whose training settings this run uses."""
    return sorted({phase.settings for method in methods_of(config) for phase in method.phases})


def _check_attention(config: RunConfig, model: "PreTrainedModel") -> None:
    """Raise EloError where an attention that is asked for by name cannot be had; `model` is on the meta device."""
    from elo.training.attention import VARLEN

    for section in _sections(config):
        name = getattr(config, section).attn_implementation
        if name in ("auto", VARLEN):
            continue
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError, OSError) as error:
            raise EloError(
                f"{section}.attn_implementation: this model cannot use {name!r} here "
                f"({' '.join(str(error).split())[:300]}); write auto, sdpa or eager"
            ) from None
