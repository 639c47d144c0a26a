"""Ends a supervisor's processes if the supervisor was killed and cannot do so itself.

The watchdog's only argument is the supervisor's mark. Its standard input is a pipe that only the supervisor writes to:
one line with the process id of each session that it starts. End of file means that the supervisor ended, for whatever
reason.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import psutil

from gramfuse_deployment.processes import end


def main() -> None:
    """Wait until the supervisor ends, then end its remaining processes."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    leaders = []
    for line in sys.stdin:
        with suppress(psutil.NoSuchProcess):
            leaders.append(psutil.Process(int(line)))  # psutil also compares start times, so a reused id does not match
    end([leader for leader in leaders if leader.is_running()], sys.argv[1])


if __name__ == "__main__":
    main()
