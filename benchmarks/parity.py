"""Compares a merge of two fine-tuned models with the published algorithm in exact arithmetic.

    python benchmarks/parity.py                     two desks of the demo, α = 1 and 0.9
    python benchmarks/parity.py --messages 100      fewer messages of each

Two silos fine-tune MiniLM on the demo's data, measure, and are merged as in an open run. The reference is the RegMean
algorithm (Jin et al., ICLR 2023, equation 2 and section 3.3), implemented from the formula in float64: Gram matrices of
all inputs of each linear layer, off-diagonals times α, W = (Σ Ĝ)⁻¹ Σ Ĝ W by explicit inversion, and the mean for
everything else, on texts without padding. The same in float32 shows the effect of rounding.

Prints, for the worst linear layer, the relative Frobenius norm of the difference in weights, and in the layer's outputs
on the silos' training inputs. At α = 1, a float32 sum of Gram matrices can carry no information in some direction;
gramfuse regularises towards the mean there. Such layers (below DETERMINED) have a separate row.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_cli.commands.init import DESK
from gramfuse_client.data.batches import Encoded
from gramfuse_client.data.examples import Examples, load
from gramfuse_client.exchange.local_model import train
from gramfuse_client.silo_file import Silo
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import add_differences
from gramfuse_model.probing.batch import Batch
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.regmean import merge

SILOS = ("bank", "hospital")
SETTINGS = (
    "privacy.secure-aggregation=false",
    'merge.context-free="full"',  # the published algorithm has no exceptions
)
ALPHAS = (1.0, 0.9)

DETERMINED = 3e-6
"""Above this smallest eigenvalue of a sum of Gram matrices, scaled to a unit diagonal, float32 determines the solution.

Rounding moves each entry by 2^-24, and so eigenvalues by about 1e-6.
"""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Silos:
    """Two silos' models, statistics and data.

    Args:
        base: the model that both started from.
        models: the fine-tuned models.
        statistics: of each silo.
        texts: training texts of each silo, as batches without padding.
    """

    plan: Plan
    layout: Layout
    base: PreTrainedModel
    models: Sequence[PreTrainedModel]
    statistics: Sequence[Statistics]
    texts: Sequence[Sequence[Batch]]


def fine_tuned(messages: int | None = None, settings: Sequence[str] = ()) -> Silos:
    """Fine-tune and measure at two silos of the demo.

    Args:
        messages: per silo; by default all.
        settings: `section.key=value` of the demo's plan.
    """
    project = Project.read(DESK, (*SETTINGS, *settings))
    plan = project.plan.model_copy(update={"silo": tuple(s for s in project.plan.silo if s.name in SILOS)})
    start = load_base(plan, DESK)
    layout = plan_layout(plan, start)
    models, statistics, texts = [], [], []
    for name in SILOS:
        silo, task = Silo.read(DESK / "silos" / f"{name}.toml"), plan.task_of(name)
        examples, _ = load(silo, task)
        examples = examples.take(range(len(examples))[:messages])
        base = load_base(plan, DESK)
        statistics.append(train(silo, plan, layout, base, examples))
        models.append(base.model.eval())
        texts.append(unpadded(examples, base.tokenizer, task))
    return Silos(plan, layout, start.model, models, statistics, texts)


def unpadded(examples: Examples, tokenizer: object, task: Task) -> list[Batch]:
    """Return texts in batches of equal length, so that nothing is padded."""
    rows = sorted(Encoded(examples, tokenizer, task).rows or (), key=lambda row: len(row["input_ids"]))
    batches = []
    for _, group in groupby(rows, key=lambda row: len(row["input_ids"])):
        same = list(group)
        batches.append({key: torch.tensor([row[key] for row in same]) for key in same[0] if key != "labels"})
    return batches


def gram_matrices(silos: Silos, silo: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the mean of x xᵀ over all inputs of each linear layer, (d_in, d_in), by the weight's name.

    Layers that the plan excludes are left out.
    """
    inputs: dict[str, list[torch.Tensor]] = {}
    exact, texts = copy.deepcopy(silos.models[silo]).to(dtype).eval(), silos.texts[silo]
    for name, module in exact.named_modules():
        excluded = any(fnmatchcase(f"{name}.weight", pattern) for pattern in silos.plan.merge.exclude)
        if isinstance(module, nn.Linear) and not excluded:
            kept = inputs.setdefault(f"{name}.weight", [])
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
    with torch.no_grad():
        for batch in texts:
            exact(**batch)
    grams = {}
    for weight, batches in inputs.items():
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in batches])
        grams[weight] = x.T @ x / len(x)
    return grams


def published(silos: Silos, grams: Sequence[Tensors], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return all parameters of the published algorithm's merge, by name.

    Args:
        grams: of each silo's model, by weight.
    """
    merged = {}
    for name, _ in silos.base.named_parameters():
        each = torch.stack([dict(model.named_parameters())[name].detach().to(dtype) for model in silos.models])
        if name not in grams[0]:
            merged[name] = each.mean(dim=0)
            continue
        shrunk = torch.stack([alpha * g[name] + (1 - alpha) * torch.diag(g[name].diagonal()) for g in grams])
        products = (shrunk @ each.transpose(1, 2)).sum(dim=0)  # (d_in, d_out)
        merged[name] = (torch.inverse(shrunk.sum(dim=0)) @ products).T
    return merged


class Ours(NamedTuple):
    """Gramfuse's merge.

    Args:
        parameters: as written to disk, float32, by name.
        eigenvalues: smallest eigenvalue of the sum of Gram matrices, scaled to a unit diagonal, by weight.
    """

    parameters: Tensors
    eigenvalues: Mapping[str, float]


def ours(silos: Silos, alpha: float) -> Ours:
    """Merge the silos' statistics into a copy of the base model."""
    model, merged = copy.deepcopy(silos.base), merge(silos.statistics, silos.layout, alpha=alpha)
    add_differences(model, merged.deltas)
    by_group = {step.group: step.smallest_eigenvalue for step in merged.steps}
    return Ours(
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        {weight.weight: by_group[group.name] for group, weight in silos.layout.linear()},
    )


class Distance(NamedTuple):
    """Relative distance of a tensor from the exact one: of its values and, for a linear layer, of its outputs."""

    name: str
    weights: float
    outputs: float


def distances(parameters: Tensors, exact: Tensors, grams: Sequence[Tensors]) -> list[Distance]:
    """Return the distances of parameters from the exact ones.

    Args:
        grams: exact ones. With their sum G, ‖X D‖² = tr(Dᵀ G D) is the change of a layer's outputs under D.
    """
    result = []
    for name, right in exact.items():
        off = parameters[name].double() - right
        weights = float(off.norm() / right.norm())
        if name not in grams[0]:
            result.append(Distance(name, weights, 0.0))
            continue
        gram = torch.stack([g[name] for g in grams]).sum(dim=0)
        added, whole = (max(float((d @ gram * d).sum()), 0.0) for d in (off, right))
        result.append(Distance(name, weights, (added / whole) ** 0.5))
    return result


def main() -> int:
    """Fine-tune, merge in three ways, and print the distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, help="per silo; default: all")
    parser.add_argument("--alpha", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help="change the demo's plan")
    options = parser.parse_args()
    began = time.perf_counter()
    silos = fine_tuned(options.messages, options.set)
    exact, single = (
        [gram_matrices(silos, silo, dtype) for silo in range(len(SILOS))] for dtype in (torch.float64, torch.float32)
    )
    count = sum(statistics.examples for statistics in silos.statistics)
    print(f"two fine-tuned {silos.plan.model.base}, {count} messages, {len(exact[0])} linear layers")
    print("| α | merge | layers | weights | layer outputs |\n|---|---|---|---|---|")
    for alpha in options.alpha:
        right = published(silos, exact, alpha, torch.float64)
        own = ours(silos, alpha)
        merges = {
            "gramfuse": own.parameters,
            "published algorithm, float32": published(silos, single, alpha, torch.float32),
        }
        for name, parameters in merges.items():
            layers = [one for one in distances(parameters, right, exact) if one.name in own.eigenvalues]
            for kind, low in (("determined", False), ("others", True)):
                if group := [one for one in layers if (own.eigenvalues[one.name] < DETERMINED) is low]:
                    worst = max(one.weights for one in group), max(one.outputs for one in group)
                    print(f"| {alpha:g} | {name} | {len(group)} {kind} | {worst[0]:.1e} | {worst[1]:.1e} |")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
