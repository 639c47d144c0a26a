"""The Flower ServerApp: one planned exchange, from the run's configuration to a run directory.

The run's configuration holds `plan` (TOML text), `layout` (JSON text), `directory` (where relative paths of the
plan start), `run-directory` (where the result goes; must not exist), `resume` (whether to resume an interrupted run
there), and the fields of `gramfuse_server.run.patience.Patience`. `gramfuse run` fills it in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import GramfuseError, PlanError
from gramfuse_server.report.schema import Report
from gramfuse_server.run.conductor import Observer
from gramfuse_server.run.exchange import Exchange, Finish, Simulated, Study, needed_bytes
from gramfuse_server.run.patience import Patience
from gramfuse_server.run_directory import RunDirectory


def coordinate(
    grid: Grid,
    plan: Plan,
    layout: Layout,
    directory: Path,
    out: Path,
    *,
    simulated: Simulated | None = None,
    study: Study | None = None,
    own_heads: Finish | None = None,
    observer: Observer = lambda event: None,
    resume: bool = False,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    resumable: bool = True,
) -> Report:
    """Run all rounds of a plan and return the report; `out` is complete or absent afterwards.

    Args:
        directory: where relative paths of the plan start.
        out: the run directory.
        simulated, study, own_heads, observer, patience: passed to `gramfuse_server.run.exchange.Exchange`.
        resume: resume the interrupted run in `out`.
        resumable: whether to keep a failed run's state on disk for a later resume.

    Raises:
        GramfuseError: if the run fails; its `report` attribute is the path of the failed run's report.
    """
    if not plan.locked or layout.digest != plan.merge.layout:
        raise PlanError("the plan is not locked, or it is locked to another layout; run: gramfuse plan lock")
    base = load_base(plan, directory)
    model_bytes = sum(p.numel() * p.element_size() for p in base.model.parameters())
    with RunDirectory(out, needed_bytes(plan, layout, model_bytes), resume=resume, resumable=resumable) as run:
        exchange = Exchange(
            grid,
            plan,
            layout,
            base,
            run,
            simulated=simulated,
            study=study,
            own_heads=own_heads,
            observer=observer,
            patience=patience,
        )
        report = exchange.start()
        run.finish()
    exchange.finish()
    return report


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the exchange that the run's configuration describes; events go to the log as lines of JSON."""
    config = {key: str(context.run_config[key]) for key in ("plan", "layout", "directory", "run-directory")}
    try:
        coordinate(
            grid,
            Plan.parse(config["plan"], "plan of the run"),
            Layout.parse(config["layout"], "layout of the run"),
            Path(config["directory"]),
            Path(config["run-directory"]),
            observer=_print,
            resume=bool(context.run_config["resume"]),
            patience=Patience.from_run(context.run_config),
        )
    except GramfuseError as error:
        report = error.report and str(error.report)
        _print(
            {"phase": "end", "state": "failed", "error": type(error).__name__, "message": str(error), "report": report}
        )
        raise


def _print(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)
