"""What runs at a silo.

Those who have their own Flower ClientApp need only `collect_statistics` and `statistics_record`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gramfuse_client.records import statistics_record
    from gramfuse_client.statistics import collect_statistics

__all__ = ["collect_statistics", "statistics_record"]


def __getattr__(name: str) -> Any:
    # Flower starts a new process for every message, and most phases need no torch: it is imported where it is used.
    if name == "collect_statistics":
        from gramfuse_client.statistics import collect_statistics

        return collect_statistics
    if name == "statistics_record":
        from gramfuse_client.records import statistics_record

        return statistics_record
    raise AttributeError(name)
