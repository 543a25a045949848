"""Faster forms of what methods define, one file a method, registered per (adapter, base) when this package is imported."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
