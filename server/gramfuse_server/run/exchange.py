"""One run, from the first message to the merged model: one session for each stage of the plan."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gramfuse_model.loading.auto_classes import merged_form
from gramfuse_model.loading.base_model import Base
from gramfuse_protocol.contract.form import PIECE_BYTES
from gramfuse_protocol.contract.layout import ITEM_BYTES, Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import REFITTED, Stage, describe_stage
from gramfuse_protocol.contract.whole_model import with_zeros, without_zeros
from gramfuse_protocol.errors import (
    ContributionError,
    FederationError,
    GramfuseError,
    MergeError,
    RefusalError,
    RunDirectoryError,
)
from gramfuse_protocol.files import replacing
from gramfuse_protocol.held_out.metrics import Sums
from gramfuse_server.merging.accumulator import Merged, rounded
from gramfuse_server.report.merged_model import write_model
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import (
    SCHEMA,
    BaseOfReport,
    ExactFigures,
    Failure,
    Generation,
    Measured,
    Report,
    RoundOfReport,
    SiloOfReport,
)
from gramfuse_server.report.studies import Studied
from gramfuse_server.report.verdicts import describe_bad
from gramfuse_server.run.conductor import Conductor, Observer
from gramfuse_server.run.evaluation import NamedModel, silo_models, to_measured
from gramfuse_server.run.head_choice import choose
from gramfuse_server.run.patience import Patience
from gramfuse_server.run.round import Round
from gramfuse_server.run_directory import PAGE, PLAN, REPORT, START, RunDirectory, of_round

OUTCOME = "outcome"
"""Checkpoint key of a completed round's report."""

N = TypeVar("N", int, float)


class Laboratory(Protocol):
    """All silos of one round in one process, without messages; exists only in simulations."""

    def deltas(self, silo: str) -> Mapping[str, NDArray[Any]]:
        """Return a silo's own model: its differences from the base by parameter name, in the parameter's shape."""

    def measure(self, deltas: Mapping[str, NDArray[Any]]) -> Mapping[str, Sums]:
        """Return the exact held-out sums of base + deltas, by silo."""


Simulated = Callable[[int, tuple[str, ...]], Laboratory]
"""Returns the laboratory for a round's number and the silos in its merge."""

Study = Callable[[tuple[str, ...], Merged, Observer], tuple[Merged, Studied]]
"""Studies the last round's merge before it is measured and written; needs all silos' statistics and data.

Takes the survivors, the merge as differences from the base, and an observer of its progress. Returns the merge to
measure and write, and what to add to the report.
"""


Finish = Callable[[str, Mapping[str, NDArray[np.float32]], Path], None]
"""Writes a silo's finished model. Takes its name, the merged body's differences from the base by block name, and the
directory to create."""


class _Parts(NamedTuple):
    """The silos that have part in a result.

    Attributes:
        trained: who fine-tuned, in any round; without training, those whose examples the head was fitted to.
        fitted, refitted: those whose examples the head was fitted to, before training and after the merge.
    """

    trained: tuple[str, ...]
    fitted: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()


class Exchange:
    """The coordinator's side of one run.

    Args:
        grid: Flower's grid.
        plan: locked.
        layout: the plan's.
        base: the plan's base model; it becomes the merged model.
        run: the run directory, entered.
        simulated: if given, also measures each silo's own model at all silos, and reports the exact value of each noisy
            metric; for simulations only. Sends no messages.
        study: if given, studies the merge; for simulations only.
        own_heads: if given, and if silos keep their heads, writes each silo's finished model into the run directory;
            for simulations only.
        piece_bytes: most bytes of a contribution in one message; a multiple of 16.
        patience: how long to wait for silos.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        layout: Layout,
        base: Base,
        run: RunDirectory,
        *,
        simulated: Simulated | None = None,
        study: Study | None = None,
        own_heads: Finish | None = None,
        observer: Observer = lambda event: None,
        piece_bytes: int = PIECE_BYTES,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.base = base
        self.run = run
        self.simulated = simulated
        self.study = study
        self.own_heads = own_heads
        self.piece_bytes = piece_bytes
        self._conductor = partial(
            Conductor,
            grid,
            plan,
            run,
            observer,
            patience=patience,
        )
        self._rounds: list[Round] = []

    def start(self) -> Report:
        """Run all stages and write the run directory, except for its checksums and final name.

        Returns:
            The report, as in report.json.

        Raises:
            GramfuseError: if the run fails; the message names the silo. `run.account` then returns the failed run's
                report.
        """
        self.run.write(PLAN, self.plan.to_toml())
        self.run.write("layout.json", self.layout.to_json())
        report = self._conclude(*self._last_session())
        self.run.write(REPORT, report.text)
        self.run.write(PAGE, page(report, self.plan))
        return report

    def finish(self) -> None:
        """Have the silos wipe their state of the run; call it once the run directory is complete."""
        conductors = [current.conductor for current in self._rounds]
        last = {silo: conductor for conductor in conductors for silo in conductor.joined}
        for conductor in conductors:
            if silos := [silo for silo in conductor.joined if last[silo] is conductor]:
                conductor.finish(silos)

    def _last_session(self) -> tuple[Round, Merged]:
        """Run all sessions up to the last, and return that one with its merge."""
        number = 1
        while True:
            if of_round(OUTCOME, number) not in self.run.done:
                current = self._begin(number)
                try:
                    merged = current.merge()
                    if current.stage.work == "refit":
                        self._check_refit(current, merged)
                except (FederationError, RefusalError, MergeError, ContributionError) as error:
                    if current.stage.work != "refit":
                        raise
                    return self._ended_before(current, str(error))
                if not current.stage.last:
                    current.unfitted = self._why_unfitted(current)
                if current.stage.last or current.unfitted is not None:
                    return current, merged
                self._pass_on(current, merged)
            number += 1

    def _check_refit(self, current: Round, merged: Merged) -> None:
        """Raise MergeError if a check of a head that was fitted again is bad: the merge before it is still good."""
        current.check(self.base, merged)
        if not current.sound:
            raise MergeError(f"{describe_stage(current.stage)}: {describe_bad(current.checks)}")

    def _why_unfitted(self, current: Round) -> str | None:
        """Return why the head cannot be fitted after a session, because silos are missing that a fit would need."""
        following = self.plan.stage(current.conductor.round + 1)
        if not self.plan.privacy.secure_aggregation or following.work != "refit":
            return None
        needed = self._conductor(number=current.conductor.round + 1).only
        missing = [silo for silo in needed if silo not in current.survivors]
        if not missing:
            return None
        return (
            f"{', '.join(missing)} had part in the first fit of the head, and not in the merge; the difference of two "
            "fits would be about them alone"
        )

    def _ended_before(self, current: Round, why: str) -> tuple[Round, Merged]:
        """Return the session before a fit of the head that failed, with its merge: the run ends with that."""
        number = current.conductor.round - 1
        last = Round(self._conductor(number=number), self.layout, self._head, {}, self.piece_bytes)
        report = RoundOfReport.read(self.run.done[of_round(OUTCOME, number)])
        merged = self._merged_before(current)
        last.conclude(report, merged)
        last.unfitted = why
        return last, merged

    def _merged_before(self, current: Round) -> Merged:
        """Return the merge that a session started from."""
        number = current.conductor.round
        start = self._read_start(number)
        deltas = {tensor.name: start[delta_block(tensor.name)].astype(np.float64) for tensor in self.layout.tensors}
        return Merged(deltas, deltas, RoundOfReport.read(self.run.done[of_round(OUTCOME, number - 1)]).solve)

    def _begin(self, number: int) -> Round:
        """Return a session: a new one, or an interrupted one with its completed phases."""
        start = {} if number == 1 else self._read_start(number)
        current = Round(self._conductor(number=number), self.layout, self._head, start, self.piece_bytes)
        self._rounds.append(current)
        self.run.account = partial(self._failure_texts, current)
        return current

    @cached_property
    def _head(self) -> Mapping[str, NDArray[np.float32]]:
        """Values of the base's head, if the plan fits one, by parameter name."""
        names = () if self.layout.head is None else self.layout.head.tensors
        values = self.base.model.state_dict()
        return {name: values[name].cpu().float().numpy().copy() for name in names}

    def _pass_on(self, current: Round, merged: Merged) -> None:
        """End a session that is not the last, and save the model that the next one starts from."""
        current.check(self.base, merged)
        if not current.sound:
            raise MergeError(
                f"{describe_stage(current.stage)}: {describe_bad(current.checks)}. The run stops at this merge"
            )
        self._measure(current, merged)
        path = self._start(current.conductor.round + 1)
        with self.run.writing(), replacing(path, private=True) as temporary:
            whole = {delta_block(name): delta for name, delta in merged.rounded().items()}
            save_file(without_zeros(whole), temporary)
        current.conductor.keep("lost", current.lost)
        current.conductor.keep(OUTCOME, current.report().document())
        for spool in ("spool", "spool-metrics"):
            shutil.rmtree(current.conductor.place(spool), ignore_errors=True)

    def _earlier(self, number: int) -> list[RoundOfReport]:
        """Return the saved reports of the sessions before one."""
        return [RoundOfReport.read(self.run.done[of_round(OUTCOME, each)]) for each in range(1, number)]

    def _conclude(self, current: Round, merged: Merged) -> Report:
        """End the last session: measure, write the model, and return the report."""
        conductor = current.conductor
        earlier = self._earlier(conductor.round)
        studied = Studied()
        if self.study is not None:
            with conductor.phase("study"):
                merged, studied = self.study(current.survivors, merged, conductor.observer)
            current.merged = merged
        if not current.concluded:
            if current.stage.work != "refit":
                current.check(self.base, merged)
            self._measure(current, merged)
            current.choice = choose(self.plan, current.stage, current.judged)
        current.models += studied.models
        models = [*(model for one in earlier for model in one.models), *current.models]
        if current.result != current.stage.merged:
            merged = self._merged_before(current)
        with conductor.phase("write"):
            measured = next((model for model in reversed(models) if model.kind == current.result), None)
            with self.run.writing():
                chosen = None if studied.tuning is None else studied.tuning.chosen
                doubt = "" if current.sound else describe_bad(current.checks)
                parts = self._parts(current)
                about = (parts.trained, measured, chosen, doubt, self.layout, merged.steps)
                deltas = merged.rounded()
                write_model(
                    self.run.partial, self.base, deltas, self.plan, *about, fitted=parts.fitted, refitted=parts.refitted
                )
                if self.own_heads is not None and self.plan.model.head == "own":
                    arrays = {delta_block(name): delta for name, delta in deltas.items()}
                    for silo in current.survivors:
                        self.own_heads(silo, arrays, self.run.partial / "models" / silo)
        report = self._report(current, earlier)
        return report if studied.tuning is None else report.updated(tuning=studied.tuning)

    def _measure(self, current: Round, merged: Merged) -> None:
        """Have the survivors measure the plan's candidates, and a simulation's laboratory measure all models."""
        candidates = self._candidates(current.stage, merged)
        current.measure(
            NamedModel(name, {delta_block(block): d for block, d in deltas.items()}) for name, deltas in candidates
        )
        if self.simulated is None or current.unmeasured is not None:
            return
        conductor, silos = current.conductor, current.measured
        with conductor.phase("exact"):
            laboratory = self.simulated(conductor.round, current.survivors)

            def measure(name: str, deltas: Mapping[str, NDArray[Any]]) -> dict[str, Sums]:
                sums = laboratory.measure(deltas)
                conductor.tell("exact", "measured", name=name)
                return {silo: sums[silo] for silo in silos}

            owners = () if current.stage.fits_head else silos
            alone = {silo: measure(silo, laboratory.deltas(silo)) for silo in owners}
            noisy = {model.name for model in current.models if model.privacy is not None}
            exact = {
                name: _exact_figures(to_measured(self.plan, name, name, measure(name, deltas)))
                for name, deltas in self._candidates(current.stage, merged)
                if name in noisy
            }
        models = [model.updated(exact=exact[model.name]) if model.name in exact else model for model in current.models]
        current.models = (silo_models(self.plan, alone) if alone else []) + models

    def _candidates(self, stage: Stage, merged: Merged) -> Iterator[tuple[str, dict[str, NDArray[np.float32]]]]:
        """Yield (name, differences by parameter name) of the models that silos get; the merge comes last."""
        deltas = {"simple": merged.mean, stage.merged: merged.deltas}
        for name in sorted({*stage.measured, stage.merged}, key=stage.merged.__eq__):
            yield name, rounded(deltas[name])

    def _report(self, current: Round, earlier: list[RoundOfReport]) -> Report:
        """Return the report of the last round, with the traffic and seconds of all rounds."""
        rounds = (*earlier, current.report())
        trained: dict[str, Any] = {}
        for number in sorted(range(1, current.conductor.round + 1), key=lambda n: self.plan.stage(n).work == "train"):
            trained |= self.run.done.get(of_round("train", number)) or {}
        names = self._contributors(current)
        silos = tuple(SiloOfReport(name=name, examples=trained[name]["examples"]) for name in names)
        return Report(**self._settings(), **self._results(current, rounds), silos=silos, rounds=rounds)

    def _contributors(self, current: Round) -> tuple[str, ...]:
        """Return the silos whose examples are in the result, in roster order."""
        every = {name for silos in self._parts(current) for name in silos}
        return tuple(name for name in self.plan.names if name in every)

    def _parts(self, current: Round) -> _Parts:
        """Return the silos that have part in the result.

        They differ where a silo was lost in between, or, in open mode, came back.
        """
        number, plan = current.conductor.round, self.plan
        sessions = {one.round: one.survivors for one in self._earlier(number)} | {number: current.survivors}

        def of(work: str) -> tuple[str, ...]:
            those = [survivors for each, survivors in sessions.items() if plan.stage(each).work == work]
            return tuple(name for name in plan.names if any(name in survivors for survivors in those))

        if not plan.training.epochs:
            return _Parts(of("fit"))
        return _Parts(of("train"), of("fit"), of("refit") if current.result == REFITTED else ())

    def _failure_texts(self, current: Round, error: GramfuseError, resumable: bool) -> dict[str, str]:
        """Return the files of a failed run: its page, its report as far as it got, and the plan."""
        number = current.conductor.round
        earlier = self._earlier(number)
        failure = Failure(
            error=type(error).__name__,
            message=str(error),
            phase=current.conductor.current_phase,
            round=number,
            exit_code=error.exit_code,
            resumable=resumable,
        )
        report = Report(
            **self._settings(),
            **self._results(current, (*earlier, current.report())),
            silos=current.silos,
            rounds=tuple(earlier),
            failure=failure,
        )
        return {PAGE: page(report, self.plan), REPORT: report.text, PLAN: self.plan.to_toml()}

    def _settings(self) -> dict[str, Any]:
        """Return the keys of the report that are known before the run starts."""
        names = ("gramfuse", "flwr", "torch", "transformers")
        generation = {name: task.generation for name, task in self.plan.tasks.items()}
        return {
            "schema": SCHEMA,
            "run": self.run.path.name,
            "name": self.plan.plan.name,
            "plan_digest": self.plan.digest,
            "layout_digest": self.layout.digest,
            "base": BaseOfReport.read({"name": self.plan.model.base, "sha256": self.base.pins.sha256}),
            "auto_class": merged_form(self.plan).auto,
            "outputs": self.plan.outputs,
            "head": self.plan.model.head,
            "tasks": {name: task.task for name, task in self.plan.tasks.items()},
            "generation": {name: Generation.read(settings) for name, settings in generation.items() if settings},
            "mode": "secure" if self.plan.privacy.secure_aggregation else "open",
            "identities": "made for this run" if self.simulated else "those of the plan",
            "versions": {name: importlib.metadata.version(name) for name in names},
        }

    def _results(self, current: Round, rounds: Sequence[RoundOfReport]) -> dict[str, Any]:
        """Return the keys of the report that the rounds filled; of a failed run, those that exist."""
        examples = {}
        if current.merged is not None:
            same = [one for one in rounds if one.examples and one.survivors == self._contributors(current)]
            counted = [one.examples for one in same if one.work == "train"] or [one.examples for one in same]
            examples = {"examples": counted[-1] if counted else 0}
        late = [one for one in rounds if one.round >= min(self.plan.trained_session or 1, rounds[-1].round)]
        return {
            **examples,
            "merged": current.result,
            "unfitted": current.unfitted,
            **({} if current.choice is None else {"head_choice": current.choice}),
            **{key: getattr(rounds[-1], key) for key in ("lost", "unmeasured") if rounds[-1].has(key)},
            **{
                key: tuple(item for one in late for item in getattr(one, key))
                for key in ("models", "solve", "checks")
                if any(one.has(key) for one in late)
            },
            "bytes": _total(one.bytes for one in rounds),
            "bytes_to_silos": _total(one.bytes_to_silos for one in rounds),
            "seconds": {phase: round(took, 3) for phase, took in _sum(one.seconds for one in rounds).items()},
        }

    def _start(self, number: int) -> Path:
        """Return the path of the model that a session starts from; it is removed when the run completes."""
        return self.run.partial / f"{of_round(START, number)}.safetensors"

    def _read_start(self, number: int) -> Mapping[str, NDArray[np.float32]]:
        path = self._start(number)
        try:
            start = with_zeros(self.layout, load_file(path))
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"{path}: cannot be read: {error}; remove {self.run.partial} and start a new run"
            ) from None
        return start


def _exact_figures(model: Measured) -> ExactFigures:
    figures = ExactFigures(metrics=model.metrics)
    return figures.updated(labels=model.labels) if model.labels else figures


def _sum(counts: Iterable[Mapping[str, N]]) -> dict[str, N]:
    """Return the sum of counts by name."""
    total: dict[str, N] = {}
    for by_name in counts:
        for name, count in by_name.items():
            total[name] = total[name] + count if name in total else count
    return total


def _total(traffic: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the sum of traffic by silo and phase."""
    by_round = list(traffic)
    silos = dict.fromkeys(silo for by_silo in by_round for silo in by_silo)
    return {silo: _sum(by_silo.get(silo, {}) for by_silo in by_round) for silo in silos}


def needed_bytes(plan: Plan, layout: Layout, model_bytes: int) -> int:
    """Return the most bytes that a run writes: a session's contributions, start models, final models, and a margin."""
    each = max(stage.form(layout).upload_bytes(masked=plan.privacy.secure_aggregation) for stage in plan.stages)
    starts = (len(plan.stages) - 1) * ITEM_BYTES * sum(piece.block.entries for piece in layout.deltas)
    models = 2 + (len(plan.silo) if plan.model.head == "own" else 0)
    return len(plan.silo) * each + starts + models * model_bytes + 50 * 2**20
