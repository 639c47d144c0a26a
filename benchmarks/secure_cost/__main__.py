"""Cost of a secure sum: seconds, memory and bytes at a silo and at the coordinator, next to Flower's own SecAgg+.

    python benchmarks/secure_cost
    python benchmarks/secure_cost --elements 2000000 --silos 5 --out cost.json

The layout is a BERT-like encoder's with full Gram blocks up to 3072 wide, and as many layers as fit; a plain tensor
takes the rest. Its values are random and there before the clock starts (every block is a view of one random array), so
making them costs nothing; making the scales counts. Every measurement is a process of its own. Memory is what its peak
resident size (ru_maxrss) grew by over the measured part; the absolute peak, with interpreter, torch and Flower loaded,
is given too. Seconds are those of the fastest round, on both sides; memory is the largest of all rounds.

What counts as a silo's work, from the plain values to what is handed to the transport:

* gramfuse: keys, shares, masks; scales, encode, mask, write with fsync; read back, pack and serialize each piece.
* Flower: the functions of its client mod in their order, from serialized float32 parameters to serialized integers.
  It writes nothing to disk. So gramfuse's work is given once more as far as the masked words, which are then dropped.

At the coordinator: from the spooled vectors (Flower: the replies in memory, where its workflow keeps all of them) to
the decoded sum, with all silos there and with one dead. Neither side counts the network. Linux only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from flower import flower_coordinator, flower_silo
from meter import Figures
from ours import coordinator, parts, silo
from printed import WORKS, machine, tables

FLOWER_FEWER = 10_000_000


def main() -> None:
    """Measure, print two Markdown tables, and say which targets are missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000, help="of one silo's contribution")
    parser.add_argument("--silos", type=int, default=5, help="of the cohort; four at least, so that one may be dead")
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    parser.add_argument("--rounds", type=int, default=3, help="of everything; the fastest counts, on both sides")
    options = parser.parse_args()
    if options.elements < 1000 or options.silos < 4 or options.rounds < 1:
        parser.error("it takes 1000 elements, 4 silos and one round at least")
    fewer = options.elements if fits_flower(options.elements, options.silos) else min(options.elements, FLOWER_FEWER)
    results: Figures = {
        "elements": options.elements,
        "flower_elements": fewer,
        "silos": options.silos,
        "machine": machine(),
        "rounds": [measure(options.elements, fewer, options.silos) for _ in range(options.rounds)],
    }
    results |= fastest(results["rounds"])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(tables(results))


def measure(elements: int, fewer: int, silos: int) -> Figures:
    """Run every measurement once, each in a fresh process; Flower's with `fewer` elements."""
    results: Figures = {}
    results["parts"] = alone(parts, elements, silos)
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as folder:
        results["silo without disk"] = alone(partial(silo, disk=False), elements, silos, Path(folder))
        results["silo"] = alone(silo, elements, silos, Path(folder))
        for dead, name in enumerate(WORKS[1:]):
            results[name] = alone(coordinator, elements, silos, dead, Path(folder))
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as folder:
        results["flower silo"], public = alone(flower_silo, fewer, silos, Path(folder))
        for dead, name in enumerate(WORKS[1:]):
            results[f"flower {name}"] = alone(flower_coordinator, fewer, silos, dead, Path(folder), public)
    return results


def fastest(rounds: Sequence[Figures]) -> Figures:
    """Return each work's fastest round with the largest memory of all rounds, and the speeds of the parts."""
    results: Figures = {"parts": min((one["parts"] for one in rounds), key=lambda parts: parts["encode ns"])}
    for name in rounds[0].keys() - {"parts"}:
        found = min((one[name] for one in rounds), key=lambda figures: float(figures["wall"]))
        results[name] = {**found, **{key: max(one[name][key] for one in rounds) for key in ("grown", "peak")}}
    return results


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fits_flower(elements: int, silos: int) -> bool:
    """Whether Flower's coordinator has room: all replies, and three vectors more, all in int64."""
    return bool(psutil.virtual_memory().available > 1.25 * 8 * (silos + 3) * elements)


if __name__ == "__main__":
    main()
