"""The kinds of task at a silo: one file each.

A new kind is a new file here, one in `gramfuse_protocol.tasks`, and its model class in
`gramfuse_model.loading.auto_classes`; `gramfuse_client.tasks.registry` shows what stands in the first.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
