"""Compares a merge under secure aggregation with the open one, for the same silos, data and training.

    python benchmarks/accuracy/equality.py desk
    python benchmarks/accuracy/equality.py hwu64 --data PATH/TO/SETS --rounds 2

The relative difference of a tensor is ‖secure − open‖ / ‖open‖ in the Frobenius norm; that of the model is over all
trained weights together.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from command import simulate
from gramfuse_protocol.contract.layout import Layout
from gramfuse_server.report.schema import Measured
from projects import write
from sets import Source
from settings import EXPERIMENTS

LIMIT = 1e-6


def main() -> None:
    """Merge both ways and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", default="", help="folder of the sets (not needed for desk)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="rounds of merging")
    options = parser.parse_args()
    reports, weights = {}, {}
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        setting = EXPERIMENTS[options.experiment].make(Source(options.data), options.seed)
        training = {**setting.training, "seed": options.seed}
        setting = replace(setting, training=training, merge={**setting.merge, "rounds": options.rounds})
        for mode, secure in (("open", False), ("secure", True)):
            project = write(Path(scratch) / mode, setting, name=options.experiment, secure=secure)
            reports[mode] = simulate(project)
            weights[mode] = load_file(project / "run" / "model" / "model.safetensors")
            layout = Layout.read(project / "run" / "layout.json")
    # The head's name differs where the file keeps the encoder under a prefix of its own; the model's names are kept.
    trained = [tensor.name for tensor in layout.tensors]
    distances = {name: relative(weights["secure"][name], weights["open"][name]) for name in trained}
    whole = relative(*(torch.cat([weights[mode][name].flatten() for name in trained]) for mode in ("secure", "open")))
    worst = max(distances, key=lambda name: distances[name])
    print(f"{setting.title}; seed {options.seed}")
    print("\n| | open | secure |\n|---|---|---|")
    for one, other in zip(*(reports[mode]["rounds"] for mode in ("open", "secure")), strict=True):
        for model, same in zip(one["models"], other["models"], strict=True):
            both = [Measured.read(m).without_noise.metrics for m in (model, same)]
            cells = [" / ".join(f"{v:.4f}" for k, v in metrics.items() if k != "examples") for metrics in both]
            print(f"| round {one['round']}: {model['name']} | {cells[0]} | {cells[1]} |")
    for title, value in (("MB from each silo", sent), ("seconds", seconds)):
        print(f"| {title} | {value(reports['open']):.1f} | {value(reports['secure']):.1f} |")
    print(
        f"\nrelative difference of the merged weights: {whole:.2e} over all, at most {distances[worst]:.2e} ({worst})"
    )
    if options.rounds == 1:  # later rounds train from models that differ by rounding, and training amplifies this
        print(f"at most {LIMIT:g}: {'yes' if max(whole, distances[worst]) <= LIMIT else 'MISSED'}")
    print(f"({platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__})")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def sent(report: dict) -> float:  # type: ignore[type-arg]
    """Return the megabytes that one silo sent on average."""
    return sum(sum(phases.values()) for phases in report["bytes"].values()) / len(report["bytes"]) / 1e6


def seconds(report: dict) -> float:  # type: ignore[type-arg]
    """Return the seconds of all phases except training and the simulation's exact measurements."""
    return float(sum(value for phase, value in report["seconds"].items() if phase not in ("train", "exact")))


if __name__ == "__main__":
    main()
