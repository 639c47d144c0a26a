"""What runs at a silo.

Those who have their own Flower ClientApp need only `collect_statistics` and `statistics_record`.
"""

from gramfuse_client.records import statistics_record
from gramfuse_client.statistics import collect_statistics

__all__ = ["collect_statistics", "statistics_record"]
