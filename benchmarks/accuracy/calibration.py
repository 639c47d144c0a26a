"""Measures how sure heads in closed form should be: the loss on validation examples over factors on their outputs.

    python benchmarks/accuracy/calibration.py hwu64 clinc150 desk glue-sst2 --data PATH/TO/SETS

Heads are fitted to the features of the untouched base. The factor that a head itself names needs no validation examples
(`gramfuse_server.merging.closed_form_head`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_client.silo_file import read_silos
from gramfuse_model.head_features import Pooling, features_of
from gramfuse_model.project import Project
from gramfuse_server.merging.closed_form_head import Head, fit_head
from gramfuse_simulation.all_silos import AllSilos
from gramfuse_simulation.engine import simulated_silo
from projects import write
from sets import Source
from settings import EXPERIMENTS

FACTORS = np.geomspace(0.02, 1.0, 40)


def laboratory(name: str, data: str, seed: int, directory: Path) -> AllSilos:
    """Return all silos of an experiment, without training."""
    setting = EXPERIMENTS[name].make(Source(data), seed)
    project = Project.read(write(directory / name, setting, name=name))
    plan, layout = project.locked()
    silos = {
        silo: simulated_silo(str(file.path), str(directory / "state"), plan.digest)
        for silo, file in read_silos(project.directory, plan.names).items()
    }
    nothing: Any = None  # no statistics: nothing was trained
    return AllSilos(plan, layout, project.directory, silos, dict.fromkeys(silos, nothing))


Rows = tuple[NDArray[np.float64], NDArray[Any]]


def rows(silos: AllSilos, pooling: Pooling) -> Rows:
    """Return the features and labels of all silos' validation examples."""
    features, labels = [], []
    for bench in silos.benches.values():
        with bench.model({}) as model:
            for batch in bench.batches("validation"):
                features.append(features_of(model, batch, len(bench.task.labels), pooling).double().numpy())
                labels.append(batch["labels"].numpy())
    return np.concatenate(features), np.concatenate(labels)


def loss(rows: Rows, head: Head) -> tuple[float, float]:
    """Return accuracy and mean loss of a head."""
    features, labels = rows
    outputs = features @ head.weight.T + head.bias
    likelihoods = outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True)
    right = float((outputs.argmax(axis=1) == labels).mean())
    return right, float(-likelihoods[np.arange(len(labels)), labels].mean())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME")
    parser.add_argument("--data", default="", help="folder of the sets (not needed for desk)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print("| experiment | features | labels | accuracy | its factor | loss | best factor | loss | loss without |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.names:
        with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
            silos = laboratory(name, options.data, options.seed, Path(scratch))
            for pooling in get_args(Pooling):
                head, validation = fit_head(silos.head_sums({}, pooling), prior=True), rows(silos, pooling)
                accuracy, own = loss(validation, head.calibrated)
                losses = {factor: loss(validation, head.scaled(factor))[1] for factor in FACTORS}
                best = min(losses, key=lambda factor: losses[factor])
                print(
                    f"| {name} | {pooling} | {len(head.bias)} | {accuracy:.3f} | {head.certainty:.3f} | {own:.3f} | "
                    f"{best:.3f} | {losses[best]:.3f} | {losses[1.0]:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
