"""`gramfuse silo`: commands of a silo's operator."""

from __future__ import annotations

import click

from gramfuse_cli.group import FileGroup


@click.group(cls=FileGroup, prefix="silo_")
def silo() -> None:
    """Take part as a silo: make its keys, check it, start it, see what it sent.

    \b
    Once, make the keys:      gramfuse silo keygen silo.toml
    Before approving a plan:  gramfuse silo check silo.toml --plan plan.toml
    To take part:             gramfuse silo start silo.toml
    To see what it sent:      gramfuse silo ledger show silo.toml
    After a failure:          gramfuse silo clear silo.toml --plan DIGEST

    A silo file (silo.toml) says what a silo contributes and what it allows. It is private to the silo. 'check' is a dry
    run and sends none of the silo's data; repeat it before a run. 'start' answers a coordinator, for plans that the
    file approves, until you stop it. The silo writes a line into its ledger before each message that it sends.
    """
