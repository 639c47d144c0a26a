"""The process that ends a supervisor's processes if the supervisor itself was killed and cannot.

Its standard input is a pipe that only the supervisor writes to: the process id of each session that it starts, a line
each. The pipe's end is the supervisor's end, however that came about. Called with the supervisor's mark.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import psutil

from gramfuse_deployment.processes import end


def main() -> None:
    """Wait for the supervisor's end, then end what is left."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    leaders = []
    for line in sys.stdin:
        with suppress(psutil.NoSuchProcess):
            leaders.append(psutil.Process(int(line)))  # which is never mistaken for a later process of the same number
    end([leader for leader in leaders if leader.is_running()], sys.argv[1])


if __name__ == "__main__":
    main()
