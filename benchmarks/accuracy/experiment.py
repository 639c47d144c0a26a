"""One experiment: trained silos, and all ways of merging them to measure."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from gramfuse_client.data.batches import batches
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.training.fisher import choose_variant
from gramfuse_model.parameters import trainable
from gramfuse_model.probing.public_batch import public_batch
from gramfuse_protocol.contract.layout import Layout, delta_block, gram_block
from gramfuse_protocol.held_out.metrics import Sums
from gramfuse_protocol.statistics.contribution import Contribution, Statistics
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.methods.fisher import fisher_mean, normalised
from gramfuse_server.merging.methods.task_arithmetic import task_arithmetic
from gramfuse_server.merging.methods.ties import ties
from gramfuse_server.merging.methods.transport import feed_forward_pairs, transport_mean
from gramfuse_server.run.evaluation import to_measured
from gramfuse_simulation.all_silos import AllSilos, Bench, Deltas, Split
from gramfuse_simulation.fedavg import federated_average

ResultRow = dict[str, Any]
Silos = tuple[str, ...]

ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
CHOICES = (0.1, 0.5, 0.7, 0.9, 1.0)
SCALES = (0.2, 0.3, 0.5, 1.0)
NORMS = ("per tensor", "per model", "none")
STRUCTURES = ("full", "block:384", "block:128", "block:64", "diagonal")
TOKENS = (250, 1_000, 4_000, 16_000)
FISHER_EXAMPLES = 256


class Store:
    """Results of one experiment on disk, which are not measured again.

    Args:
        path: a JSON file.
        about: metadata beside the rows.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "rows": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        self.rows: list[ResultRow] = self.content["rows"]

    def find(self, model: str, silos: Silos) -> ResultRow | None:
        """Return the row of a model and silos, or None."""
        return next((row for row in self.rows if (row["model"], tuple(row["silos"])) == (model, silos)), None)

    def add(self, row: ResultRow) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def machine() -> str:
    """Describe the machine."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


class Enough(Exception):  # noqa: N818  # not an error
    """Raised to end FedAvg before its last round."""


@dataclass(frozen=True)
class Derived:
    """A contribution with other Gram matrices.

    Args:
        whole: the original contribution.
        grams: by block name.
        tokens: by group.
    """

    whole: Contribution
    grams: Mapping[str, NDArray[np.float32]]
    tokens: Mapping[str, int]

    @property
    def examples(self) -> int:
        """Training examples."""
        return self.whole.examples

    def block(self, name: str) -> NDArray[np.float32]:
        """Return one block."""
        return self.grams[name] if name in self.grams else self.whole.block(name)


class Experiment:
    """Measures models over trained silos, and stores the results.

    Args:
        store: of the rows. A row has `model`, `silos` (those in the merge), `in` (metrics on the held-out data of these
            together), `out` (on those of the others together, if there are any), `all`, `by` (the ranking metric on
            each silo's data), `seconds`, and further values of some models.
        ranked: the metric for choices on validation data.
        tell: called with each new row.
        quick: choose among two values only, use fewer examples for Fisher information, and skip other weightings.
    """

    def __init__(
        self, laboratory: AllSilos, store: Store, ranked: str, tell: Callable[[ResultRow], None], *, quick: bool = False
    ) -> None:
        self.laboratory = laboratory
        self.plan = laboratory.plan
        self.layout = laboratory.layout
        self.store = store
        self.tell = tell
        self.everyone: Silos = tuple(laboratory.contributions)
        self.ranked = ranked
        self.quick = quick
        self.choices = (0.5, 0.9) if quick else CHOICES
        self.scales = SCALES[::3] if quick else SCALES
        self.norms = NORMS[:2] if quick else NORMS
        self.fisher_examples = FISHER_EXAMPLES // 8 if quick else FISHER_EXAMPLES
        self._fishers: dict[str, Mapping[str, NDArray[np.float32]]] = {}

    # Measuring

    def row(self, model: str, silos: Silos, make: Callable[[], tuple[Mapping[str, Sums], ResultRow]]) -> ResultRow:
        """Return the row of a model; measures it if it is missing.

        Args:
            make: returns sums by silo, and further values for the row.
        """
        row = self.store.find(model, silos)
        if row is None:
            began = time.monotonic()
            sums, more = make()
            row = {"model": model, "silos": list(silos), **(self._scores(sums, silos) if sums else {}), **more}
            row["seconds"] = round(time.monotonic() - began, 2)
            self.store.add(row)
            self.tell(row)
        return row

    def _scores(self, sums: Mapping[str, Sums], silos: Silos) -> ResultRow:
        inside = {name: own for name, own in sums.items() if name in silos}
        outside = {name: own for name, own in sums.items() if name not in silos}
        by_silo = {name: self.metrics({name: own})[self.ranked] for name, own in sums.items()}
        scores: ResultRow = {"in": self.metrics(inside), "by": by_silo}
        if outside:
            scores |= {"out": self.metrics(outside), "all": self.metrics(sums)}
        return scores

    def measure(self, deltas: Deltas, silos: Silos, part: Split = "held-out") -> dict[str, Sums]:
        """Return sums by silo: for the silos in a merge and, unless silos keep their heads, for all others."""
        where = silos if self.plan.model.head == "own" or part == "validation" else self.everyone
        return {name: self.laboratory.benches[name].measure(deltas, part) for name in where}

    def score(self, deltas: Deltas, silos: Silos) -> float:
        """Return the score for choices: the ranking metric on the validation data of the silos in a merge."""
        return float(self.metrics(self.measure(deltas, silos, "validation"))[self.ranked])

    def choose(self, model: str, silos: Silos, option: str, makes: Mapping[Any, Callable[[], Deltas]]) -> ResultRow:
        """Return the row of the best candidate on validation data, with the scores of all."""

        def make() -> tuple[Mapping[str, Sums], ResultRow]:
            scores = {value: self.score(candidate(), silos) for value, candidate in makes.items()}
            best = max(scores, key=lambda value: scores[value])
            curve = [{option: value, "validation": score} for value, score in scores.items()]
            return self.measure(makes[best](), silos), {option: best, "curve": curve}

        return self.row(model, silos, make)

    # Ways of merging

    def alone(self) -> None:
        """Measure each silo's own model."""
        for name in self.everyone:
            self.row("alone", (name,), lambda name=name: (self.measure(self.laboratory.deltas(name), (name,)), {}))

    def merges(self, silos: Silos, *, transport: bool, few: bool = False) -> None:
        """Measure all ways of merging some silos' models without further training.

        Methods with settings are measured with their usual settings and, for merges of all silos, with those that are
        best on validation data.

        Args:
            few: measure the simple average, RegMean, Fisher and the ensemble with their usual settings only.
        """
        laboratory, layout = self.laboratory, self.layout
        parents = [laboratory.deltas(name) for name in silos]
        differences, weights = self._parents(silos)
        sums = self.sums({name: laboratory.contributions[name] for name in silos})
        self.row("simple", silos, lambda: (self.measure(sums.at(self.plan.merge.alpha).mean(), silos), {}))
        self.regmean("regmean", silos, lambda: sums, alpha=not few)
        if silos == self.everyone and not self.quick and not few:
            by_examples = Between(layout, laboratory.contributions, "examples").merge
            alpha = self.plan.merge.alpha
            self.row("regmean, by examples", silos, lambda: (self.measure(by_examples(alpha).deltas, silos), {}))
        fishers = cached(lambda: [self._fisher(name) for name in silos])
        norms = {
            norm: lambda norm=norm: fisher_mean(differences, [normalised(f, norm) for f in fishers()], weights)
            for norm in self.norms
        }
        self.row("fisher", silos, lambda: (self.measure(norms[NORMS[0]](), silos), {"norm": NORMS[0]}))
        if silos == self.everyone and not few:
            scales = {scale: lambda scale=scale: task_arithmetic(parents, scale) for scale in self.scales}
            self.choose("fisher, norm chosen", silos, "norm", norms)
            self.choose("task-arithmetic", silos, "scale", scales)
        if not few:
            self.row("ties", silos, lambda: (self.measure(ties(parents), silos), {}))
        if not self.plan.task:
            self.row("ensemble", silos, lambda: (self._ensemble(silos), {}))
        if transport and len(silos) == 2:
            self.row("transport", silos, lambda: (self.measure(self._transport(silos), silos), {}))

    def regmean(
        self, model: str, silos: Silos, sums: Callable[[], Between], *, alpha: bool = True, **more: Any
    ) -> None:
        """Measure RegMean with the plan's α, and with the α that is best on validation data.

        Args:
            sums: called only if a row is missing.
            alpha: whether to choose an α too.
        """
        solved: dict[float, Merged] = {}

        def at(alpha: float) -> Merged:
            if alpha not in solved:
                solved.clear()  # keep only one, as they are large
                solved[alpha] = sums().merge(alpha)
            return solved[alpha]

        def plain() -> tuple[Mapping[str, Sums], ResultRow]:
            merged = at(self.plan.merge.alpha)
            odd = [{"group": s.group, "outcome": s.outcome} for s in merged.steps if s.outcome != "clean"]
            return self.measure(merged.deltas, silos), {"not-clean": odd, **more}

        self.row(model, silos, plain)
        if alpha:
            makes = {alpha: lambda alpha=alpha: at(alpha).deltas for alpha in self.choices}
            self.choose(f"{model}, α chosen", silos, "alpha", makes)

    def joint(self) -> None:
        """Measure one model trained on all silos' data."""
        self.row("joint", self.everyone, lambda: (self.laboratory.measure_joint(threads=torch.get_num_threads()), {}))

    def fedavg(self, rounds: int, *, stop: bool) -> None:
        """Measure FedAvg after each round.

        Args:
            stop: stop once it matches one exchange of RegMean.
        """
        target = self.store.find("regmean", self.everyone)
        goal = float(target["in"][self.ranked]) if target else float("inf")
        by_round: list[dict[str, float]] = []
        last: list[Mapping[str, Sums]] = []

        def after(number: int, deltas: Deltas) -> None:
            last[:] = [self.measure(deltas, self.everyone)]
            by_round.append(self.metrics(last[0]))
            print(f"  fedavg, round {number}: {by_round[-1][self.ranked]:.3f}", file=sys.stderr, flush=True)
            if stop and by_round[-1][self.ranked] >= goal:
                raise Enough

        def make() -> tuple[Mapping[str, Sums], ResultRow]:
            with suppress(Enough):
                federated_average(self.laboratory, rounds, after)
            sent = sum(array.nbytes for array in self.laboratory.start().values())
            return last[0], {"rounds": by_round, "goal": goal, "bytes": sent}

        self.row("fedavg", self.everyone, make)

    def alphas(self) -> None:
        """Measure RegMean over α on held-out data, for a curve only."""
        sums = self.sums(self.laboratory.contributions)
        for alpha in ALPHAS:
            self.row(
                f"regmean, α = {alpha:g}",
                self.everyone,
                lambda alpha=alpha: (self.measure(sums.merge(alpha).deltas, self.everyone), {"alpha": alpha}),
            )

    def structures(self) -> None:
        """Measure RegMean over the structure of the Gram matrices, derived from the full ones."""
        for structure in STRUCTURES:
            layout = structured(self.layout, structure)
            sums = cached(lambda layout=layout: self._cut(layout))
            size = {"open": layout.upload_bytes(masked=False), "secure": layout.upload_bytes(masked=True)}
            self.regmean(f"regmean, {structure}", self.everyone, sums, structure=structure, bytes=size)

    def tokens(self) -> None:
        """Measure RegMean over the limit of token rows for a Gram matrix."""
        for limit in TOKENS[::3] if self.quick else TOKENS:
            sums = cached(lambda limit=limit: self.sums({n: self._remeasured(n, limit) for n in self.everyone}))
            self.regmean(f"regmean, {limit} tokens", self.everyone, sums, tokens=limit)

    def rounds(self, most: int) -> None:
        """Measure several rounds: silos train from the merged model, as in a plan with `merge.rounds`."""
        start = cached(lambda: self.sums(self.laboratory.contributions).merge(self.plan.merge.alpha).deltas)
        for number in range(2, most + 1):
            merge = cached(lambda start=start, number=number: self._round(start(), number))
            self.row(
                f"regmean, round {number}",
                self.everyone,
                lambda merge=merge: (self.measure(merge().deltas, self.everyone), {}),
            )
            self.row(
                f"simple, round {number}",
                self.everyone,
                lambda merge=merge: (self.measure(merge().mean, self.everyone), {}),
            )
            start = cached(lambda merge=merge: merge().deltas)

    # Details

    def sums(self, contributions: Mapping[str, Contribution]) -> Between:
        """Return the sums of contributions."""
        return Between(self.layout, contributions, self.plan.merge.weighting)

    def _cut(self, layout: Layout) -> Between:
        parts = {name: cut(self.layout, layout, whole) for name, whole in self.laboratory.contributions.items()}
        return Between(layout, parts, self.plan.merge.weighting)

    def _parents(self, silos: Silos) -> tuple[list[Deltas], list[Mapping[str, NDArray[np.float64]]]]:
        differences, weights = self.laboratory.parents()
        places = [self.everyone.index(name) for name in silos]
        return [differences[place] for place in places], [weights[place] for place in places]

    def _fisher(self, name: str) -> Mapping[str, NDArray[np.float32]]:
        if name not in self._fishers:
            bench = self.laboratory.benches[name]
            variant = choose_variant(bench.task, None)
            self._fishers[name] = bench.fisher(self.laboratory.deltas(name), variant, self.fisher_examples)
        return self._fishers[name]

    def _ensemble(self, silos: Silos) -> dict[str, Sums]:
        benches = self.laboratory.benches
        models = [(self.laboratory.deltas(name), benches[name].head) for name in silos]
        annotated = [benches[name].task.annotated for name in silos]
        return {name: bench.measure_together(models, annotated) for name, bench in benches.items()}

    def _transport(self, silos: Silos) -> Deltas:
        base = self.laboratory.benches[silos[0]].base
        trained = [tensor.name for tensor in self.layout.tensors]
        pairs, _ = feed_forward_pairs(base.model, public_batch(base), trained)
        return transport_mean(pairs, self.laboratory.start(), *self._parents(silos))

    def _remeasured(self, name: str, limit: int) -> Contribution:
        bench, whole = self.laboratory.benches[name], self.laboratory.contributions[name]
        start = trainable(bench.base.model)
        with bench.model(self.laboratory.deltas(name)) as model:
            statistics = self._collected(bench, model, start, limit)
        grams = {name: values for name, values in statistics.blocks.items() if name.startswith(gram_block(""))}
        return Derived(whole, grams, statistics.tokens)

    def _round(self, start: Deltas, number: int) -> Merged:
        began = {delta_block(name): np.asarray(delta, np.float32) for name, delta in start.items()}
        sums = Accumulator(self.layout, alpha=self.plan.merge.alpha, weighting=self.plan.merge.weighting)
        for name, bench in self.laboratory.benches.items():
            deltas = {name: began[delta_block(name)] for name in start}
            tuned = bench.finetune(deltas, number)
            with bench.model(deltas) as model:
                before = trainable(model)
            with bench.model({}, head=tuned) as model:
                sums.fold(self._collected(bench, model, before, self.plan.merge.tokens), name, silo=name)
        return sums.merge().after(began)

    def _collected(
        self, bench: Bench, model: PreTrainedModel, base: Mapping[str, NDArray[np.float32]], limit: int
    ) -> Statistics:
        """Measure a model on a silo's training examples."""
        encoded = bench.encoded(bench.examples[0])
        shuffled = batches(encoded, self.plan.training.batch_size, bench.device, seed=self.plan.training.seed)
        return collect_statistics(model, shuffled, self.layout, base=base, examples=len(encoded), limit=limit)

    def metrics(self, sums: Mapping[str, Sums]) -> dict[str, Any]:
        """Return the metrics of all silos together."""
        model = to_measured(self.plan, "", "", sums)
        return {**model.metrics, **({"tasks": model.tasks} if self.plan.task else {})}


class Between:
    """Merges of the same silos over α; the silos are summed only twice, for any number of α."""

    def __init__(self, layout: Layout, contributions: Mapping[str, Contribution], weighting: Any) -> None:
        self.layout = layout
        self.contributions = contributions
        self.weighting = weighting
        self._ends = cached(lambda: [self._sum(end) for end in (0.0, 1.0)])

    def at(self, alpha: float) -> Accumulator:
        """Return the sums for one α."""
        zero, one = self._ends()
        return zero.between(one, alpha)

    def merge(self, alpha: float) -> Merged:
        """Return the merge for one α."""
        return self.at(alpha).merge()

    def _sum(self, alpha: float) -> Accumulator:
        sums = Accumulator(self.layout, alpha=alpha, weighting=self.weighting)
        for name, contribution in self.contributions.items():
            sums.fold(contribution, name, silo=name)
        return sums


def structured(layout: Layout, structure: str) -> Layout:
    """Return a layout with another structure for all Gram matrices."""
    document = layout.model_dump()
    for group in document["groups"]:
        group["structure"] = structure
    return Layout.model_validate(document)


def cut(layout: Layout, other: Layout, whole: Contribution) -> Derived:
    """Reduce a contribution with full Gram matrices to another structure, whose entries are a subset."""
    grams = {}
    for group, target in zip(layout.groups, other.groups, strict=True):
        ((full,),) = group.blocks.unpack(whole.block(gram_block(group.name)))
        parts = []
        for first, count, width in target.blocks.parts:
            starts = [first + n * width for n in range(count)]
            parts.append(np.stack([full[at : at + width, at : at + width] for at in starts]))
        grams[gram_block(group.name)] = target.blocks.pack(parts)
    return Derived(whole, grams, whole.tokens)


def cached(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that calls `make` once, on the first call, and caches the value."""
    value: list[Any] = []

    def get() -> Any:
        if not value:
            value.append(make())
        return value[0]

    return get


def run(experiment: Experiment, subsets: Iterable[Silos], parts: Sequence[str], *, fedavg: int = 0) -> None:
    """Run all measurements of a setting.

    Args:
        subsets: sets of silos to merge.
        parts: `joint`, `alphas`, `structures`, `tokens`, `rounds`, `transport`.
        fedavg: most rounds of FedAvg; 0 for none.
    """
    experiment.alone()
    for silos in subsets:
        experiment.merges(silos, transport="transport" in parts, few="heads" in parts)
    if "joint" in parts:
        experiment.joint()
    if "alphas" in parts:
        experiment.alphas()
    if "structures" in parts:
        experiment.structures()
    if "tokens" in parts:
        experiment.tokens()
    if "rounds" in parts:
        experiment.rounds(3)
    if fedavg:
        experiment.fedavg(fedavg, stop="rounds" not in parts)
