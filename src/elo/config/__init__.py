"""The configuration of a run or a comparison."""

from elo.config.chat import ChatConfig
from elo.config.comparison import Budget, CompareConfig, Contestant
from elo.config.load import contestant_run, load_chat, load_comparison, load_config, load_measures
from elo.config.schema import CorpusConfig, DataConfig, EvaluationConfig, RunConfig

__all__ = [
    "Budget",
    "ChatConfig",
    "CompareConfig",
    "Contestant",
    "CorpusConfig",
    "DataConfig",
    "EvaluationConfig",
    "RunConfig",
    "contestant_run",
    "load_chat",
    "load_comparison",
    "load_config",
    "load_measures",
]
