"""The silo's part of each kind of task, one file each.

To add a kind, add a file here, one in `gramfuse_protocol.tasks`, and its model class in
`gramfuse_model.loading.auto_classes`. `gramfuse_client.tasks.registry` describes the file here.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
