"""`gramfuse report`: the page of a run, made again from what lies in its directory."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.errors import RunDirectoryError


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@json_option
def report(run: Path, as_json: bool) -> None:
    """Make RUN/report.html again, from report.json and plan.toml there.

    RUN is a directory that a run left, also a failed one (NAME.failed), or that gramfuse merge or tune made of files.
    The page is one static file: it loads nothing, runs nothing, and can be mailed or printed. Its line of
    RUN/SHA256SUMS follows.
    """
    from gramfuse_server.run_directory import PAGE, rewrite

    rewrite(run, PAGE, _page_of(run))
    place = run / PAGE
    if as_json:
        show_json({"page": str(place.absolute())})
    else:
        say(str(place), copied=True)


def _page_of(run: Path) -> str:
    """Return the page of what lies in a run directory.

    Raises:
        RunDirectoryError: if that is no run directory, or its report is damaged.
        PlanError: if its plan is.
    """
    from gramfuse_protocol.contract.plan import Plan
    from gramfuse_server.report.page.page import page
    from gramfuse_server.report.page.view import damaged, read_report
    from gramfuse_server.run_directory import PLAN, REPORT, check_unchanged, failed_of

    file = run / REPORT
    if not file.is_file():
        there = failed_of(run) if (failed_of(run) / REPORT).is_file() else None
        hint = f"the run failed, and its report is in {there}" if there else "expected what a run, merge or tune made"
        raise RunDirectoryError(f"{run}: has no {REPORT}; {hint}")
    plan = None
    for name in (REPORT, PLAN):
        if (run / name).is_file():
            check_unchanged(run, name)
    if (run / PLAN).is_file():
        plan = Plan.read(run / PLAN)
    try:
        return page(read_report(file), plan)
    except (ValueError, LookupError, ArithmeticError) as error:  # its parts do not fit each other, or the plan
        raise damaged(file, f"{type(error).__name__}: {error}") from None
