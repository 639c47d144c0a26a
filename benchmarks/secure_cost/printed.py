"""The tables that are printed, and which targets are missed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

from meter import Figures

WORKS = ("silo", "coordinator, all there", "coordinator, one dead")
FASTER = 5.0
MEMORY = 1.3
MASKS_GB = 1.5
BYTES = 8 * 1.01


def machine() -> str:
    """Say what this runs on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = info.partition("model name")[2].partition("\n")[0].strip(" :\t") or platform.machine()
    memory, load = psutil.virtual_memory().total / 2**30, os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cryptography", "flwr"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, load {load:.1f} at the start; "
        f"Python {platform.python_version()}, {packages}"
    )


def tables(results: Figures) -> str:
    """Return the Markdown text."""
    elements, fewer, parts = results["elements"], results["flower_elements"], results["parts"]
    note = "" if fewer == elements else f" Flower was measured with {fewer:,} elements, as memory is short, and scaled."
    speeds = (
        f"On one core, into reused buffers: encoding {parts['encode GB/s']:.2f} GB/s, {parts['encode ns']:.2f} ns "
        f"per element; {parts['masks']} masks {parts['masks GB/s']:.2f} GB/s each, together {parts['mask ns']:.2f} ns."
    )
    text = [
        f"A contribution of {elements:,} elements ({8 * elements / 1e6:,.0f} MB), {results['silos']} silos, "
        f"fastest of {len(results['rounds'])}.{note}",
        f"{results['machine']}.\n",
        "| work | s per 100 M elements | CPU s per 100 M | ns per element | memory grew by | contributions | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    text += rows("silo without disk: gramfuse", results["silo without disk"], elements)
    for name in WORKS:
        text += rows(f"{name}: gramfuse", results[name], elements)
        text += rows(f"{name}: Flower SecAgg+", results[f"flower {name}"], fewer)
    text += [
        f"\n{speeds}\n",
        "| target | measured | asked for | |",
        "|---|---|---|---|",
        *judgements(results),
    ]
    return "\n".join(text)


def rows(name: str, figures: Figures, size: int) -> Iterator[str]:
    """Yield the row of a work and those of its steps."""
    grown, peak = figures["grown"], figures["peak"]
    memory = f"{grown / 1e6:,.0f} MB | {grown / (8 * size):.2f} | {peak / 1e6:,.0f} MB"
    for what, of, rest in [(f"**{name}**", figures, memory), *((n, f, "| |") for n, f in figures["steps"].items())]:
        wall, cpu = of["wall"] / size, of["cpu"] / size
        yield f"| {what} | {wall * 1e8:.2f} | {cpu * 1e8:.2f} | {wall * 1e9:.2f} | {rest} |"


def judgements(results: Figures) -> Iterator[str]:
    """Yield a row for each target, with MISSED where it is missed."""
    elements, fewer, gigabytes = results["elements"], results["flower_elements"], results["parts"]["masks GB/s"]

    def ratio(name: str, key: str, of: Figures) -> float:
        """Return Flower's figure, per element, over ours."""
        return float(results[f"flower {name}"][key] / fewer / (of[key] / elements))

    def row(what: str, measured: str, asked: str, met: bool) -> str:
        return f"| {what} | {measured} | {asked} | {'met' if met else 'MISSED'} |"

    for what, of in (
        ("silo, whole work", results["silo"]),
        ("silo, without the disk, which Flower does not use", results["silo without disk"]),
    ):
        for key, unit in (("wall", "seconds"), ("cpu", "CPU seconds")):
            found = ratio("silo", key, of)
            yield row(f"{what}: {unit} of Flower over ours", f"{found:.1f}", f"≥ {FASTER:g}", found >= FASTER)
    for name in WORKS:
        grown, times = results[name]["grown"] / (8 * elements), ratio(name, "grown", results[name])
        measured = f"{grown:.2f} (Flower takes {times:.1f} times ours)"
        yield row(f"{name}: memory in contributions", measured, f"≤ {MEMORY:g}", grown <= MEMORY)
    yield row("masks made and added, GB/s per core", f"{gigabytes:.2f}", f"≥ {MASKS_GB:g}", gigabytes >= MASKS_GB)
    each, theirs = results["silo"]["bytes"] / elements, results["flower silo"]["bytes"] / fewer
    yield row("bytes per element", f"{each:.5f} (Flower: {theirs:.5f})", f"≤ {BYTES:g}", 8 <= each <= BYTES)
