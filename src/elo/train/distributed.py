"""Support FSDP and DeepSpeed: check settings, and gather sharded weights one part of a model at a time."""

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from elo.checkpoint.architecture import find_architecture
from elo.checkpoint.reading import auto_class
from elo.errors import EloError
from elo.store.processes import world_size
from elo.train.settings import TrainingSettings

_NAMES = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
_AUTO_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Keys of DeepSpeed's configuration that ELO's settings determine."""
_LAUNCH_VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED")
"""Environment variables that transformers and accelerate set."""


def sharding_arguments(given: dict[str, Any], *, main_alone: bool) -> dict[str, Any]:
    """Return `training_arguments` with the FSDP and DeepSpeed settings that ELO controls.

    Args:
        given: `training_arguments` of the configuration.
        main_alone: whether only the main process has the weights and sends the others their shards.

    Raises:
        EloError: `fsdp_config` is not a mapping.
    """
    if given.get("deepspeed"):
        filled = dict.fromkeys(_AUTO_KEYS, "auto") | HfDeepSpeedConfig(given["deepspeed"]).config
        given = {**given, "deepspeed": filled}
    if not given.get("fsdp"):
        return given
    config = given.get("fsdp_config") or {}
    if not isinstance(config, dict):
        raise EloError(f"training_arguments.fsdp_config: got {config!r}; write a mapping of keys to values")
    ours = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": main_alone}
    return {**given, "fsdp_config": {**config, **ours}}


def main_alone_loads(settings: TrainingSettings, model: nn.Module) -> bool:
    """Return whether only the main process reads the weights.

    This is so under FSDP if the model saves no buffers, because accelerate sends parameters but no buffers.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return bool(settings.training_arguments.get("fsdp")) and model.state_dict().keys() <= parameters


def without_weights(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Return the causal language model of `config` on the CPU, with its buffers and with uninitialised parameters."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.tie_weights()
    return model.eval()


@contextmanager
def launch_kept() -> Iterator[None]:
    """Restore the process-wide settings of FSDP and DeepSpeed on exit, so that later phases do not inherit them.

    With ZeRO-3 still enabled, a single process could not load a model.
    """
    before = {name: os.environ.get(name) for name in _LAUNCH_VARIABLES}
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def set_precision(arguments: TrainingArguments) -> None:
    """Set FSDP to the precision of DDP: matrix products in bf16, gradient sums and the loss in fp32."""
    if arguments.fsdp and arguments.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy


def check_fsdp(settings: TrainingSettings) -> None:
    """Raise EloError if FSDP does not support the settings of a phase, which `sharding_arguments` has accepted."""
    given = settings.training_arguments
    if not given.get("fsdp"):
        return
    keys = {str(key).removeprefix("fsdp_"): value for key, value in (given.get("fsdp_config") or {}).items()}
    if str(keys.get("version", 2)) != "2":
        raise EloError(
            f"training_arguments.fsdp_config.version: got {keys['version']!r}; only FSDP2 is supported, write 2"
        )
    if "state_dict_type" in keys:
        raise EloError("training_arguments.fsdp_config.state_dict_type: is set by ELO; remove it")
    if "cpu_ram_efficient_loading" in keys:
        raise EloError(
            "training_arguments.fsdp_config.cpu_ram_efficient_loading: is set by ELO where possible; remove it"
        )
    if keys.get("activation_checkpointing") and settings.activation_checkpointing:
        raise EloError("activation_checkpointing: is on here and in fsdp_config; remove it from fsdp_config")
    if settings.optim == "adamw_8bit":
        raise EloError("optim: adamw_8bit does not support weights sharded by FSDP; write adamw or adafactor")


def check_deepspeed(arguments: TrainingArguments) -> None:
    """Raise EloError if DeepSpeed's configuration contradicts the settings, or has an optimizer or a schedule."""
    if arguments.deepspeed_plugin is None:
        return
    if arguments.deepspeed_plugin.zero_stage == 0:
        raise EloError(
            "training_arguments.deepspeed.zero_optimization.stage: got 0, which shards nothing; write 1, 2 or 3, or "
            "remove deepspeed"
        )
    for key in ("optimizer", "scheduler"):
        if key in arguments.deepspeed_plugin.deepspeed_config:
            raise EloError(
                f"training_arguments.deepspeed.{key}: this section's optim and lr_scheduler_type set optimizer "
                "and schedule; remove it"
            )
    if differing := arguments.hf_deepspeed_config.mismatches:
        first = differing[0].removeprefix("- ds ")
        raise EloError(f"training_arguments.deepspeed: {first}: ELO sets it from its own settings; remove it")


def check_engaged(accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Raise EloError if accelerate does not shard the weights in the way that `training_arguments` ask for.

    Where accelerate cannot use FSDP or DeepSpeed, it falls back to plain data parallelism without a warning.
    """
    asked = next((name for name in _NAMES.values() if settings.training_arguments.get(name.lower())), None)
    now = _NAMES.get(accelerator.distributed_type)
    if now == "FSDP" and not accelerator.is_fsdp2:
        raise EloError("FSDP: the launcher sets version 1, but only FSDP2 is supported; set fsdp_version: 2")
    if now and not asked:
        raise EloError(
            f"{now}: only the launcher sets it; write it in this section's training_arguments "
            "(docs/launching.md), and launch with torchrun"
        )
    if asked and (asked != now or "RANK" not in os.environ):
        needed = {"FSDP": "several processes on GPUs", "DeepSpeed": "a launcher"}[asked]
        found = f"{accelerator.distributed_type.value} with {world_size()} process(es) on {accelerator.device.type}"
        raise EloError(
            f"training_arguments.{asked.lower()}: needs {needed}, but accelerate runs {found}; launch with "
            "torchrun --nproc_per_node N -m elo.cli run ..., or remove it"
        )


def accumulating(accelerator: Accelerator, model: Any, *, last: bool) -> AbstractContextManager[None]:
    """Return the context of a micro-step. Gradients are averaged over processes only in the last one of a step."""
    accelerator.sync_gradients = last
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # DeepSpeed reads sync_gradients
    return nullcontext() if last or by_deepspeed else accelerator.no_sync(model)


def check_resumable(accelerator: Accelerator, checkpoint: Path) -> None:
    """Raise EloError if `checkpoint` was written with other sharding, or with another number of DeepSpeed processes."""
    now = _NAMES.get(accelerator.distributed_type)
    anew = f"or remove {checkpoint.parent} to restart the phase"
    by_deepspeed = (checkpoint / "latest").is_file()
    was = "FSDP" if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() else "DeepSpeed" if by_deepspeed else None
    if was != now:
        written, running = (f"with {each}" if each else "without FSDP or DeepSpeed" for each in (was, now))
        raise EloError(f"{checkpoint}: was written {written}, and this run is {running}; launch it as before, {anew}")
    optimizer_states = list(checkpoint.glob("*/*_optim_states.pt"))
    if optimizer_states and len(optimizer_states) != world_size():
        raise EloError(
            f"{checkpoint}: was written by {len(optimizer_states)} processes, and DeepSpeed cannot resume it with "
            f"{world_size()}; launch {len(optimizer_states)}, {anew}"
        )


def divide_groups(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> list[nn.Parameter]:
    """Split the groups of an optimizer by parts of the model: each decoder layer, and each tensor outside the layers.

    DeepSpeed flattens the parameters of a group into one, so an update can leave out only whole groups.

    Returns:
        One parameter of each group, indexed by the group's key `number`.
    """
    prefix = find_architecture(model).layers_path + "."
    part_of = {id(each): _part_of(name, prefix) for name, each in model.named_parameters()}
    groups = [
        {**group, "params": list(parameters)}
        for group in optimizer.param_groups
        for _, parameters in itertools.groupby(group["params"], lambda each: part_of[id(each)])
    ]
    optimizer.param_groups[:] = [{**group, "number": number} for number, group in enumerate(groups)]
    return [group["params"][0] for group in groups]


def leave_out_frozen(optimizer: torch.optim.Optimizer, owners: list[nn.Parameter]) -> Callable[[nn.Parameter], None]:
    """Leave groups out of the updates of DeepSpeed's optimizer while their parameters require no gradient.

    Args:
        owners: one parameter of each group, from `divide_groups`.

    Returns:
        A function that drops the optimizer state of a parameter's group.
    """
    forgotten: set[int] = set()
    left_out: list[tuple[dict[str, Any], list[Tensor]]] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            owner = owners[group["number"]]
            for flat in group["params"] if id(owner) in forgotten else ():
                optimizer.state.pop(flat, None)
                forgotten.discard(id(owner))
            if not owner.requires_grad:
                left_out.append((group, group["params"]))
                group["params"] = []

    def after(*_: Any) -> None:
        for group, parameters in left_out:
            group["params"] = parameters
        left_out.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return lambda parameter: forgotten.add(id(parameter))


def whole_parts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Gather the model on the CPU part by part: each decoder layer, and each tensor outside the layers.

    Tied tensors appear once. The set of tensors is fixed when the function is called. Every process must exhaust the
    iterator, because gathering is collective.
    """
    prefix = find_architecture(model).layers_path + "."
    parts: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            parts.setdefault(_part_of(name, prefix), {})[name] = tensor
    return ({name: _whole(tensor) for name, tensor in part.items()} for part in parts.values())


def _part_of(name: str, prefix: str) -> str:
    """Return the name of the decoder layer that has a tensor, or the tensor's own name outside the layers.

    Outside the layers, a linear layer and its adapters are one part.
    """
    if name.startswith(prefix):
        return prefix + name.removeprefix(prefix).split(".")[0]
    return name.split(".base_layer.")[0].split(".lora_")[0]


def _whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):  # DeepSpeed's ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu")
