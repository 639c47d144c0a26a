"""One planned exchange: join, train, upload, merge, evaluate."""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from flwr.serverapp import Grid

from gramfuse_model.base import Base
from gramfuse_protocol.errors import FederationError, RefusalError
from gramfuse_protocol.layout import PIECE_BYTES, Layout, delta_block
from gramfuse_protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    Refusal,
    TrainReply,
    TrainRequest,
    UploadReply,
    UploadRequest,
    expect,
)
from gramfuse_protocol.metrics import Sums, metrics, sums_shape
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.statistics import check_counts, check_slices
from gramfuse_server.accumulator import Accumulator, Merged
from gramfuse_server.model import write_model
from gramfuse_server.post import Post
from gramfuse_server.run import RunDirectory
from gramfuse_server.spool import Spool, Spooled

UPLOADS = 2
"""Silos that upload at the same time."""

WAIT_SECONDS = 600.0
"""How long to wait for all silos to be connected."""

Q = TypeVar("Q", TrainRequest, UploadRequest, EvaluateRequest)
R = TypeVar("R", TrainReply, UploadReply, EvaluateReply)

Observer = Callable[[dict[str, Any]], None]
"""Takes events: `{"phase", "state": "start" | "silo" | "end", …}`."""


class Exchange:
    """The coordinator's side of one run.

    Args:
        grid: Flower's grid.
        plan: locked.
        layout: the plan's.
        base: the plan's base model; it becomes the merged model.
        run: the run directory, entered.
        compare_silos: whether each silo's own model is sent to all silos to be measured; for simulations only,
            since it shows one silo's model to the others.
        piece_bytes: most bytes of statistics in one message.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        layout: Layout,
        base: Base,
        run: RunDirectory,
        *,
        compare_silos: bool = False,
        observer: Observer = lambda event: None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.grid = grid
        self.plan = plan
        self.layout = layout
        self.base = base
        self.run = run
        self.compare_silos = compare_silos
        self.observer = observer
        self.piece_bytes = piece_bytes
        self.post = Post(grid, run.record)
        self.nodes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._about: dict[str, Any] = {"plan": plan.digest, "session": secrets.token_hex(16)}

    def start(self) -> dict[str, Any]:
        """Run all phases and write the run directory, but for its checksums and its final name.

        Returns:
            The report, as it stands in report.json.

        Raises:
            GramfuseError: of the kind that fits; the message names the silo.
        """
        self.run.write("plan.toml", self.plan.to_toml())
        self.run.write("layout.json", self.layout.to_json())
        with self._phase("join"):
            self._join()
        with self._phase("train"):
            trained = self._train()
        with self._phase("upload"):
            spool = self._upload()
        with self._phase("merge"):
            accumulator = Accumulator(self.layout, alpha=self.plan.merge.alpha, weighting=self.plan.merge.weighting)
            contributions = {
                name: Spooled(spool, name, trained[name].examples, trained[name].tokens) for name in self.plan.names
            }
            for name, contribution in contributions.items():
                accumulator.fold(contribution, f"silo {name!r}")
            merged = accumulator.merge()
        with self._phase("evaluate"):
            models = self._evaluate(contributions, merged)
        with self._phase("write"):
            shutil.rmtree(spool.directory)
            joint = next((model["metrics"] for model in models if model["kind"] == "regmean"), None)
            with self.run.writing():
                write_model(self.run.partial / "model", self.base, merged.deltas, self.plan, joint)
        report = self._report(trained, models, merged)
        self.run.write("report.json", json.dumps(report, indent=2) + "\n")
        return report

    def _join(self) -> None:
        nodes = {f"node {node}": node for node in self._wait_for_nodes()}
        request = JoinRequest(**self._about, plan_text=self.plan.to_toml(), layout=self.layout.to_json())
        refusals = []
        for label, _, reply in self.post.exchange(nodes, {label: [request] for label in nodes}, len(nodes)):
            try:
                source = f"silo {reply.silo!r} ({label})" if isinstance(reply, Refusal) else label
                joined = expect(JoinReply, request, reply, source).silo
            except RefusalError as error:
                refusals.append(error)
                continue
            if joined in self.nodes:
                raise FederationError(
                    f"two nodes say that they are silo {joined!r}; stop one of them, or give each its own silo file"
                )
            if joined not in self.plan.names:
                raise FederationError(f"{label} says that it is silo {joined!r}, which the roster does not name")
            self.nodes[joined] = nodes[label]
            self.post.rename(label, joined)
            self._tell("join", "silo", silo=joined)
        missing = [name for name in self.plan.names if name not in self.nodes]
        if refusals and missing:
            raise refusals[0] if len(refusals) == 1 else RefusalError("\n".join(map(str, refusals)))
        if missing:
            raise FederationError(
                f"silos {', '.join(missing)} of the roster did not join; {len(nodes)} nodes were connected"
            )
        self.nodes = {name: self.nodes[name] for name in self.plan.names}

    def _wait_for_nodes(self) -> list[int]:
        deadline = time.monotonic() + WAIT_SECONDS
        needed, told = len(self.plan.silo), -1
        while len(nodes := list(self.grid.get_node_ids())) < needed:
            if len(nodes) != told:
                told = len(nodes)
                self._tell("join", "wait", connected=told, needed=needed)
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(nodes)} of {needed} silos connected within {WAIT_SECONDS:.0f} s; start the SuperNodes of "
                    "the others"
                )
            time.sleep(0.2)
        return nodes

    def _train(self) -> dict[str, TrainReply]:
        request = TrainRequest(**self._about)
        trained = {}
        for silo, _, reply in self._ask(TrainReply, {name: [request] for name in self.nodes}, len(self.nodes)):
            check_counts(self.layout, reply.examples, reply.tokens, f"silo {silo!r}")
            trained[silo] = reply
            self._tell("train", "silo", silo=silo, examples=reply.examples)
        return trained

    def _upload(self) -> Spool:
        spool = Spool(self.run.partial / "spool", self.layout, self.piece_bytes)
        requests = {
            name: [
                UploadRequest(**self._about, piece=number, piece_bytes=self.piece_bytes)
                for number in range(len(spool.pieces))
            ]
            for name in self.nodes
        }
        for silo, request, reply in self._ask(UploadReply, requests, UPLOADS):
            if reply.piece != request.piece:
                raise FederationError(f"silo {silo!r} sent piece {reply.piece}; piece {request.piece} was asked for")
            check_slices(spool.pieces[reply.piece], reply.arrays, f"silo {silo!r}")
            with self.run.writing():
                spool.save(silo, reply.piece, reply.arrays)
            self._tell("upload", "silo", silo=silo, piece=reply.piece + 1, pieces=len(spool.pieces))
        return spool

    def _evaluate(self, contributions: Mapping[str, Spooled], merged: Merged) -> list[dict[str, Any]]:
        if self.plan.privacy.metrics == "none":
            return []
        models = []
        if self.compare_silos:
            for name, contribution in contributions.items():
                arrays = {delta_block(t.name): contribution.block(delta_block(t.name)) for t in self.layout.tensors}
                models.append(self._measure(name, "silo", arrays))
        for kind, deltas in (("simple", merged.mean), ("regmean", merged.deltas)):
            arrays = {delta_block(name): delta.astype(np.float32) for name, delta in deltas.items()}
            models.append(self._measure(kind, kind, arrays))
        return models

    def _measure(self, name: str, kind: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Have every silo measure a model on its held-out examples, and add up."""
        request = EvaluateRequest(**self._about, candidate=name, arrays=arrays)
        shape = sums_shape(len(self.plan.model.labels))
        sums: dict[str, Sums] = {}
        for silo, _, reply in self._ask(EvaluateReply, {silo: [request] for silo in self.nodes}, len(self.nodes)):
            found = reply.arrays.get("sums")
            if reply.candidate != name or found is None or found.dtype != np.float64 or found.shape != shape:
                raise FederationError(
                    f"silo {silo!r} sent metrics of {reply.candidate!r} that do not fit; expected float64 sums of "
                    f"shape {shape} of {name!r}"
                )
            if not np.isfinite(found).all() or (self.plan.model.labels and (found.min() < 0 or found.sum() < 1)):
                raise FederationError(f"silo {silo!r} sent metrics of {name!r} that are no counts of examples")
            sums[silo] = found
        joint = np.sum([sums[silo] for silo in self.nodes], axis=0)
        model = {"name": name, "kind": kind, "metrics": metrics(joint)}
        if self.plan.privacy.metrics == "silo":
            model["silos"] = {silo: metrics(sums[silo]) for silo in self.nodes}
        self._tell("evaluate", "model", **model)
        return model

    def _ask(self, kind: type[R], requests: Mapping[str, Sequence[Q]], in_flight: int) -> Iterator[tuple[str, Q, R]]:
        """Ask the silos and yield (silo, request, reply), each reply checked to be that silo's and of its kind."""
        for silo, request, message in self.post.exchange(self.nodes, requests, in_flight):
            reply = expect(kind, request, message, f"silo {silo!r}")
            if reply.silo != silo:
                raise FederationError(f"the node of silo {silo!r} answered as {reply.silo!r}")
            yield silo, request, reply

    def _report(
        self, trained: Mapping[str, TrainReply], models: list[dict[str, Any]], merged: Merged
    ) -> dict[str, Any]:
        return {
            "run": self.run.path.name,
            "name": self.plan.plan.name,
            "plan_digest": self.plan.digest,
            "layout_digest": self.layout.digest,
            "base": {"name": self.plan.model.base, "sha256": self.base.sha256},
            "mode": "open",
            "silos": [{"name": name, "examples": trained[name].examples} for name in self.plan.names],
            "models": models,
            "solve": [asdict(step) for step in merged.steps],
            "bytes": {silo: dict(self.post.received[silo]) for silo in self.nodes},
            "bytes_to_silos": {silo: dict(self.post.sent[silo]) for silo in self.nodes},
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
            "versions": {
                name: importlib.metadata.version(name) for name in ("gramfuse", "flwr", "torch", "transformers")
            },
        }

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._tell(name, "start")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self._tell(name, "end", seconds=round(self.seconds[name], 3))

    def _tell(self, phase: str, state: str, **more: Any) -> None:
        self.observer({"phase": phase, "state": state, **more})


def needed_bytes(layout: Layout, silos: int, model_bytes: int) -> int:
    """Bytes that a run writes at most: all contributions, the model, and some room."""
    return silos * layout.contribution_bytes + 2 * model_bytes + 50 * 2**20
