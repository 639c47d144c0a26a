"""One planned exchange, from the first message to the merged model."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from gramfuse_model.base import Base
from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.layout import PIECE_BYTES, Layout, delta_block
from gramfuse_protocol.messages import (
    TrainReply,
    TrainRequest,
    UploadReply,
    UploadRequest,
)
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.statistics import Contribution, check_counts, check_slices
from gramfuse_server.accumulator import Accumulator, Merged
from gramfuse_server.conductor import WAIT_SECONDS, Conductor, Observer
from gramfuse_server.evaluation import Candidate, Evaluation
from gramfuse_server.model import write_model
from gramfuse_server.post import GRACE_SECONDS
from gramfuse_server.run import RunDirectory
from gramfuse_server.secure import UPLOADS, SecureSums
from gramfuse_server.spool import Spool, Spooled

OwnModels = Callable[[str], Contribution]
"""Returns what a silo measured, by its name: only whoever simulates all silos has that."""


class Exchange:
    """The coordinator's side of one run.

    Args:
        grid: Flower's grid.
        plan: locked.
        layout: the plan's.
        base: the plan's base model; it becomes the merged model.
        run: the run directory, entered.
        own_models: if given, each silo's own model is sent to all silos to be measured too; for simulations only,
            since it shows one silo's model to the others.
        piece_bytes: most bytes of a contribution in one message; a multiple of 16.
        wait, patience, grace, authenticated: as `gramfuse_server.conductor.Conductor` has them.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        layout: Layout,
        base: Base,
        run: RunDirectory,
        *,
        own_models: OwnModels | None = None,
        observer: Observer = lambda event: None,
        piece_bytes: int = PIECE_BYTES,
        wait: float = WAIT_SECONDS,
        patience: float | None = None,
        grace: float = GRACE_SECONDS,
        authenticated: bool = False,
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.base = base
        self.run = run
        self.own_models = own_models
        self.piece_bytes = piece_bytes
        self.conductor = Conductor(
            grid, plan, run, observer, wait=wait, patience=patience, grace=grace, authenticated=authenticated
        )
        self.secure = SecureSums(self.conductor, piece_bytes) if plan.privacy.secure_aggregation else None

    def start(self) -> dict[str, Any]:
        """Run all phases and write the run directory, but for its checksums and its final name.

        Returns:
            The report, as it stands in report.json.

        Raises:
            GramfuseError: of the kind that fits; the message names the silo.
        """
        conductor = self.conductor
        self.run.write("plan.toml", self.plan.to_toml())
        self.run.write("layout.json", self.layout.to_json())
        with conductor.phase("join"):
            conductor.join(self.layout)
        trained = conductor.step("train", self._train)
        accumulator = Accumulator(self.layout, alpha=self.plan.merge.alpha, weighting=self.plan.merge.weighting)
        survivors = self._sum_open(accumulator, trained) if self.secure is None else self._sum_masked(accumulator)
        with conductor.phase("merge"):
            merged = accumulator.merge()
        models, unmeasured = self._evaluate(survivors, merged)
        with conductor.phase("write"):
            joint = next((model["metrics"] for model in models if model["kind"] == "regmean"), None)
            with self.run.writing():
                write_model(self.run.partial / "model", self.base, merged.deltas, self.plan, survivors, joint)
        report = self._report(trained, survivors, accumulator, models, unmeasured, merged)
        self.run.write("report.json", json.dumps(report, indent=2) + "\n")
        return report

    def finish(self) -> None:
        """Have the silos wipe what they keep of the run; call it once the run directory is complete."""
        self.conductor.finish()

    def _train(self) -> dict[str, dict[str, Any]]:
        trained = {}
        request = TrainRequest(**self.conductor.about)
        open_mode = self.secure is None

        def check(silo: str, _: TrainRequest, reply: TrainReply) -> None:
            if open_mode:
                check_counts(self.layout, reply.examples or 0, reply.tokens, f"silo {silo!r}")
            elif reply.examples is not None or reply.tokens:
                raise FederationError(f"silo {silo!r} reports counts, which secure aggregation keeps from everyone")

        for silo, _, reply in self.conductor.ask(
            TrainReply,
            {name: [request] for name in self.conductor.nodes},
            needed=self.plan.minimum_survivors,
            long_work=True,
            check=check,
        ):
            trained[silo] = {"examples": reply.examples, "tokens": dict(reply.tokens)}
            self.conductor.tell("train", "silo", silo=silo, examples=reply.examples)
        return {name: trained[name] for name in self.plan.names if name in trained}

    def _sum_open(self, accumulator: Accumulator, trained: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """Collect every silo's statistics and fold them in, in roster order."""
        spool, pieces = Spool(self.run.partial / "spool"), self.layout.pieces(self.piece_bytes)
        survivors = tuple(self.conductor.step("upload", lambda: self._upload(spool, tuple(trained))))
        for name in survivors:
            about = trained[name]
            accumulator.fold(Spooled(spool, name, pieces, about["examples"], about["tokens"]), f"silo {name!r}")
        return survivors

    def _upload(self, spool: Spool, silos: tuple[str, ...]) -> list[str]:
        pieces = self.layout.pieces(self.piece_bytes)
        requests = {
            name: [
                UploadRequest(**self.conductor.about, piece=number, piece_bytes=self.piece_bytes)
                for number in range(len(pieces))
                if not spool.has(name, number)
            ]
            for name in silos
            if name in self.conductor.nodes
        }

        def check(silo: str, request: UploadRequest, reply: UploadReply) -> None:
            if reply.piece != request.piece:
                raise FederationError(f"silo {silo!r} sent piece {reply.piece}; piece {request.piece} was asked for")
            check_slices(pieces[reply.piece], reply.arrays, f"silo {silo!r}")

        for silo, _, reply in self.conductor.ask(
            UploadReply, requests, in_flight=UPLOADS, needed=self.plan.minimum_survivors, check=check
        ):
            with self.run.writing():
                spool.save(silo, reply.piece, reply.arrays)
            self.conductor.tell("upload", "silo", silo=silo, piece=reply.piece + 1, pieces=len(pieces))
        return [name for name in silos if all(spool.has(name, number) for number in range(len(pieces)))]

    def _sum_masked(self, accumulator: Accumulator) -> tuple[str, ...]:
        """Have the silos' statistics added under masks."""
        assert self.secure is not None  # noqa: S101
        self.secure.prepare()
        words, survivors = self.secure.statistics(self.layout.sum_entries, self.layout.digest)
        accumulator.load(words, len(self.plan.silo))
        return survivors

    def _evaluate(self, survivors: tuple[str, ...], merged: Merged) -> tuple[list[dict[str, Any]], str | None]:
        """Measure the models at all survivors; return what was found, or why nothing was.

        The merge is done by now, so whatever goes wrong here costs the metrics and not the model.
        """
        if self.plan.privacy.metrics == "none":
            return [], "the plan lets no metrics leave"
        self.conductor.keep_only(survivors)
        try:
            return Evaluation(self.conductor, self.secure).measure(self._candidates(survivors, merged), survivors), None
        except GramfuseError as error:
            return [], str(error)

    def _candidates(self, survivors: tuple[str, ...], merged: Merged) -> Iterator[Candidate]:
        if self.own_models is not None:
            for name in survivors:
                own = self.own_models(name)
                arrays = {delta_block(t.name): own.block(delta_block(t.name)) for t in self.layout.tensors}
                yield Candidate(name, "silo", arrays)
        for kind, deltas in (("simple", merged.mean), ("regmean", merged.deltas)):
            yield Candidate(kind, kind, {delta_block(name): np.asarray(d, np.float32) for name, d in deltas.items()})

    def _report(
        self,
        trained: Mapping[str, Mapping[str, Any]],
        survivors: tuple[str, ...],
        accumulator: Accumulator,
        models: list[dict[str, Any]],
        unmeasured: str | None,
        merged: Merged,
    ) -> dict[str, Any]:
        conductor = self.conductor
        # A silo that was lost before the run was resumed may have come back.
        before = {name: reason for name, reason in self.run.done.get("lost", {}).items() if name not in survivors}
        lost = before | {name: str(error) for name, error in conductor.lost.items()}
        return {
            "run": self.run.path.name,
            "name": self.plan.plan.name,
            "plan_digest": self.plan.digest,
            "layout_digest": self.layout.digest,
            "base": {"name": self.plan.model.base, "sha256": self.base.sha256},
            "mode": "open" if self.secure is None else "secure",
            "identities": "made for this run" if self.own_models else "those of the plan",
            "silos": [{"name": name, "examples": trained[name]["examples"]} for name in survivors],
            "lost": [{"name": name, "reason": reason} for name, reason in lost.items()],
            "examples": accumulator.examples,
            "models": models,
            "unmeasured": unmeasured,
            "solve": [asdict(step) for step in merged.steps],
            "bytes": self._of_silos(conductor.post.received),
            "bytes_to_silos": self._of_silos(conductor.post.sent),
            "seconds": {phase: round(seconds, 3) for phase, seconds in conductor.seconds.items()},
            "versions": {
                name: importlib.metadata.version(name) for name in ("gramfuse", "flwr", "torch", "transformers")
            },
        }

    def _of_silos(self, traffic: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """Return traffic by silo, without that of nodes which did not join as one."""
        return {name: dict(traffic[name]) for name in self.plan.names if name in traffic}


def needed_bytes(plan: Plan, layout: Layout, model_bytes: int) -> int:
    """Bytes that a run writes at most: all contributions, the model, and some room."""
    each = layout.upload_bytes(masked=plan.privacy.secure_aggregation)
    return len(plan.silo) * each + 2 * model_bytes + 50 * 2**20
