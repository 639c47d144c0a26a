"""Measures the cost of `merge.context-free`, which keeps Gram matrices of context-free layers at the silos.

    python benchmarks/accuracy/first_layer.py hwu64 glue-sst2 --data PATH/TO/SETS --seeds 1 2

For each experiment and seed, silos are trained once with all Gram matrices, and once with the context-free layers
frozen (`frozen`). From the former, the Gram matrices of these layers are left out (`mean`) or reduced to their
diagonals (`diagonal`). All are merged with the plan's α. The first figure is on validation data, for choosing; the
second is on held-out data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment import Between, Derived, cut
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.statistics.contribution import Contribution
from gramfuse_server.run.evaluation import ranked_by, to_measured
from gramfuse_simulation.all_silos import AllSilos, Deltas, Split
from projects import Setting
from sets import Source
from settings import EXPERIMENTS
from silos import laboratory

WAYS = ("full", "diagonal", "mean", "frozen")


def main() -> None:
    """Train, merge in each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", default="", help="folder of the sets, or hf:OWNER (not needed for desk)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--share", type=float, default=1.0, help="share of each silo's rows to train on  [default: 1]")
    parser.add_argument("--epochs", type=int, help="epochs of training  [default: the experiment's]")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"), help="directory for trained silos")
    options = parser.parse_args()
    print(f"| | seed | {' | '.join(WAYS)} | simple mean |\n|---|---|{'---|' * (len(WAYS) + 1)}", flush=True)
    for name in options.experiments:
        for seed in options.seeds:
            setting = EXPERIMENTS[name].make(Source(options.data), seed)
            training = {**setting.training, "seed": seed, "precision": "float32"}
            if options.epochs:
                training["epochs"] = options.epochs
            setting = replace(setting, training=training, silos=_fewer(setting, options.share))
            cells = _measured(setting, name, options.cache)
            print(f"| {name} | {seed} | {' | '.join(cells[way] for way in (*WAYS, 'simple'))} |", flush=True)


def _fewer(setting: Setting, share: float) -> Mapping[str, Any]:
    return {
        name: replace(silo, train=silo.train[: max(64, round(share * len(silo.train)))])
        for name, silo in setting.silos.items()
    }


def _measured(setting: Setting, name: str, cache: Path) -> dict[str, str]:
    """Return the validation and held-out figure of each way."""
    setting = replace(setting, merge={**setting.merge, "context-free": "full"})
    silos, _ = laboratory(setting, name, cache)
    metric = setting.metric or ranked_by(silos.plan)
    cells = {}
    for way in ("full", "diagonal", "mean"):
        layout = _layout_for(silos.layout, way)
        parts = {silo: _cut(silos.layout, layout, whole) for silo, whole in silos.contributions.items()}
        merged = Between(layout, parts, silos.plan.merge.weighting).merge(silos.plan.merge.alpha)
        cells[way] = _figures(silos, merged.deltas, metric)
        cells["simple"] = _figures(silos, merged.mean, metric)
    weights = [tensor.name for tensor in silos.layout.tensors if tensor.context_free]
    modules = [weight.removesuffix("weight") + "*" for weight in weights]
    setting = replace(setting, training={**setting.training, "freeze": ["embeddings", *modules]})
    frozen, _ = laboratory(setting, name, cache)
    merged = Between(frozen.layout, frozen.contributions, frozen.plan.merge.weighting).merge(frozen.plan.merge.alpha)
    cells["frozen"] = _figures(frozen, merged.deltas, metric)
    return cells


def _layout_for(layout: Layout, way: str) -> Layout:
    """Return a layout with the context-free weights merged in another way."""
    single = {tensor.name for tensor in layout.tensors if tensor.context_free}
    document = layout.model_dump()
    for group in document["groups"]:
        if way == "diagonal" and group["weights"][0]["weight"] in single:
            group["structure"] = "diagonal"
    if way == "mean":
        document["groups"] = tuple(g for g in document["groups"] if g["weights"][0]["weight"] not in single)
        for tensor in document["tensors"]:
            tensor["merge"] = "mean" if tensor["name"] in single else tensor["merge"]
    return Layout.model_validate(document)


def _cut(layout: Layout, other: Layout, whole: Contribution) -> Derived:
    names = {group.name for group in other.groups}
    kept = layout.model_copy(update={"groups": tuple(group for group in layout.groups if group.name in names)})
    return replace(cut(kept, other, whole), tokens={name: whole.tokens[name] for name in names})


def _figures(silos: AllSilos, deltas: Deltas, metric: str) -> str:
    def figure(part: Split) -> float:
        sums = {name: bench.measure(deltas, part) for name, bench in silos.benches.items()}
        return float(to_measured(silos.plan, "", "", sums).metrics[metric])

    return f"{figure('validation'):.3f} / {figure('held-out'):.3f}"


if __name__ == "__main__":
    main()
