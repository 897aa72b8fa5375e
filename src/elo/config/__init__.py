"""The configuration of a run or a comparison."""

from elo.config.load import contestant_run, load_comparison, load_config
from elo.config.schema import Budget, CompareConfig, Contestant, CorpusConfig, DataConfig, EvaluationConfig, RunConfig

__all__ = [
    "Budget",
    "CompareConfig",
    "Contestant",
    "CorpusConfig",
    "DataConfig",
    "EvaluationConfig",
    "RunConfig",
    "contestant_run",
    "load_comparison",
    "load_config",
]
