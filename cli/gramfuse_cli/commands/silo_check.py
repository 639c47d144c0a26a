"""`gramfuse silo check`: prints what a silo's dry run found, and what would leave."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import Table, console, say, say_list, show_json
from gramfuse_protocol.contract.coverage import family
from gramfuse_protocol.errors import CheckError

if TYPE_CHECKING:
    from gramfuse_client.dry_run.check import DryRun
    from gramfuse_client.dry_run.findings import Finding
    from gramfuse_client.guard.disclosure import Departure, Leaving, SentArray

MOST_LINES = 60
"""Lines of one contribution's table that are still read; with more, those that differ in a number only become one."""

WIDE = 130
"""Columns from which on what a message says, and to whom, stand side by side."""

COPIED = re.compile(r" *(gramfuse |[a-z-]+ = )")
"""How a line begins that is a command or a line for a file: with words of ours, and nothing of others follows."""

MARKS = {
    "ok": ("ok", "green"),
    "notice": ("ok, but", "yellow"),
    "problem": ("PROBLEM", "bold red"),
    "skipped": ("-", "dim"),
}


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--plan",
    type=click.Path(path_type=Path, exists=True),
    metavar="PLAN",
    help="The locked plan.toml, or the directory that it and its layout.json are in.  "
    "[default: the plan that this silo joined last]",
)
@click.option("--offline", is_flag=True, help="Leave the coordinator alone; what is not looked at counts as well.")
@click.option(
    "--skip-bad",
    type=click.IntRange(0),
    metavar="N",
    help="Look on as if skip-bad = N stood in the silo file: up to N bad rows of each source are left out.",
)
@click.option("--all", "complete", is_flag=True, help="List every array that would leave, however many there are.")
@json_option
def check(file: Path, plan: Path | None, offline: bool, skip_bad: int | None, complete: bool, as_json: bool) -> None:
    """Say whether the silo of SILO_TOML is ready for a plan, and exactly what would leave it.

    This is a dry run: nothing is trained, nothing is written, and nothing of the silo's data is sent. Do it before you
    approve a plan, and again before a run.

    \b
    gramfuse silo check silo.toml --plan plan.toml

    First comes what was looked at, with what to do about each problem: the silo file, the plan against what the file
    allows, keys, state directory, ledger, data, base model, disk, memory, device, clock, and the connection to the
    coordinator. Then comes what one run would have leave, message by message: what it is, in what form, how much, to
    whom, and who could read it.

    Ends with 0 only if all is well, else with 19.
    """
    from gramfuse_client.dry_run.check import check as look

    report = look(file, plan, offline=offline, skip_bad=skip_bad, progress=lambda line: say(line, err=True))
    subjects = [finding.subject for finding in report.findings.problems]
    many = "1 problem" if len(subjects) == 1 else f"{len(subjects)} problems"
    error = CheckError(f"{file}: {many}: {', '.join(dict.fromkeys(subjects))}; what to do is said above")
    if as_json:
        show_json(_document(report, error if subjects else None))
    else:
        _print(report, complete)
    if subjects and not as_json:
        raise error
    if subjects:
        say(f"error: {error}", err=True)
        click.get_current_context().exit(CheckError.exit_code)


def _document(report: DryRun, error: CheckError | None) -> dict[str, Any]:
    """Return all of a report; `error` is there as for any command that fails."""
    leaving = report.leaving
    document: dict[str, Any] = {
        "ready": error is None,
        "file": report.file,
        "silo": report.silo,
        "plan": dict(report.plan),
        "findings": [asdict(finding) for finding in report.findings],
        "leaves": None if leaving is None else {**asdict(leaving), "bytes": leaving.bytes},
    }
    if error is not None:
        document["error"] = {"type": "CheckError", "message": str(error), "exit_code": CheckError.exit_code}
    return document


def _print(report: DryRun, complete: bool) -> None:
    say("What was looked at", style="bold")
    width = max(len(finding.subject) for finding in report.findings)
    for finding in report.findings:
        _print_finding(finding, width)
    if report.leaving is None:
        return
    leaving, name = report.leaving, report.plan["name"]
    say("")
    form = "masked" if leaving.secure else "open"
    title = (
        f"What would leave {report.silo} in one run of the plan {name}: {leaving.bytes:,} bytes, contribution {form}"
    )
    say(title, style="bold")
    _messages(leaving, wide=console().width >= WIDE).show()
    _print_list("Who could read it", leaving.claims)
    _print_list("What does not leave", leaving.stays)
    _print_list("Words", [f"{word}: {said}" for word, said in leaving.words.items()])
    for departure in leaving.departures:
        if departure.parts:
            _print_parts(departure, complete)


def _print_finding(finding: Finding, width: int) -> None:
    mark, style = MARKS["notice" if finding.state == "ok" and finding.remedy else finding.state]
    indent = " " * (12 + width)
    remedy = [f"{'  ' if number else '→ '}{line}" for number, line in enumerate(finding.remedy.splitlines())]
    first, *lines = [*finding.what.split("\n"), *remedy]
    say(f"{finding.subject:<{width}}  {first}", lead=(f"  {mark:<8}", style), indent=len(indent))
    for line in lines:
        say(indent + line, indent=len(indent), copied=COPIED.match(line) is not None)


def _messages(leaving: Leaving, *, wide: bool) -> Table:
    table = Table(footer=True)
    table.column("message", "in all")
    table.column("form")
    table.column("bytes", f"{leaving.bytes:,}", justify="right")
    for column in (
        ("what it says", "goes to", "can be read by") if wide else ("what it says, to whom, and who can read it",)
    ):
        table.column(column, fold=True)
    for departure in leaving.departures:
        size = "small" if departure.bytes is None else f"{departure.bytes:,}"
        said: list[str | tuple[str, ...]] = [departure.what, departure.to, departure.readers]
        if not wide:
            said = [(departure.what, f"to: {departure.to}", f"read by: {departure.readers}")]
        table.row(departure.phase, departure.form, size, *said)
    return table


def _print_parts(departure: Departure, complete: bool) -> None:
    """List the arrays of one message; those that differ in a number only in one line, if there are too many."""
    lines = [(part.name, part, 1) for part in departure.parts]
    if len(lines) > MOST_LINES and not complete:
        lines = _alike(departure.parts)
    title = f"In detail: {departure.what.partition(',')[0]}"
    if len(lines) < len(departure.parts):
        title += f"; arrays that differ in a number only are one line, --all lists all {len(departure.parts)}"
    table = Table(title, footer=True)
    table.column("name", "in all", fold=True)
    table.column("what it is", fold=True)
    table.column("shape")
    table.column("type")
    table.column("bytes", f"{sum(part.bytes for part in departure.parts):,}", justify="right")
    for name, part, count in lines:
        shape = " × ".join(f"{size:,}" for size in part.shape)
        times = f" (×{count})" if count > 1 else ""
        table.row(f"{name}{times}", part.what, shape, part.dtype, f"{count * part.bytes:,}")
    table.show()


def _alike(parts: Iterable[SentArray]) -> list[tuple[str, SentArray, int]]:
    """Return a line for all parts that are the same but for numbers in their names: `layer.*.weight`, and how many."""
    groups: dict[tuple[Any, ...], list[SentArray]] = {}
    for part in parts:
        groups.setdefault((family(part.name), part.dtype, part.shape, part.what), []).append(part)
    return [(key[0] if len(of) > 1 else of[0].name, of[0], len(of)) for key, of in groups.items()]


def _print_list(title: str, lines: Iterable[str]) -> None:
    say(title, style="bold")
    say_list(lines)
    say("")
