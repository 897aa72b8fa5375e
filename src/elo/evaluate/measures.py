"""Every measure: importing this module imports all files of the package, which register their measures."""

import importlib
import pkgutil

import elo.evaluate
from elo.evaluate.base import MEASURES, Measure

for _module in pkgutil.iter_modules(elo.evaluate.__path__):
    if _module.name != __name__.rsplit(".", 1)[-1]:
        importlib.import_module(f"elo.evaluate.{_module.name}")

__all__ = ["MEASURES", "Measure"]
