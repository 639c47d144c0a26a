"""What runs at the coordinator.

Those who have their own Flower ServerApp need only `RegMean`.
"""

from gramfuse_server.strategy import RegMean

__all__ = ["RegMean"]
