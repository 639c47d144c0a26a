"""The other models that `gramfuse simulate --compare` measures beside the merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_protocol.held_out.metrics import Sums
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.methods import registry
from gramfuse_server.run.evaluation import ranked_by, to_measured
from gramfuse_simulation.all_silos import AllSilos, Deltas
from gramfuse_simulation.terms import Term

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gramfuse_model.loading.base_model import Base
    from gramfuse_protocol.contract.layout import Layout
    from gramfuse_protocol.contract.plan import Plan
    from gramfuse_protocol.statistics.head_sums import HeadSums
    from gramfuse_server.merging.closed_form_head import Head
    from gramfuse_server.report.schema import Measured
    from gramfuse_server.run.conductor import Observer


class Comparison:
    """Makes models and measures them on the held-out examples of all silos.

    Args:
        observer: receives an event when a model is started and when it was measured.
    """

    def __init__(self, laboratory: AllSilos, merged: Deltas, observer: Observer) -> None:
        self.silos = SimulatedSilos(laboratory, merged, observer)
        self.observer = observer

    def models(self, terms: tuple[Term, ...]) -> list[Measured]:
        """Return the report's entry for each model: as for the exchange's own, plus seconds and notes."""
        return [self._measure(term) for term in terms]

    def _measure(self, term: Term) -> Measured:
        self.observer({"phase": "study", "state": "try", "name": term.text})
        start = time.monotonic()
        model = term.method.make(self.silos, **term.options)
        sums = model.sums if isinstance(model, registry.MethodSums) else self.silos.measure(model.deltas)
        seconds = round(time.monotonic() - start, 3)
        name = term.method.label + (f" ({', '.join(model.about)})" if model.about else "")
        self.silos.tell(name)
        return to_measured(self.silos.plan, name, term.kind, sums).updated(seconds=seconds, **model.more)


class SimulatedSilos:
    """Implements `gramfuse_server.merging.methods.registry.Silos` with a laboratory.

    Args:
        observer: as in `Comparison`.
    """

    def __init__(self, laboratory: AllSilos, merged: Deltas, observer: Observer) -> None:
        self.laboratory = laboratory
        self._merged = merged
        self.observer = observer
        self.plan: Plan = laboratory.plan
        self.layout: Layout = laboratory.layout
        self.names: Sequence[str] = tuple(laboratory.contributions)

    @property
    def base(self) -> Base:
        """The base model with the head of the first silo's task."""
        return next(iter(self.laboratory.benches.values())).base

    @property
    def ranked_by(self) -> str:
        """The metric that ranks models; higher is better."""
        return ranked_by(self.plan)

    def start(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the base model's merged parameters and buffers, by name."""
        return self.laboratory.start()

    def deltas(self, silo: str) -> Deltas:
        """Return the differences of a silo's own model from the base."""
        return self.laboratory.deltas(silo)

    def parents(self) -> tuple[list[Deltas], list[dict[str, NDArray[np.float64]]]]:
        """Return the differences of all silos, zero where their weight is zero, and their weights."""
        return self.laboratory.parents()

    def fisher(self, silo: str, variant: Any, examples: int) -> tuple[str, Deltas]:
        """Return the Fisher variant, by default the one for the silo's task, and the diagonal Fisher information."""
        from gramfuse_client.training.fisher import choose_variant

        bench = self.laboratory.benches[silo]
        chosen = choose_variant(bench.task, variant)
        return chosen, bench.fisher(self.deltas(silo), chosen, examples)

    def measure(self, deltas: Deltas) -> Mapping[str, Sums]:
        """Return the held-out sums of base + deltas, by silo."""
        return self.laboratory.measure(deltas)

    def metrics(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        """Return the metrics of all silos together."""
        return to_measured(self.plan, "", "", sums).metrics

    def ask_together(self) -> Mapping[str, Sums]:
        """Return the held-out sums of the ensemble of all silos' own models, by silo."""
        return self.laboratory.measure_ensemble()

    def train_jointly(self, *, cold: bool) -> Mapping[str, Sums]:
        """Return the held-out sums of a model trained on all silos' data, by silo; it starts as silos do, or cold."""
        return self.laboratory.measure_joint(cold=cold)

    def merged(self) -> Deltas:
        """Return the run's merge: its differences from the base."""
        return self._merged

    @property
    def head_fit(self) -> str:
        """How a head of the silos' task is fitted in closed form."""
        return kind_of(self.plan.model.single_task).fit or ""

    def head_sums(self, deltas: Deltas, pooling: Any) -> HeadSums:
        """Return the moments of the features of all silos' training examples, for the base with differences added."""
        return self.laboratory.head_sums(deltas, pooling)

    def measure_head(self, deltas: Deltas, head: Head, pooling: Any) -> Mapping[str, Sums]:
        """Return the held-out sums of the base with differences added and another last layer, by silo."""
        return {
            name: bench.measure_head(deltas, head.weight, head.bias, pooling)
            for name, bench in self.laboratory.benches.items()
        }

    def federate(self, rounds: int, after: Callable[[int, Deltas], None]) -> Mapping[str, int]:
        """Run FedAvg, call `after` with each round and its average, and return the bytes that each silo sent."""
        from gramfuse_simulation.fedavg import federated_average

        return federated_average(self.laboratory, rounds, after)

    def tell(self, name: str) -> None:
        """Tell the observer that a model was measured."""
        self.observer({"phase": "study", "state": "measured", "name": name})
