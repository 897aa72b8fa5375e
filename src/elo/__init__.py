"""ELO: teach an existing Hugging Face causal LM a new language by training a few detached layers.

Every verb of the command line is a function here; `detach_layers` and `attach_layers` work on models in memory.
"""

import importlib
from typing import TYPE_CHECKING, Any

from elo.errors import EloError

if TYPE_CHECKING:
    from elo.chat.chat_vector import chat_vector
    from elo.compare import compare
    from elo.data.prepare import prepare
    from elo.evaluate.evaluate import evaluate
    from elo.plan.plan import plan
    from elo.report.write import report
    from elo.run import run
    from elo.surgery.detach_attach import attach, detach
    from elo.surgery.in_memory import attach_layers, detach_layers
    from elo.vocab.vocabulary import extend_vocabulary, measure_vocabulary

__version__ = "0.1.0"
__all__ = [
    "EloError",
    "attach",
    "attach_layers",
    "chat_vector",
    "compare",
    "detach",
    "detach_layers",
    "evaluate",
    "extend_vocabulary",
    "measure_vocabulary",
    "plan",
    "prepare",
    "report",
    "run",
]

_HOMES = {
    "attach": "elo.surgery.detach_attach",
    "attach_layers": "elo.surgery.in_memory",
    "chat_vector": "elo.chat.chat_vector",
    "compare": "elo.compare",
    "detach": "elo.surgery.detach_attach",
    "detach_layers": "elo.surgery.in_memory",
    "evaluate": "elo.evaluate.evaluate",
    "extend_vocabulary": "elo.vocab.vocabulary",
    "measure_vocabulary": "elo.vocab.vocabulary",
    "plan": "elo.plan.plan",
    "prepare": "elo.data.prepare",
    "report": "elo.report.write",
    "run": "elo.run",
}


def __getattr__(name: str) -> Any:
    """Import late: `import elo` takes milliseconds, torch seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
