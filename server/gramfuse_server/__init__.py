"""What runs at the coordinator.

Those who have their own Flower ServerApp, or no Flower at all, need only what stands here; docs/api.md describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gramfuse_protocol.statistics_file import read_statistics
    from gramfuse_server.accumulator import Merged
    from gramfuse_server.merging import merge
    from gramfuse_server.model import add_differences
    from gramfuse_server.strategy import RegMean

__all__ = ["Merged", "RegMean", "add_differences", "merge", "read_statistics"]

_HOMES = {
    "Merged": "gramfuse_server.accumulator",
    "RegMean": "gramfuse_server.strategy",
    "add_differences": "gramfuse_server.model",
    "merge": "gramfuse_server.merging",
    "read_statistics": "gramfuse_protocol.statistics_file",
}


def __getattr__(name: str) -> Any:
    # Flower takes a second to load, and merging without it need not wait.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
