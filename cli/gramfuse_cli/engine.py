"""The process that runs one simulation on Flower's simulation engine (Ray).

It is a process of its own so that whatever Ray starts can be ended with it, and so that its exit status is true.
Called with a file that `gramfuse_cli.simulate` writes; leaves the report, or the error, in a file of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.plan import Plan


class SimulatedSilos:
    """Finds the silo of a simulated node: the n-th of the roster for the n-th partition."""

    def __init__(self, files: list[str], state: str, plan_digest: str) -> None:
        self.files = files
        self.state = state
        self.plan_digest = plan_digest

    def __call__(self, context: Any) -> Any:
        """Return the Silo that a Flower context belongs to."""
        return simulated_silo(self.files[int(context.node_config["partition-id"])], self.state, self.plan_digest)


def simulated_silo(file: str, state: str, plan_digest: str) -> Any:
    """Return a Silo as in its file, but with the plan approved, its state and its key in a directory of the simulation.

    Whoever simulates owns all silos' data already, so there is nobody to ask for approval. All other limits hold.
    """
    from gramfuse_client.silo import Silo

    silo = Silo.read(Path(file))
    own = Path(state) / silo.name
    changes: dict[str, Any] = {"approved": (plan_digest,), "state": str(own), "identity": str(own / "identity.pem")}
    changes["coordinator"] = None  # there is none, so no node key is needed
    return Silo(silo.path, silo.file.model_copy(update=changes))


def simulate(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a simulation and return its report."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from gramfuse_client.app import SiloApp
    from gramfuse_client.state import State
    from gramfuse_server.app import coordinate

    plan = Plan.parse(spec["plan"])
    layout = Layout.parse(spec["layout"])
    reports: list[dict[str, Any]] = []
    server = ServerApp()

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
                own_models=lambda name: State(Path(spec["state"]) / name, plan.digest).contribution(),
                observer=observe,
            )
        )

    cores = os.cpu_count() or 1
    run_simulation(
        server_app=server,
        client_app=SiloApp(SimulatedSilos(spec["silos"], spec["state"], plan.digest)),
        num_supernodes=len(plan.silo),
        backend_config={
            "init_args": {
                "include_dashboard": False,
                "num_cpus": cores,
                "_temp_dir": spec["ray"],
                "log_to_driver": True,
            },
            # Ray gives a silo's process as many threads, where its file does not say how many.
            "client_resources": {"num_cpus": max(1, cores // len(plan.silo)), "num_gpus": spec["gpus_per_silo"]},
        },
    )
    if not reports:
        raise FederationError("Flower's simulation ended before the exchange did; its log has the details")
    return reports[0]


def _end_with_parent() -> None:
    """End this process when the command that started it is gone and can clean up no more; Ray ends with us."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the simulation that the file named on the command line describes."""
    _end_with_parent()
    logging.basicConfig(level=logging.INFO)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        outcome: dict[str, Any] = {"report": simulate(spec)}
        code = 0
    except GramfuseError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
        code = error.exit_code
    except Exception as error:  # noqa: BLE001  # Flower and Ray raise their own
        traceback.print_exc()
        outcome = {
            "error": "FederationError",
            "message": f"Flower's simulation failed: {type(error).__name__}: {error}",
        }
        code = FederationError.exit_code
    Path(spec["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
