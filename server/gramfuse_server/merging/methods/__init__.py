"""The ways to put silos' models together, other than RegMean: one file each.

A new one is a new file here, and nothing else; `gramfuse_server.merging.methods.registry` shows what stands in it.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
