"""Seconds and peak memory of a part of a process."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

Figures = dict[str, Any]


class Meter:
    """Seconds spent in its `with` blocks, and the process's peak memory when it was made and after the last block."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.before = self.peak = high_water()

    def __enter__(self) -> Meter:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]
        self.peak = high_water()


def together(steps: Mapping[str, Meter]) -> Figures:
    """Return the figures of steps that are one work; the meters were made before the first."""
    before, peak = min(m.before for m in steps.values()), max(m.peak for m in steps.values())
    return {
        "wall": sum(m.wall for m in steps.values()),
        "cpu": sum(m.cpu for m in steps.values()),
        "grown": peak - before,
        "peak": peak,
        "steps": {name: {"wall": m.wall, "cpu": m.cpu} for name, m in steps.items()},
    }


def high_water() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
