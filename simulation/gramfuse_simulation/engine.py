"""The process that runs one simulation on Flower's simulation engine (Ray).

It is a separate process so that everything that Ray starts ends with it, and so that its exit status is reliable.
Takes a file written by `gramfuse_simulation.simulate`; writes the report or the error to another file.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gramfuse_server.merging.accumulator import Merged
    from gramfuse_server.report.schema import Report
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.conductor import Observer
    from gramfuse_server.run.exchange import Study
    from gramfuse_simulation.all_silos import AllSilos


LOG = "silo.log"
"""File name of a simulated silo's log in its state directory."""

RAY_SECONDS = 300.0
"""How long to wait for Ray to start; 10 to 30 s are usual."""


class SiloOfNode:
    """Maps simulated nodes to silos: the n-th partition is the n-th silo of the roster."""

    def __init__(
        self, files: list[str], state: str, plan_digest: str, *, tuned: bool = False, opened: bool = False
    ) -> None:
        self.files = files
        self.state = state
        self.plan_digest = plan_digest
        self.tuned = tuned
        self.opened = opened

    def __call__(self, context: Any) -> Any:
        """Return the Silo of a Flower context, and send its log to its own file."""
        from gramfuse_client.app import write_log

        file = self.files[int(context.node_config["partition-id"])]
        silo = simulated_silo(file, self.state, self.plan_digest, tuned=self.tuned, opened=self.opened)
        write_log(silo.state / LOG)
        return silo


def simulated_silo(file: str, state: str, plan_digest: str, *, tuned: bool = False, opened: bool = False) -> Any:
    """Return a Silo as in its file, but with the plan approved, and its state and key in a directory of the simulation.

    The user of a simulation already has all silos' data, so no approval is needed. All other limits hold.

    Args:
        file: DIR/silos/NAME.toml of a project; paths in its plan start at DIR.
        tuned: whether a search needs validation examples; they are split off the held-out ones if the file has none.
        opened: whether open uploads are allowed, regardless of the file: nothing leaves the machine.
    """
    from gramfuse_client.data.examples import HALF
    from gramfuse_client.silo_file import Silo

    silo = Silo.read(Path(file))
    directory = Path(state) / silo.name
    changes: dict[str, Any] = {
        "approved": (plan_digest,),
        "state": str(directory),
        "identity": str(directory / "identity.pem"),
    }
    changes["coordinator"] = None  # a simulation has none, so no node key is needed
    if tuned and silo.file.data.validation is None:
        changes["data"] = silo.file.data.model_copy(update={"validation": HALF})
    if opened:
        changes["limits"] = silo.file.limits.model_copy(update={"open_uploads": True})
    return Silo(silo.path, silo.file.model_copy(update=changes), silo.path.absolute().parent.parent)


def simulate(spec: dict[str, Any]) -> Report:
    """Run a simulation and return its report."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from gramfuse_client.app import SiloApp
    from gramfuse_client.state.state import State
    from gramfuse_server.app import coordinate

    plan = Plan.parse(spec["plan"])
    layout = Layout.parse(spec["layout"])
    reports: list[Report] = []
    files = dict(zip(plan.names, spec["silos"], strict=True))
    server = ServerApp()

    def finish(name: str, arrays: Mapping[str, NDArray[np.float32]], directory: Path) -> None:
        from gramfuse_client.exchange.local_model import Workbench

        silo = simulated_silo(files[name], spec["state"], plan.digest)
        state = State(silo.state, plan.digest, plan.trained_session)
        Workbench(silo, plan).finish(layout, arrays, state, directory)

    def observe(event: dict[str, Any]) -> None:
        with Path(spec["events"]).open("a", encoding="utf-8") as events:
            events.write(json.dumps(event) + "\n")

    @server.main()
    def main(grid: Any, context: Any) -> None:
        reports.append(
            coordinate(
                grid,
                plan,
                layout,
                Path(spec["directory"]),
                Path(spec["out"]),
                simulated=partial(laboratory_of, spec, plan, layout),
                study=study_of(spec, plan, layout),
                own_heads=finish,
                observer=observe,
                resumable=False,
            )
        )

    cores = os.cpu_count() or 1
    run_simulation(
        server_app=server,
        client_app=SiloApp(
            SiloOfNode(spec["silos"], spec["state"], plan.digest, tuned=bool(spec["tune"]), opened=spec["opened"])
        ),
        num_supernodes=len(plan.silo),
        backend_config={
            "init_args": {
                "include_dashboard": False,
                "num_cpus": cores,
                "_temp_dir": spec["ray"],
                "log_to_driver": True,
            },
            # Also the number of threads of a silo's process, unless its file sets one.
            "client_resources": {"num_cpus": max(1, cores // len(plan.silo)), "num_gpus": spec["gpus_per_silo"]},
        },
    )
    if not reports:
        raise FederationError("Flower's simulation ended before the exchange did; see its log")
    return reports[0]


def study_of(spec: dict[str, Any], plan: Plan, layout: Layout) -> Study | None:
    """Return the study of the merge: the search of `gramfuse tune`, and the comparisons of `--compare`."""
    if not spec["tune"] and not spec["compare"]:
        return None
    from gramfuse_server.report.studies import Studied
    from gramfuse_simulation.comparison import Comparison
    from gramfuse_simulation.terms import parse_terms
    from gramfuse_simulation.tuning import Wanted, tune

    def study(survivors: tuple[str, ...], merged: Merged, observer: Observer) -> tuple[Merged, Studied]:
        laboratory = laboratory_of(spec, plan, layout, plan.trained_session or 1, survivors)
        studied = Studied()
        if spec["tune"]:
            merged, studied = tune(laboratory, Wanted(**spec["tune"]), merged, observer)
        if spec["compare"]:
            compared = Comparison(laboratory, merged.deltas, observer).models(parse_terms(spec["compare"]))
            studied = studied._replace(models=(*studied.models, *compared))
        return merged, studied

    return study


def laboratory_of(
    spec: dict[str, Any], plan: Plan, layout: Layout, number: int, survivors: tuple[str, ...]
) -> AllSilos:
    """Return the laboratory of a session and the silos in its merge, from the silos' state on disk."""
    from gramfuse_client.state.state import State
    from gramfuse_simulation.all_silos import AllSilos

    files = dict(zip(plan.names, spec["silos"], strict=True))
    tuned = bool(spec["tune"])
    silos = {name: simulated_silo(files[name], spec["state"], plan.digest, tuned=tuned) for name in survivors}
    states = {name: State(silos[name].state, plan.digest, number) for name in survivors}
    contributions = {name: state.contribution(from_base=True) for name, state in states.items()}
    heads = {name: state.head() for name, state in states.items()} if plan.model.head == "own" else {}
    began = {}
    if plan.model.head == "fitted" and plan.training.epochs:
        first = State(next(iter(silos.values())).state, plan.digest, 2).start()
        began = {name.removeprefix(delta_block("")): delta for name, delta in first.items()}
    return AllSilos(plan, layout, Path(spec["directory"]), silos, contributions, heads, began)


def _end_with_parent() -> None:
    """Exit when the parent process is gone and can no longer clean up; Ray exits with us."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_without_ray(outcome: Path) -> None:
    """Exit with an error if Ray does not start: Flower would wait forever."""

    def watch() -> None:
        import ray

        time.sleep(RAY_SECONDS)
        if not ray.is_initialized():
            message = f"Flower's simulation failed: Ray did not start within {RAY_SECONDS:.0f} s"
            _write_outcome(outcome, {"error": "FederationError", "message": message})
            os._exit(FederationError.exit_code)

    threading.Thread(target=watch, daemon=True).start()


def _write_outcome(outcome: Path, document: Mapping[str, Any]) -> None:
    """Write the outcome, unless there is one."""
    if not outcome.exists():
        outcome.write_text(json.dumps(document), encoding="utf-8")


def main() -> int:
    """Run the simulation that the file named on the command line describes."""
    _end_with_parent()
    logging.basicConfig(level=logging.INFO)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _end_without_ray(Path(spec["outcome"]))
    try:
        outcome: dict[str, Any] = {"report": simulate(spec).document()}
        code = 0
    except GramfuseError as error:
        outcome = {"error": type(error).__name__, "message": str(error), "left": error.report and str(error.report)}
        code = error.exit_code
    except Exception as error:  # noqa: BLE001  # Flower and Ray have their own errors
        traceback.print_exc()
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and (behind := cause.__cause__ or cause.__context__):
            cause = behind  # Flower's own error has no details
        outcome = {
            "error": "FederationError",
            "message": f"Flower's simulation failed: {type(cause).__name__}: {cause}",
        }
        code = FederationError.exit_code
    _write_outcome(Path(spec["outcome"]), outcome)
    if code:  # a Flower thread may wait forever for nodes; our parent ends the processes of Ray
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
