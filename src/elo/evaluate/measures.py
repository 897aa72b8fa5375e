"""Every measure: importing this module imports all files of the package, which register their measures."""

import importlib
import pkgutil

import elo.evaluate
from elo.evaluate.base import MEASURES, Measure

for _module in pkgutil.iter_modules(elo.evaluate.__path__):
    if _module.name != __name__.rsplit(".", 1)[-1]:
        importlib.import_module(f"elo.evaluate.{_module.name}")
# A measure may have been imported before; tables and docs list them in one order.
for _name in sorted(MEASURES):
    MEASURES[_name] = MEASURES.pop(_name)

__all__ = ["MEASURES", "Measure"]
