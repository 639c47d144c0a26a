"""The other models that `gramfuse simulate --compare` measures beside the merge."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gramfuse_cli.laboratory import Deltas, Laboratory
from gramfuse_cli.terms import FISHER_EXAMPLES, Term
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.metrics import Sums

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gramfuse_server.conductor import Observer
    from gramfuse_server.report_schema import Measured

Made = tuple[str, Mapping[str, Sums], dict[str, Any]]
"""A model's name, its held-out sums by silo, and what else a report says of it, by key."""


class Comparison:
    """Makes models and measures them on the held-out examples of all silos.

    Args:
        observer: is told when a model is begun and when it was measured.
    """

    def __init__(self, laboratory: Laboratory, observer: Observer) -> None:
        self.laboratory = laboratory
        self.observer = observer

    def models(self, terms: tuple[Term, ...]) -> list[Measured]:
        """Return what a report says of each model: as of the exchange's own, with seconds and notes."""
        return [self._measured(term) for term in terms]

    def _measured(self, term: Term) -> Measured:
        from gramfuse_server.evaluation import described

        self.observer({"phase": "study", "state": "try", "name": term.text})
        start = time.monotonic()
        name, sums, more = getattr(self, f"_{term.kind.replace('-', '_')}")(**term.options)
        seconds = round(time.monotonic() - start, 3)
        self.observer({"phase": "study", "state": "measured", "name": name})
        return described(self.laboratory.plan, name, term.kind, sums).updated(seconds=seconds, **more)

    def _fisher(self, variant: Any, norm: Any, examples: int) -> Made:
        from gramfuse_client.fisher import choose_variant
        from gramfuse_server.baselines import fisher_mean, normalised

        laboratory = self.laboratory
        variants = {name: choose_variant(bench.task, variant) for name, bench in laboratory.benches.items()}
        fishers = [
            normalised(bench.fisher(laboratory.deltas(name), variants[name], examples), norm)
            for name, bench in laboratory.benches.items()
        ]
        differences, weights = laboratory.parents()
        about = [*dict.fromkeys(variants.values()), "not normalised" if norm == "none" else norm]
        if examples != FISHER_EXAMPLES:
            about.append(f"{examples} examples")
        return f"fisher ({', '.join(about)})", laboratory.measure(fisher_mean(differences, fishers, weights)), {}

    def _ensemble(self) -> Made:
        return "ensemble", self.laboratory.measure_ensemble(), {}

    def _joint(self) -> Made:
        return "joint", self.laboratory.measure_joint(), {}

    def _best(self) -> Made:
        from gramfuse_server.evaluation import described, ranked_by

        laboratory, ranked = self.laboratory, ranked_by(self.laboratory.plan)
        found = {name: laboratory.measure(laboratory.deltas(name)) for name in laboratory.benches}
        scores = {name: described(laboratory.plan, "", "", sums).metrics[ranked] for name, sums in found.items()}
        best = max(scores, key=scores.__getitem__)
        note = f"chosen by {ranked} on the data of this report: no way of picking one silo's model does better"
        return f"best ({best})", found[best], {"silo": best, "note": note}

    def _fedavg(self, rounds: int) -> Made:
        from gramfuse_cli.averaging import federated_average
        from gramfuse_server.evaluation import described, ranked_by

        laboratory, ranked = self.laboratory, ranked_by(self.laboratory.plan)
        found: list[Mapping[str, Sums]] = []

        def after(number: int, deltas: Deltas) -> None:
            found.append(laboratory.measure(deltas))
            self.observer({"phase": "study", "state": "measured", "name": f"fedavg, round {number} of {rounds}"})

        sent = federated_average(laboratory, rounds, after)
        by_round = tuple(described(laboratory.plan, "", "", sums).metrics for sums in found)
        note = f"{ranked} after each round: {', '.join(f'{metrics[ranked]:.3f}' for metrics in by_round)}"
        name = f"fedavg ({rounds} round{'s' if rounds > 1 else ''})"
        return name, found[-1], {"rounds": by_round, "bytes": sent, "note": note}

    def _task_arithmetic(self, scale: float) -> Made:
        from gramfuse_server.baselines import task_arithmetic

        differences, buffers = self._apart()
        merged = task_arithmetic(differences, scale) | buffers
        return f"task arithmetic (scale {scale:g})", self.laboratory.measure(merged), {}

    def _ties(self, density: float) -> Made:
        from gramfuse_server.baselines import ties

        differences, buffers = self._apart()
        return f"ties (density {density:g})", self.laboratory.measure(ties(differences, density) | buffers), {}

    def _apart(self) -> tuple[list[Deltas], dict[str, NDArray[np.float64]]]:
        """Return how the silos' parameters differ from the base, and the mean of how their buffers do.

        Running means of activations are no weights: scaling or trimming their differences makes no sense.
        """
        from gramfuse_server.baselines import weighted_mean

        laboratory = self.laboratory
        differences, weights = laboratory.parents()
        names = {tensor.name for tensor in laboratory.layout.tensors if tensor.buffer}
        buffers = [{name: delta for name, delta in of.items() if name in names} for of in differences]
        parameters: list[Deltas] = [
            {name: delta for name, delta in of.items() if name not in names} for of in differences
        ]
        return parameters, weighted_mean(buffers, weights)

    def _transport(self) -> Made:
        from gramfuse_model.tracing import public_batch
        from gramfuse_server.transport import feed_forward_pairs, transport_mean

        laboratory = self.laboratory
        if len(laboratory.benches) != 2:
            raise PlanError(f"transport: matches the units of two models, and {len(laboratory.benches)} silo is left")
        base = next(iter(laboratory.benches.values())).base
        trained = [tensor.name for tensor in laboratory.layout.tensors]
        pairs, others = feed_forward_pairs(base.model, public_batch(base), trained)
        if not pairs:
            why = f": the units of {others[0]} depend on other weights, as in a gated block" if others else ""
            raise PlanError(
                f"transport: no feed-forward pair of this base model has units that can be matched{why}; leave it out"
            )
        merged = transport_mean(pairs, laboratory.start(), *laboratory.parents())
        more: dict[str, Any] = {"pairs": len(pairs)}
        if others:
            more["note"] = f"averaged without matching their units: {', '.join(others)}"
        return "transport", laboratory.measure(merged), more
