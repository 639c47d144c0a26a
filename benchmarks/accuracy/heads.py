"""Measures heads in closed form: on the untouched base, as the start of training, and fitted again after a merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiment import Experiment, ResultRow, Silos
from gramfuse_model.heads import last_linear
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import set_values
from gramfuse_model.saving import save_model
from gramfuse_protocol.held_out.metrics import Sums
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.head_accumulator import START_SCALE
from gramfuse_server.merging.head_solvers import SOLVERS, Solver
from gramfuse_simulation.all_silos import AllSilos, Deltas
from projects import Setting

BODIES = {"regmean": "RegMean", "simple": "average"}


def with_fitted_head(silos: AllSilos, setting: Setting, place: Path) -> Setting:
    """Return a setting whose base has the head that an exchange before training gives all silos.

    The last layer is then averaged, as in a plan with `model.head = "fitted"`.

    Args:
        silos: the silos of the setting with a random head.
        place: directory for the base.
    """
    base, task = load_base(silos.plan, silos.directory), silos.plan.model.single_task
    last = last_linear(base.model, kind_of(task).outputs(task))
    assert last is not None
    head = solver(silos).fit(silos.head_sums({}, "head"), start=START_SCALE)
    bias = f"{last.weight.removesuffix('weight')}bias"
    set_values(base.model, {last.weight: head.weight, bias: head.bias})
    shutil.rmtree(place, ignore_errors=True)
    save_model(base, place)  # without adapters, which have learned nothing yet
    return replace(setting, base=str(place.resolve()), merge={**setting.merge, "exclude": [last.weight]})


def solver(silos: AllSilos) -> Solver:
    """Return the solver of a setting's task."""
    fit = kind_of(silos.plan.model.single_task).fit
    assert fit is not None
    return SOLVERS[fit]


class Heads:
    """The measurements of one setting, for all its silos together.

    Args:
        cold: the experiment whose silos start from a random head.
        warm: makes the silos that start from the fitted head; called only if a row is missing.
    """

    def __init__(self, cold: Experiment, warm: Callable[[], AllSilos]) -> None:
        self.cold = cold
        self._warm = warm
        self.silos: Silos = cold.everyone

    def run(self) -> None:
        """Measure everything that is not in the store."""
        cold = self.cold.laboratory
        self._fitted("probe", cold, lambda: {}, "head", seen=False)
        if not kind_of(cold.plan.model.single_task).fits_words:
            self._fitted("probe, mean-pooled", cold, lambda: {}, "mean", seen=False)
        self._fitted("regmean, refit", cold, self._merged(self.cold, "regmean"), "head")
        names = ["alone, fitted", *(f"{body}, {way}" for body in BODIES for way in ("fitted", "both", "chosen"))]
        if all(self.cold.store.find(name, self.silos) for name in (*names, "joint, fitted")):
            return
        warm = Experiment(self._warm(), self.cold.store, self.cold.ranked, self.cold.tell, quick=self.cold.quick)
        laboratory = warm.laboratory
        for name in self.silos:
            warm.row("alone, fitted", (name,), lambda name=name: (warm.measure(laboratory.deltas(name), (name,)), {}))
        for body in BODIES:
            deltas = self._merged(warm, body)
            warm.row(f"{body}, fitted", self.silos, lambda deltas=deltas: (warm.measure(deltas(), self.silos), {}))
            self._fitted(f"{body}, both", laboratory, deltas, "head")
            self._choose(warm, body, deltas)
        warm.row("joint, fitted", self.silos, lambda: (laboratory.measure_joint(threads=torch.get_num_threads()), {}))

    def _merged(self, experiment: Experiment, body: str) -> Callable[[], Deltas]:
        def make() -> Deltas:
            sums = experiment.sums(experiment.laboratory.contributions).at(experiment.plan.merge.alpha)
            return sums.merge().deltas if body == "regmean" else sums.mean()

        return make

    def _fitted(
        self, model: str, laboratory: AllSilos, deltas: Callable[[], Deltas], pooling: Any, *, seen: bool = True
    ) -> None:
        """Measure a body with a head that is fitted to its features.

        Args:
            seen: whether the body was trained on the same examples.
        """

        def make() -> tuple[Mapping[str, Sums], ResultRow]:
            body = deltas()
            head = solver(laboratory).fit(laboratory.head_sums(body, pooling), start=None, seen=seen)
            benches = laboratory.benches.items()
            sums = {name: bench.measure_head(body, head.weight, head.bias, pooling) for name, bench in benches}
            return sums, {"shrinkage": round(head.shrinkage, 4)}

        self.cold.row(model, self.silos, make)

    def _choose(self, warm: Experiment, body: str, deltas: Callable[[], Deltas]) -> None:
        """Measure the head that is best on validation data: the merged one, or the one that is fitted again."""

        def make() -> tuple[Mapping[str, Sums], ResultRow]:
            merged = deltas()
            head = solver(warm.laboratory).fit(warm.laboratory.head_sums(merged, "head"), start=None, seen=True)
            benches = warm.laboratory.benches.items()
            again = {
                name: bench.measure_head(merged, head.weight, head.bias, "head", "validation")
                for name, bench in benches
            }
            scores = {"merged": warm.score(merged, self.silos), "fitted again": warm.metrics(again)[warm.ranked]}
            best = max(scores, key=lambda way: scores[way])
            row = self.cold.store.find(f"{body}, {'fitted' if best == 'merged' else 'both'}", self.silos)
            assert row is not None
            return {}, {**{key: row[key] for key in ("in", "by")}, "chosen": best, "validation": scores}

        self.cold.row(f"{body}, chosen", self.silos, make)
