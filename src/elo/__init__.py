"""ELO: teach an existing Hugging Face causal LM a new language by training a few detached layers.

Every verb of the command line is a function here; `detach_layers` and `attach_layers` work on models in memory.
"""

import importlib
from typing import TYPE_CHECKING, Any

from elo.errors import EloError

if TYPE_CHECKING:
    from elo.model.surgery import attach_layers, detach_layers
    from elo.recipes.chat_vector import chat_vector
    from elo.recipes.compare import compare
    from elo.recipes.evaluate import evaluate
    from elo.recipes.plan import plan
    from elo.recipes.prepare import prepare
    from elo.recipes.report import report
    from elo.recipes.run import run
    from elo.recipes.surgery import attach, detach
    from elo.recipes.vocab import extend_vocabulary, measure_vocabulary

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
    "attach": "elo.recipes.surgery",
    "attach_layers": "elo.model.surgery",
    "chat_vector": "elo.recipes.chat_vector",
    "compare": "elo.recipes.compare",
    "detach": "elo.recipes.surgery",
    "detach_layers": "elo.model.surgery",
    "evaluate": "elo.recipes.evaluate",
    "extend_vocabulary": "elo.recipes.vocab",
    "measure_vocabulary": "elo.recipes.vocab",
    "plan": "elo.recipes.plan",
    "prepare": "elo.recipes.prepare",
    "report": "elo.recipes.report",
    "run": "elo.recipes.run",
}


def __getattr__(name: str) -> Any:
    """Import late: `import elo` takes milliseconds, torch seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
