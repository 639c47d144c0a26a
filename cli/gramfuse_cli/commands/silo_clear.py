"""`gramfuse silo clear`: clears failures or remembered sums, which only a silo's owner may do."""

from __future__ import annotations

import re
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.errors import PlanError


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--plan", metavar="DIGEST", help="Clear the failures under the plan with this digest.")
@click.option(
    "--exchange", "number", type=click.IntRange(1), metavar="N", help="Clear only the failures of exchange N."
)
@click.option("--releases", is_flag=True, help="Forget which rows were in which sums.")
@json_option
def clear(file: Path, plan: str | None, number: int | None, releases: bool, as_json: bool) -> None:
    """Clear failures of the silo of SILO_TOML, or forget which rows were in which sums.

    A silo that fails while it works on its data takes no further part in that exchange of the plan. Otherwise a
    coordinator could try again and again, and learn about the data from what fails. Look into the silo's log, remove
    the cause, and clear the failure if you trust that the coordinator did not provoke it.

    \b
    gramfuse silo clear silo.toml --plan 4e464a7e…

    A silo also remembers, across all plans, which rows it contributed and with which silos. It signs no sum whose
    difference from an earlier one would reveal the contribution of a few silos. --releases makes it forget all earlier
    sums: anyone who has one of them can then subtract it from the next.

    Both write a line into the ledger.
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
        raise click.BadParameter("expected a plan's digest, 64 hexadecimal digits", param_hint="--plan")
    silo = Silo.read(file)
    if not silo.state.is_dir():
        raise PlanError(f"{file}: {silo.state} does not exist; this silo has not taken part in a run yet")
    with exclusive(silo.state / "lock"):
        if plan is None:
            count = Releases(silo.state / "releases").clear()
            note = f"sums forgotten by the silo's owner: {count}"
        else:
            count = State(silo.state, plan).attempts.clear(number)
            of_exchange = f" of exchange {number}" if number else ""
            note = f"failures{of_exchange} cleared by the silo's owner: {count}"
        if count:
            entry = Entry(plan=plan or "", phase="clear", kind="clear", form="no data", note=note)
            Ledger(silo.ledger, silo.name).append(entry)
    if as_json:
        show_json({"silo": silo.name, "plan": plan, "cleared": count})
    else:
        say(note)
