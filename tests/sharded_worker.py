"""`elo` with FSDP2 on CPUs: accelerate engages it on accelerators alone, while PyTorch's own runs on gloo as well.

With ELO_TEST_DIE_AT=STAGE:STEP all processes die right after that step's checkpoint is sealed. What is frozen stays in
the dtype it is stored in, as on a GPU, with ELO_TEST_FROZEN_AS_STORED=1. Under FSDP a process other than the main one
that reads weights for training is an error.
"""

import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from elo.cli import main as main
from elo.store.processes import is_main
from elo.train import loop
from elo.train import phase as train

_init, _save, _load = AcceleratorState.__init__, loop.write_checkpoint, train.load_model
_load_trainable = train.load_trainable


def _engage(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def _save_and_die(accelerator: Any, folder: Path, step: int, *arguments: Any) -> None:
    _save(accelerator, folder, step, *arguments)
    if os.environ.get("ELO_TEST_DIE_AT") == f"{folder.name.removesuffix('-checkpoints')}:{step}":
        os._exit(9)


_reads = 0


def _count_and_load(*arguments: Any, **keywords: Any) -> Any:
    global _reads
    _reads += 1
    return _load(*arguments, **keywords)


def _load_in_main_alone(checkpoint: Any, settings: Any, **keywords: Any) -> Any:
    before = _reads
    loaded = _load_trainable(checkpoint, settings, **keywords)
    assert is_main() or not settings.training_arguments.get("fsdp") or _reads == before, "another process reads weights"
    return loaded


AcceleratorState.__init__ = _engage  # type: ignore[method-assign]
loop.write_checkpoint = _save_and_die
train.load_model = _count_and_load
train.load_trainable = _load_in_main_alone
if os.environ.get("ELO_TEST_FROZEN_AS_STORED"):
    train.keeps_frozen_as_stored = lambda *_: True
