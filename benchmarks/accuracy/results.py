"""Runs experiments with the command line, keeps what they gave, and makes tables of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from projects import Setting, write

Result = dict[str, Any]

NAMES = {"silo": "{name} alone", "simple": "simple average", "regmean": "**RegMean**", "joint": "joint training"}


def gramfuse() -> str:
    """Path of the command that is installed beside this Python."""
    return str(Path(sys.executable).with_name("gramfuse"))


def simulate(project: Path, *options: str) -> Result:
    """Run `gramfuse simulate` and return its report."""
    command = [gramfuse(), "simulate", str(project), "--out", str(project / "run"), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
    report: Result = json.loads(done.stdout)
    return report


def measured(name: str, setting: Setting, seed: int, out: Path, *, secure: bool) -> Result:
    """Return the result of one seed, kept from an earlier call or measured now."""
    kept = out / f"{name}-{'secure' if secure else 'open'}-seed{seed}.json"
    if not kept.exists():
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
            project = write(Path(scratch) / "project", setting, name=name, secure=secure)
            compare = [] if secure or not setting.compare else ["--compare", setting.compare]
            report = simulate(project, *compare)
        result = {
            "title": setting.title,
            "seed": seed,
            "models": report["models"],
            "rounds": [{"round": each["round"], "models": each["models"]} for each in report.get("rounds", [])],
            "bytes": {silo: sum(phases.values()) for silo, phases in report["bytes"].items()},
            "solve": [step for step in report["solve"] if step["outcome"] != "clean"],
            "seconds": time.monotonic() - began,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
        out.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".partial")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(kept)
    loaded: Result = json.loads(kept.read_text(encoding="utf-8"))
    return loaded


def table(results: Sequence[Result]) -> str:
    """Return the Markdown tables of all seeds of one experiment: its models, and for several rounds those of each."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    parts = [f"{results[0]['title']}; seeds {seeds}", _models([result["models"] for result in results])]
    count = len(results[0]["rounds"])
    if count > 1:
        for number in range(count):
            parts += [f"Round {number + 1}:", _models([result["rounds"][number]["models"] for result in results])]
    sent = statistics.mean(statistics.mean(result["bytes"].values()) for result in results) / 1e6
    seconds = statistics.mean(result["seconds"] for result in results)
    ridges = sorted({step["group"] for result in results for step in result["solve"]})
    parts.append(
        f"{sent:.1f} MB left each silo; {seconds:.0f} s in all, in simulation ({results[0]['machine']})."
        + (f" Not solved cleanly: {', '.join(ridges)}." if ridges else "")
    )
    return "\n\n".join(parts)


def _models(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    cells: dict[str, dict[str, list[float]]] = {}
    for models in seeds:
        for model in models:
            name = NAMES.get(model["kind"], "{name}").format(name=model["name"])
            for task, values in model.get("tasks", {"": model["metrics"]}).items():
                for metric, value in values.items():
                    if metric != "examples":
                        key = f"{task} {metric}".strip()
                        cells.setdefault(name, {}).setdefault(key, []).append(value)
    metrics = list(dict.fromkeys(metric for values in cells.values() for metric in values))
    lines = [f"| model | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for name, values in cells.items():
        lines.append(f"| {name} | {' | '.join(_spread(values[m]) if m in values else '' for m in metrics)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
