"""Methods of merging silos' models, other than RegMean: one file each.

To add a method, add a file here; `gramfuse_server.merging.methods.registry` has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
