"""Time the micro-steps and updates of a phase on this machine, by training a model with random weights."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from elo.checkpoint.layers import gaps_between
from elo.checkpoint.model_config import text_config_of
from elo.checkpoint.new_rows import VOCABULARY_KEY, record_of, share_record
from elo.config import RunConfig
from elo.errors import EloError, StoppedBySignalError
from elo.methods import Method, Phase, Setup
from elo.plan.phase import Machine, Model, Timing, timing_key
from elo.plan.schema import MethodPlan
from elo.surgery.layer_config import with_layers
from elo.train.arguments import wants_bf16
from elo.train.bridge import Bridge
from elo.train.loop import train
from elo.train.peak_memory import reset_peak_memory
from elo.train.prepared import Prepared
from elo.train.settings import TrainingSettings

_UPDATES = 3
"""Number of updates to train. The first one is a warmup, and the fastest of the others counts."""


class _Sequences(Dataset[dict[str, np.ndarray]]):
    """Sequences [R, T] of one document each."""

    def __init__(self, ids_RT: np.ndarray, packing: bool) -> None:
        self.ids_RT, self.packing = ids_RT, packing

    def __len__(self) -> int:
        return len(self.ids_RT)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids_T = self.ids_RT[index]
        row = {"input_ids": ids_T, "shift_labels": ids_T, "position_ids": np.arange(len(ids_T))}
        return row if self.packing else row | {"attention_mask": np.ones_like(ids_T)}


def measure_phases(
    model: Model, machine: Machine, layers: Sequence[int], runs: Sequence[RunConfig], plans: Sequence[MethodPlan]
) -> Machine:
    """Return this machine with the measured times of every phase that one device can train.

    Its `training_flops` is the mean rate of these phases, which serves to estimate the others.

    Args:
        model: model to train.
        machine: this machine, without times.
        layers: decoder layers that the configuration selects.
        runs: configurations of the run and its baselines.
        plans: plans of `runs`, without measured times.

    Raises:
        EloError: no phase can be measured.
    """
    timings: dict[Any, Timing] = {}
    flops = seconds = 0.0
    for run, planned in zip(runs, plans, strict=True):
        for phase, planned_phase in zip(run.method.phases, planned.phases, strict=True):
            settings = run.settings(phase)
            if settings.divides_model or not planned_phase.fits:
                continue
            timing = _measure(model, run, phase, layers, settings)
            timings[timing_key(run.method, phase, settings)] = timing
            flops += (
                planned_phase.flops_per_token.total * settings.per_device_train_batch_size * run.data.sequence_length
            )
            seconds += timing.micro_step
    if not timings:
        raise EloError(
            "measure: no phase fits into one device of this machine, so none can be measured; "
            "name a GPU with --device instead"
        )
    return replace(machine, training_flops=flops / seconds, timings=timings)


def _measure(model: Model, run: RunConfig, phase: Phase, layers: Sequence[int], settings: TrainingSettings) -> Timing:
    """Train a phase for a few updates of one or two micro-steps, whose size is that of the run."""
    length, tokens = run.data.sequence_length, settings.per_device_train_batch_size * run.data.sequence_length
    micro_steps = min(2, settings.tokens_per_step // tokens)
    changes = {"tokens_per_step": micro_steps * tokens, "evaluations": 0, "report_to": "none"}
    reset_peak_memory()  # frees the memory of the previous phase
    with torch.random.fork_rng():
        network, prepared = _random_model(model, run.method, phase, layers, settings)
        vocab_size = text_config_of(network.config).vocab_size
        shape = _UPDATES * micro_steps * settings.per_device_train_batch_size, length
        ids_RT = np.random.default_rng(0).integers(0, vocab_size, size=shape)
        times: list[float] = []

        def note(*_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        network.register_forward_pre_hook(note)
        try:
            train(
                network,
                _Sequences(ids_RT, run.data.packing),
                settings=settings.model_copy(update=changes),
                output_dir=None,
                seed=run.seed,
                prepared=prepared,
                label=f"measure {run.method.label}, {phase.name}",
            )
        except StoppedBySignalError:  # its message names a checkpoint, but none was written
            raise KeyboardInterrupt from None
        note()
    spans = [end - start for start, end in pairwise(times[-_UPDATES * micro_steps - 1 :])][micro_steps:]
    return Timing(min(spans[::micro_steps]), min(spans[micro_steps - 1 :: micro_steps]))


def _random_model(
    model: Model, method: Method, phase: Phase, layers: Sequence[int], settings: TrainingSettings
) -> tuple[PreTrainedModel, Prepared]:
    """Build a model of the phase's shape with random weights, on the GPU if there is one."""
    whole = text_config_of(model.config)
    config = with_layers(whole, layers) if phase.detached else copy.deepcopy(whole)
    share_record(model.config, config)
    if settings.vocabulary == "corpus":
        config.vocab_size, config.pad_token_id = model.vocabulary_rows, None
        if record_of(config) is not None:  # it is not known which of the rows are new
            setattr(config, VOCABULARY_KEY, {"rows": {"start": 1, "stop": model.vocabulary_rows}})
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        dtype = torch.bfloat16 if gpu and wants_bf16(settings) else torch.float32
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        bridge = None
        if phase.middle == "bridged":
            gaps, width = tuple(gaps_between(layers, model.whole.num_layers)), model.whole.hidden_size
            maps, biases = tuple(torch.zeros(width, width) for _ in gaps), tuple(torch.zeros(width) for _ in gaps)
            bridge = Bridge(gaps, maps, biases, explained=())
    prepared = method.prepare(network, phase, Setup(layers, bridge))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network, prepared
