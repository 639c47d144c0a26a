"""Measures the accuracy of one exchange on real text: silos' own models, RegMean, and alternatives.

    python benchmarks/accuracy glue --data PATH/TO/SETS --seeds 1 2 3 4 5
    python benchmarks/accuracy emotion ner sent intents skew tasks generation desk --data PATH/TO/SETS
    python benchmarks/accuracy hwu64 --data hf:OWNER --base distilbert/distilbert-base-uncased

A name is a table or one of its experiments. A set is a folder with train, validation and test as JSON lines (.jsonl or
.jsonl.gz), or a data set of the Hugging Face hub. Results are kept as JSON in --out, and trained silos in --cache, so
an interrupted benchmark continues where it stopped. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from jobs import Job, run_jobs
from settings import EXPERIMENTS, PARTS, TABLES
from tables import insert, table


def main() -> None:
    """Run experiments and print their tables."""
    parser = argparse.ArgumentParser(
        prog="accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {**{name: (name,) for name in EXPERIMENTS}, **TABLES}
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--data", default="", help="folder of the sets, or hf:OWNER (not needed for desk)")
    parser.add_argument("--base", help="base model: hub id or directory  [default: MiniLM-L6]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="directory for results")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"), help="directory for trained silos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="parallel experiments  [default: number of cores]"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the plan")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=PARTS, metavar="PART", help=f"leave out {', '.join(PARTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test: an eighth of the rows and few epochs")
    parser.add_argument("--into", type=Path, help="write tables between their markers in this Markdown document")
    parser.add_argument("--print", action="store_true", help="print tables of existing results, without measuring")
    options = parser.parse_args()
    chosen = list(dict.fromkeys(experiment for name in options.names for experiment in names[name]))
    if not options.data and chosen != ["desk"] and not options.print:
        parser.error("these experiments need --data")
    jobs = [
        Job(
            name,
            seed,
            options.data,
            options.base,
            options.out,
            options.cache,
            options.quick,
            tuple(options.set),
            tuple(options.skip),
        )
        for seed in options.seeds
        for name in chosen
    ]
    if not options.print:
        run_jobs(jobs, options.jobs)
    for name in options.names:
        text = table(name, names[name], options.out)
        if options.into:
            insert(options.into, name, text)
        else:
            print(f"{text}\n")


if __name__ == "__main__":
    main()
