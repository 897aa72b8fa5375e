"""The commands of `elo` as functions, and layer surgery on models in memory.

    from elo.api import run, detach, detach_layers

Names in `__all__` are stable: CHANGELOG.md notes every change to them.
"""

from elo.chat.chat_vector import chat_vector
from elo.compare import compare
from elo.data.prepare import prepare
from elo.evaluate.evaluate import evaluate
from elo.generate import generate
from elo.plan.plan import plan
from elo.report.write import report
from elo.run import run
from elo.surgery.detach_attach import attach, detach
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.vocab.vocabulary import extend_vocabulary, measure_vocabulary

__all__ = [
    "attach",
    "attach_layers",
    "chat_vector",
    "compare",
    "detach",
    "detach_layers",
    "evaluate",
    "extend_vocabulary",
    "generate",
    "measure_vocabulary",
    "plan",
    "prepare",
    "report",
    "run",
]
