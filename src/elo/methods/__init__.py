"""Adaptation methods, one file each; see `elo.methods.base`."""

import importlib
import pkgutil

from elo.methods.base import METHODS, Method, Phase, Setup, section_of_name

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "Phase", "Setup", "section_of_name"]
