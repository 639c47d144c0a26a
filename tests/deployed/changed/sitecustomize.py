"""Python runs this at its start where it is on PYTHONPATH: it changes what a test cannot wait for, or cannot set.

CHANGED_CLOCK names a file with the seconds that the clock is ahead; CHANGED_HEARTBEAT is how often, in seconds, Flower
says that a process is alive. Flower takes it for dead after twice that, where it is a minute else. CHANGED_STUMBLE
names a file: the silo's worker that finds it fails as it is to get its message, and takes the file away.
"""

import datetime
import os
import sys
import time
from pathlib import Path


def set_clock(seconds: float) -> None:
    """Set the clock, as far as Python tells it."""
    right, real = time.time, datetime.datetime

    class Ahead(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: right() + seconds
    datetime.datetime = Ahead


def set_heartbeat(seconds: int) -> None:
    """Change one constant of Flower's, wherever it is known already."""
    import flwr.common.constant  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("flwr.") and hasattr(module, "HEARTBEAT_DEFAULT_INTERVAL"):
            module.HEARTBEAT_DEFAULT_INTERVAL = seconds


def stumble(file: Path) -> None:
    """Have a worker fail between its task and its message."""
    from flwr.supercore.runtime import RuntimeHttpClient

    right = RuntimeHttpClient.PullMessages

    def pull(self: RuntimeHttpClient, request: object) -> object:
        if file.exists():
            file.unlink()
            raise ConnectionError("a test has this worker fail")
        return right(self, request)

    RuntimeHttpClient.PullMessages = pull


if clock := os.environ.get("CHANGED_CLOCK"):
    set_clock(float(Path(clock).read_text()))
if heartbeat := os.environ.get("CHANGED_HEARTBEAT"):
    set_heartbeat(int(heartbeat))
if (file := os.environ.get("CHANGED_STUMBLE")) and any("gramfuse_client.worker" in part for part in sys.orig_argv):
    stumble(Path(file))
