"""The kinds of task, one file each.

A new kind needs a file here, a file in `gramfuse_client.tasks`, and its model class in
`gramfuse_model.loading.auto_classes`. `gramfuse_protocol.tasks.registry` shows an example of the first.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
