"""What one exchange buys on real text: every silo's own model, their simple average, RegMean, joint training.

    python benchmarks/accuracy.py hwu64 --data PATH/TO/SETS
    python benchmarks/accuracy.py sent --data PATH/TO/SETS
    python benchmarks/accuracy.py desk

A set is a folder with train.jsonl.gz and test.jsonl.gz (columns text and label). Results of each seed are kept in
--out and not made again, so an interrupted benchmark goes on where it stopped. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Rows = list[dict[str, str]]

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "hwu64": {
        "title": "HWU64 intents, 4 silos × 750 requests, 85% of each intent at one silo, MiniLM-L6",
        "max-length": 32,
        "epochs": 5,
        "learning-rate": 2e-4,
    },
    "sent": {
        "title": "Amazon sentiment, 4 silos (books, dvd, electronics, kitchen) × 400 reviews, MiniLM-L6",
        "max-length": 64,
        "epochs": 3,
        "learning-rate": 2e-4,
    },
    "desk": {"title": "The demo: 4 front desks × about 315 messages, MiniLM-L6"},
}


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=SETTINGS)
    parser.add_argument("--data", type=Path, help="folder of the sets (not needed for desk)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--alpha", type=float, default=0.9)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        kept = options.out / f"{options.benchmark}-alpha{options.alpha}-seed{seed}.json"
        if not kept.exists():
            result = measure(options.benchmark, options.data, seed, options.alpha)
            temporary = kept.with_suffix(".partial")
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            temporary.replace(kept)
        results.append(json.loads(kept.read_text(encoding="utf-8")))
    print(table(options.benchmark, options.alpha, options.seeds, results))


def measure(benchmark: str, data: Path | None, seed: int, alpha: float) -> dict[str, Any]:
    """Simulate one exchange, and joint training as a plan with a single silo that has all data."""
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        silos = silos_of(benchmark, data, seed, Path(scratch))
        labels = sorted({row["label"] for train, _ in silos.values() for row in train})
        began = time.monotonic()
        report = simulate(write_project(Path(scratch) / "silos", benchmark, silos, labels, alpha), seed)
        seconds = time.monotonic() - began
        everyone = tuple([row for rows in silos.values() for row in rows[part]] for part in (0, 1))
        alone = write_project(Path(scratch) / "joint", benchmark, {"joint": everyone}, labels, alpha, secure=False)
        joint = simulate(alone, seed)
    models = [model for model in report["models"] if model["kind"] != "silo" or len(silos) > 1]
    models.append({**next(m for m in joint["models"] if m["kind"] == "silo"), "kind": "joint"})
    return {
        "seed": seed,
        "models": models,
        "bytes": {silo: sum(phases.values()) for silo, phases in report["bytes"].items()},
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def silos_of(benchmark: str, data: Path | None, seed: int, scratch: Path) -> dict[str, tuple[Rows, ...]]:
    """Return each silo's training and held-out rows."""
    rng = random.Random(seed)
    if benchmark == "desk":
        subprocess.run([gramfuse(), "init", str(scratch / "desk")], check=True, capture_output=True)
        folders = sorted((scratch / "desk" / "data").iterdir())
        return {f.name: (read(f / "train.jsonl"), read(f / "held-out.jsonl")) for f in folders}
    if data is None:
        sys.exit("this benchmark needs --data")
    if benchmark == "sent":
        return {
            domain: (
                rng.sample(read(data / f"sent_{domain}" / "train.jsonl.gz"), 400),
                rng.sample(read(data / f"sent_{domain}" / "test.jsonl.gz"), 200),
            )
            for domain in ("books", "dvd", "electronics", "kitchen")
        }
    train = rng.sample(read(data / "intent_hwu64" / "train.jsonl.gz"), 3000)
    test = read(data / "intent_hwu64" / "test.jsonl.gz")
    rng.shuffle(test)
    labels = sorted({row["label"] for row in train})
    rng.shuffle(labels)
    home = {label: index % 4 for index, label in enumerate(labels)}
    shares: list[Rows] = [[], [], [], []]
    for row in train:
        at = home[row["label"]]
        shares[at if rng.random() < 0.85 else rng.choice([s for s in range(4) if s != at])].append(row)
    return {f"silo-{n + 1}": (shares[n], test[n::4]) for n in range(4)}


def write_project(
    directory: Path,
    benchmark: str,
    silos: Mapping[str, tuple[Rows, ...]],
    labels: Sequence[str],
    alpha: float,
    *,
    secure: bool = True,
) -> Path:
    """Write a project; the training settings are the demo's where the benchmark names none.

    Args:
        secure: whether the coordinator sees sums only; if not, the silos allow open uploads.
    """
    subprocess.run([gramfuse(), "init", str(directory)], check=True, capture_output=True)
    plan = (directory / "plan.toml").read_text(encoding="utf-8").partition("[[silo]]")[0]
    lines = []
    for line in plan.splitlines():
        key = line.partition(" =")[0]
        own = {"labels": list(labels), "alpha": alpha, "secure-aggregation": secure, **SETTINGS[benchmark]}
        value = own.get(key)
        lines.append(line if value is None else f"{key} = {json.dumps(value)}")
    roster = "".join(f'\n[[silo]]\nname = "{name}"\n' for name in silos)
    (directory / "plan.toml").write_text("\n".join(lines) + "\n" + roster, encoding="utf-8")
    shutil.rmtree(directory / "data")
    template = (directory / "silos" / "bank.toml").read_text(encoding="utf-8")
    shutil.rmtree(directory / "silos")
    (directory / "silos").mkdir()
    for name, rows in silos.items():
        folder = directory / "data" / name
        folder.mkdir(parents=True)
        for part, content in zip(("train", "held-out"), rows, strict=True):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
            (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
        text = template.replace("bank", name)
        if not secure:
            text = text.replace("open-uploads = false", "open-uploads = true")
        if len(silos) == 1:
            text = text.replace("threads = 1", "threads = 0")
        (directory / "silos" / f"{name}.toml").write_text(text, encoding="utf-8")
    return directory


def simulate(project: Path, seed: int) -> dict[str, Any]:
    """Run `gramfuse simulate` and return its report."""
    command = [gramfuse(), "simulate", str(project), "--seed", str(seed), "--out", str(project / "run"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def table(benchmark: str, alpha: float, seeds: Sequence[int], results: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of all seeds."""
    cells: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for model in result["models"]:
            name = {"silo": f"{model['name']} alone", "simple": "simple average", "regmean": f"RegMean (α = {alpha})",
                    "joint": "joint training"}[model["kind"]]  # fmt: skip
            for metric, value in model["metrics"].items():
                if metric != "examples":
                    cells.setdefault(name, {}).setdefault(metric, []).append(value)
    metrics = list(next(iter(cells.values())))
    lines = [f"{SETTINGS[benchmark]['title']}; seeds {', '.join(map(str, seeds))}", ""]
    lines += [f"| model | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    lines += [f"| {name} | {' | '.join(spread(values[m]) for m in metrics)} |" for name, values in cells.items()]
    sent = statistics.mean(statistics.mean(result["bytes"].values()) for result in results) / 1e6
    seconds = statistics.mean(result["seconds"] for result in results)
    lines += [
        "",
        f"{sent:.1f} MB left each silo; {seconds:.0f} s for one exchange in simulation ({results[0]['machine']}).",
    ]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def read(path: Path) -> Rows:
    """Read JSON lines, compressed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gramfuse() -> str:
    """Path of the command that is installed beside this Python."""
    return str(Path(sys.executable).with_name("gramfuse"))


if __name__ == "__main__":
    main()
