"""What runs at a silo.

Those who have their own training need only what stands here; docs/api.md describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gramfuse_client.records import statistics_record
    from gramfuse_client.statistics import collect_statistics
    from gramfuse_protocol.statistics_file import write_statistics

__all__ = ["collect_statistics", "statistics_record", "write_statistics"]

_HOMES = {
    "collect_statistics": "gramfuse_client.statistics",
    "statistics_record": "gramfuse_client.records",
    "write_statistics": "gramfuse_protocol.statistics_file",
}


def __getattr__(name: str) -> Any:
    # Flower starts a new process for every message, and most phases need no torch: it is imported where it is used.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
