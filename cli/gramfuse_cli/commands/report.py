"""`gramfuse report`: makes a run's page again, from the files in its directory."""

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

    RUN is the directory of a run, of a failed run (NAME.failed), or of a gramfuse merge or tune of files. The page is
    one static file: it loads nothing and runs no script, and you can mail or print it. This also updates the page's
    line in RUN/SHA256SUMS.
    """
    from gramfuse_server.run_directory import PAGE, rewrite

    rewrite(run, PAGE, _page_of(run))
    path = run / PAGE
    if as_json:
        show_json({"page": str(path.absolute())})
    else:
        say(str(path), copied=True)


def _page_of(run: Path) -> str:
    """Return the HTML page of a run directory.

    Raises:
        RunDirectoryError: if it is not a run directory, or its report is damaged.
        PlanError: if its plan is damaged.
    """
    from gramfuse_protocol.contract.plan import Plan
    from gramfuse_server.report.page.page import page
    from gramfuse_server.report.page.view import damaged, read_report
    from gramfuse_server.run_directory import PLAN, REPORT, check_unchanged, failed_of

    file = run / REPORT
    if not file.is_file():
        failed = failed_of(run) if (failed_of(run) / REPORT).is_file() else None
        hint = (
            f"the run failed; its report is in {failed}" if failed else "expected a directory of a run, merge or tune"
        )
        raise RunDirectoryError(f"{run}: has no {REPORT}; {hint}")
    plan = None
    for name in (REPORT, PLAN):
        if (run / name).is_file():
            check_unchanged(run, name)
    if (run / PLAN).is_file():
        plan = Plan.read(run / PLAN)
    try:
        return page(read_report(file), plan)
    except (ValueError, LookupError, ArithmeticError) as error:  # inconsistent in itself, or with the plan
        raise damaged(file, f"{type(error).__name__}: {error}") from None
