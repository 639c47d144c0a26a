"""Has the silos measure models on their held-out examples, and adds up what the plan lets them say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.encoding import decode
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages import EvaluateReply, EvaluateRequest
from gramfuse_protocol.metrics import Sums, metrics, sums_shape
from gramfuse_protocol.scales import METRICS_SCALE
from gramfuse_protocol.transcript import metrics_context
from gramfuse_protocol.wire import pack
from gramfuse_server.conductor import Conductor
from gramfuse_server.secure import SecureSums


class Candidate(NamedTuple):
    """A model to be measured: its name, what it is, and its differences from the base, float32 by block name."""

    name: str
    kind: str
    arrays: Mapping[str, NDArray[np.float32]]


class Evaluation:
    """One evaluation of several models by the same silos.

    Args:
        secure: takes the metrics as a secure sum, if the plan has one and shows metrics as a sum only.
    """

    def __init__(self, conductor: Conductor, secure: SecureSums | None) -> None:
        self.conductor = conductor
        self.plan = conductor.plan
        self.secure = secure if self.plan.privacy.metrics == "sum" else None
        self.shape = sums_shape(len(self.plan.model.labels))

    def measure(self, candidates: Iterable[Candidate], survivors: tuple[str, ...]) -> list[dict[str, Any]]:
        """Return name, kind and metrics of each model, over the held-out examples of all silos together.

        Args:
            survivors: the silos whose contributions are in the merge.

        Raises:
            GramfuseError: if fewer silos answer than the plan asks for.
        """
        kinds: dict[str, str] = {}
        digests: dict[str, str] = {}
        found: dict[str, dict[str, Sums]] = {}
        with self.conductor.phase("evaluate"):
            for candidate in candidates:
                kinds[candidate.name] = candidate.kind
                digests[candidate.name], found[candidate.name] = self._ask(candidate)
                self.conductor.tell("evaluate", "measured", name=candidate.name)
        if self.secure is not None:
            sums = self._summed(digests, survivors)
            return [{"name": n, "kind": kinds[n], "metrics": metrics(total)} for n, total in sums.items()]
        # A silo that was lost half-way would be in the metrics of some models only.
        silos = [silo for silo in self.conductor.nodes if all(silo in by for by in found.values())]
        models = []
        for name, by in found.items():
            total: Sums = np.sum([by[silo] for silo in silos], axis=0)
            model: dict[str, Any] = {"name": name, "kind": kinds[name], "metrics": metrics(total)}
            if self.plan.privacy.metrics == "silo":
                model["silos"] = {silo: metrics(by[silo]) for silo in silos}
            models.append(model)
        return models

    def _ask(self, candidate: Candidate) -> tuple[str, dict[str, Sums]]:
        """Return the digest of the request that brought a model, and the sums of each silo that may tell them."""
        request = EvaluateRequest(**self.conductor.about, candidate=candidate.name, arrays=candidate.arrays)
        requests = {silo: [request] for silo in self.conductor.nodes}
        replies = self.conductor.ask(
            EvaluateReply, requests, needed=self.plan.minimum_survivors, long_work=True, check=self._check
        )
        return pack(request).digest, {silo: reply.arrays["sums"] for silo, _, reply in replies if self.secure is None}

    def _check(self, silo: str, request: EvaluateRequest, reply: EvaluateReply) -> None:
        name, found = request.candidate, reply.arrays.get("sums")
        if self.secure is not None:
            if reply.candidate != name or reply.arrays:
                raise FederationError(f"silo {silo!r} sent metrics of {name!r} in the clear; the plan has them summed")
            return
        if reply.candidate != name or found is None or found.dtype != np.float64 or found.shape != self.shape:
            raise FederationError(
                f"silo {silo!r} sent metrics of {reply.candidate!r} that do not fit; expected float64 sums of "
                f"shape {self.shape} of {name!r}"
            )
        if not np.isfinite(found).all() or (self.plan.model.labels and (found.min() < 0 or found.sum() < 1)):
            raise FederationError(f"silo {silo!r} sent metrics of {name!r} that are no counts of examples")

    def _summed(self, digests: Mapping[str, str], survivors: tuple[str, ...]) -> dict[str, Sums]:
        assert self.secure is not None  # noqa: S101
        size = int(np.prod(self.shape))
        words, _ = self.secure.metrics(survivors, tuple(digests), size * len(digests), metrics_context(digests))
        values = decode(words, METRICS_SCALE[self.plan.model.task]).reshape(len(digests), *self.shape)
        return dict(zip(digests, values, strict=True))
