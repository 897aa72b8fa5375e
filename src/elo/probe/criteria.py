"""Register all criteria: importing this module imports every criterion's file in the package."""

import importlib
import pkgutil

import elo.probe
from elo.probe.base import CRITERIA, Criterion

_NOT_CRITERIA = {"base", "chart", "choice", "criteria", "in_run", "probe", "text"}

for _module in pkgutil.iter_modules(elo.probe.__path__):
    if _module.name not in _NOT_CRITERIA:
        importlib.import_module(f"elo.probe.{_module.name}")

__all__ = ["CRITERIA", "Criterion"]
