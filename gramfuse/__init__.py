"""Merge language models that were fine-tuned in different data silos, in one exchange and without their data.

This is the public face: all names that are meant for other programs, from the packages that define them. Each is loaded
when it is first used, so `import gramfuse` loads neither torch nor Flower.

    >>> import gramfuse
    >>> issubclass(gramfuse.ModelError, gramfuse.GramfuseError)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gramfuse_client.measuring.collect import collect_statistics
    from gramfuse_client.measuring.flower_record import statistics_record
    from gramfuse_model.derive_layout import derive_layout
    from gramfuse_model.digests import config_digest, processor_digest, tensor_digests
    from gramfuse_model.parameters import add_differences, trainable
    from gramfuse_protocol.contract.layout import Layout
    from gramfuse_protocol.contract.plan_sections import Merge
    from gramfuse_protocol.contract.task import Task
    from gramfuse_protocol.errors import (
        ContributionError,
        GramfuseError,
        ModelError,
        PlanError,
        RunDirectoryError,
    )
    from gramfuse_protocol.statistics.about import About, AdapterOfFile, Added, AddedTokens, FrozenOfAdapter, Origin
    from gramfuse_protocol.statistics.contribution import Statistics
    from gramfuse_protocol.statistics.file import StatisticsFile, read_statistics, write_statistics
    from gramfuse_server.merging.accumulator import Merged
    from gramfuse_server.merging.regmean import merge
    from gramfuse_server.strategy import RegMean

    __version__: str

_HOMES = {
    "derive_layout": "gramfuse_model.derive_layout",
    "Layout": "gramfuse_protocol.contract.layout",
    "Merge": "gramfuse_protocol.contract.plan_sections",
    "trainable": "gramfuse_model.parameters",
    "collect_statistics": "gramfuse_client.measuring.collect",
    "Statistics": "gramfuse_protocol.statistics.contribution",
    "merge": "gramfuse_server.merging.regmean",
    "Merged": "gramfuse_server.merging.accumulator",
    "add_differences": "gramfuse_model.parameters",
    "statistics_record": "gramfuse_client.measuring.flower_record",
    "RegMean": "gramfuse_server.strategy",
    "write_statistics": "gramfuse_protocol.statistics.file",
    "read_statistics": "gramfuse_protocol.statistics.file",
    "StatisticsFile": "gramfuse_protocol.statistics.file",
    "About": "gramfuse_protocol.statistics.about",
    "AddedTokens": "gramfuse_protocol.statistics.about",
    "AdapterOfFile": "gramfuse_protocol.statistics.about",
    "FrozenOfAdapter": "gramfuse_protocol.statistics.about",
    "Added": "gramfuse_protocol.statistics.about",
    "Origin": "gramfuse_protocol.statistics.about",
    "Task": "gramfuse_protocol.contract.task",
    "tensor_digests": "gramfuse_model.digests",
    "config_digest": "gramfuse_model.digests",
    "processor_digest": "gramfuse_model.digests",
    "GramfuseError": "gramfuse_protocol.errors",
    "PlanError": "gramfuse_protocol.errors",
    "ModelError": "gramfuse_protocol.errors",
    "ContributionError": "gramfuse_protocol.errors",
    "RunDirectoryError": "gramfuse_protocol.errors",
}

__all__ = [
    "About",
    "AdapterOfFile",
    "Added",
    "AddedTokens",
    "ContributionError",
    "FrozenOfAdapter",
    "GramfuseError",
    "Layout",
    "Merge",
    "Merged",
    "ModelError",
    "Origin",
    "PlanError",
    "RegMean",
    "RunDirectoryError",
    "Statistics",
    "StatisticsFile",
    "Task",
    "__version__",
    "add_differences",
    "collect_statistics",
    "config_digest",
    "derive_layout",
    "merge",
    "processor_digest",
    "read_statistics",
    "statistics_record",
    "tensor_digests",
    "trainable",
    "write_statistics",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("gramfuse")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gramfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
