"""What one exchange buys on real text: every silo's own model, their simple average, RegMean, and what to compare with.

    python benchmarks/accuracy hwu64 --data PATH/TO/SETS
    python benchmarks/accuracy mrpc stsb emotion ner tasks rounds --data PATH/TO/SETS --seeds 1
    python benchmarks/accuracy desk

A set is a folder with train, validation and test as JSON lines (.jsonl or .jsonl.gz). Results of each seed are kept in
--out and not made again, so an interrupted benchmark goes on where it stopped. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from results import measured, table
from settings import SETTINGS


def main() -> None:
    """Run experiments and print their tables."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, it ends what runs below
    parser = argparse.ArgumentParser(
        prog="accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", choices=SETTINGS, metavar="EXPERIMENT", help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, help="folder of the sets (not needed for desk)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--secure", action="store_true", help="under secure aggregation, and nothing to compare with")
    options = parser.parse_args()
    if options.data is None and options.experiments != ["desk"]:
        parser.error("these experiments need --data")
    for name in options.experiments:
        results = []
        for seed in options.seeds:
            print(f"{name}, seed {seed}", file=sys.stderr)
            setting = SETTINGS[name](options.data, seed)
            results.append(measured(name, setting, seed, options.out, secure=options.secure))
        print(table(results) + "\n")


if __name__ == "__main__":
    main()
