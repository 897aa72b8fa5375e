"""The commands of `elo` as functions, and layer surgery on models in memory.

    from elo.api import run, detach, detach_layers

Names in `__all__` are stable: CHANGELOG.md notes every change to them.
"""

from elo.chat.chat import chat
from elo.chat.chat_vector import chat_vector
from elo.compare import compare
from elo.data.prepare import prepare
from elo.detach_attach import attach, detach
from elo.evaluate.evaluate import evaluate
from elo.fewshot.fewshot import few_shot
from elo.fewshot.task import read_task
from elo.generate import generate
from elo.merge.merge import merge
from elo.plan.plan import plan
from elo.probe.probe import probe
from elo.push import push
from elo.report.write import report
from elo.run import run
from elo.surgery.in_memory import attach_layers, detach_layers
from elo.vocab.vocabulary import extend_vocabulary, measure_vocabulary
from elo.watch import watch

__all__ = [
    "attach",
    "attach_layers",
    "chat",
    "chat_vector",
    "compare",
    "detach",
    "detach_layers",
    "evaluate",
    "extend_vocabulary",
    "few_shot",
    "generate",
    "measure_vocabulary",
    "merge",
    "plan",
    "prepare",
    "probe",
    "push",
    "read_task",
    "report",
    "run",
    "watch",
]
