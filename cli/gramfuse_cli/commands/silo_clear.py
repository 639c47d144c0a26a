"""`gramfuse silo clear`: what only a silo's owner may undo."""

from __future__ import annotations

import re
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.errors import PlanError


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--plan", metavar="DIGEST", help="Clear the failures under the plan of this digest.")
@click.option("--round", "number", type=click.IntRange(1), metavar="N", help="Of one round only.")
@click.option("--releases", is_flag=True, help="Forget which rows were in which sums.")
@json_option
def clear(file: Path, plan: str | None, number: int | None, releases: bool, as_json: bool) -> None:
    """Clear failures of the silo of SILO_TOML, or forget which rows were in which sums.

    A silo that fails at work on its data takes no further part in that round of the plan: a coordinator that could try
    again and again would read the data by what fails. Look into the silo's log, remove the cause, and clear the
    failure if you trust that it was none of the coordinator's making.

    \b
    gramfuse silo clear silo.toml --plan 4e464a7e…

    A silo also remembers, over all plans, which rows it contributed and with which silos, and signs no sum whose
    difference from an earlier one would be the part of a few silos. After --releases it remembers none of the sums
    before: whoever has one of them may subtract the next.

    Both leave a line in the ledger.
    """
    from gramfuse_client.guard.ledger import Ledger
    from gramfuse_client.guard.ledger_lines import Entry
    from gramfuse_client.guard.releases import Releases
    from gramfuse_client.silo_file import Silo
    from gramfuse_client.state.state import State
    from gramfuse_protocol.files import exclusive

    if (plan is None) == (not releases):
        raise click.UsageError("give --plan DIGEST to clear failures, or --releases to forget sums")
    if plan is not None and not re.fullmatch("[0-9a-f]{64}", plan):
        raise click.BadParameter("expected the 64 hexadecimal digits of a plan's digest", param_hint="--plan")
    silo = Silo.read(file)
    if not silo.state.is_dir():
        raise PlanError(f"{file}: {silo.state} is not there; this silo has taken no part so far")
    with exclusive(silo.state / "lock"):
        if plan is None:
            count = Releases(silo.state / "releases").clear()
            what = f"sums forgotten by the silo's owner: {count}"
        else:
            count = State(silo.state, plan).attempts.clear(number)
            of = f" of round {number}" if number else ""
            what = f"failures{of} cleared by the silo's owner: {count}"
        if count:
            entry = Entry(plan=plan or "", phase="clear", kind="clear", form="no data", note=what)
            Ledger(silo.ledger, silo.name).append(entry)
    if as_json:
        show_json({"silo": silo.name, "plan": plan, "cleared": count})
    else:
        say(what)
