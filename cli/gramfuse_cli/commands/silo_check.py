"""`gramfuse silo check`: prints the findings of a silo's dry run, and what a run would send."""

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
    from gramfuse_client.guard.disclosure import Departure, Disclosure, SentArray

MOST_LINES = 60
"""Longest table of one contribution's arrays; in a longer one, arrays that differ only in a number share a row."""

WIDE = 130
"""Minimum terminal width for showing content, recipient and readers in separate columns."""

COPIED = re.compile(r" *(gramfuse |[a-z-]+ = )")
"""Matches a command or a line for a file, which users copy. Such a line contains only our own text."""

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
    help="The locked plan.toml, or the directory that holds it and layout.json.  "
    "[default: the plan that this silo joined last]",
)
@click.option(
    "--offline", is_flag=True, help="Do not contact the coordinator. Skipped checks do not count as problems."
)
@click.option(
    "--skip-bad",
    type=click.IntRange(0),
    metavar="N",
    help="Check as if the silo file had skip-bad = N: leave out up to N bad rows of each source.",
)
@click.option("--all", "complete", is_flag=True, help="List every array that a run would send, however many.")
@json_option
def check(file: Path, plan: Path | None, offline: bool, skip_bad: int | None, complete: bool, as_json: bool) -> None:
    """Check whether the silo of SILO_TOML is ready for a plan, and show exactly what a run would send.

    This is a dry run: it trains nothing, writes nothing, and sends nothing of the silo's data. Do it before you approve
    a plan, and again before a run.

    \b
    gramfuse silo check silo.toml --plan plan.toml

    First come the findings, with what to do about each problem: the silo file, the plan against what the file allows,
    keys, state directory, ledger, data, base model, disk, memory, device, clock, and the connection to the coordinator.
    Then comes everything that one run would send, message by message: its content, form, size and recipient, and who
    could read it.

    Exits with 0 if there is no problem, otherwise with 19.
    """
    from gramfuse_client.dry_run.check import check as dry_run

    report = dry_run(file, plan, offline=offline, skip_bad=skip_bad, progress=lambda line: say(line, err=True))
    subjects = [finding.subject for finding in report.findings.problems]
    count = "1 problem" if len(subjects) == 1 else f"{len(subjects)} problems"
    error = CheckError(f"{file}: {count}: {', '.join(dict.fromkeys(subjects))}; see above for what to do")
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
    """Return a report as JSON; `error` has the same form as for any command that fails."""
    disclosure = report.disclosure
    document: dict[str, Any] = {
        "ready": error is None,
        "file": report.file,
        "silo": report.silo,
        "plan": dict(report.plan),
        "findings": [asdict(finding) for finding in report.findings],
        "leaves": None if disclosure is None else {**asdict(disclosure), "bytes": disclosure.bytes},
    }
    if error is not None:
        document["error"] = {"type": "CheckError", "message": str(error), "exit_code": CheckError.exit_code}
    return document


def _print(report: DryRun, complete: bool) -> None:
    say("Findings", style="bold")
    width = max(len(finding.subject) for finding in report.findings)
    for finding in report.findings:
        _print_finding(finding, width)
    if report.disclosure is None:
        return
    disclosure, name = report.disclosure, report.plan["name"]
    say("")
    form = "masked" if disclosure.secure else "open"
    title = f"What {report.silo} would send in one run of plan {name}: {disclosure.bytes:,} bytes, contribution {form}"
    say(title, style="bold")
    _messages(disclosure, wide=console().width >= WIDE).show()
    _print_list("Who could read it", disclosure.claims)
    _print_list("What stays here", disclosure.stays)
    _print_list("Terms", [f"{term}: {meaning}" for term, meaning in disclosure.words.items()])
    for departure in disclosure.departures:
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


def _messages(disclosure: Disclosure, *, wide: bool) -> Table:
    table = Table(footer=True)
    table.column("message", "total")
    table.column("form")
    table.column("bytes", f"{disclosure.bytes:,}", justify="right")
    for column in ("content", "recipient", "readable by") if wide else ("content, recipient, and who can read it",):
        table.column(column, fold=True)
    for departure in disclosure.departures:
        size = "small" if departure.bytes is None else f"{departure.bytes:,}"
        cells: list[str | tuple[str, ...]] = [departure.what, departure.to, departure.readers]
        if not wide:
            cells = [(departure.what, f"to: {departure.to}", f"readable by: {departure.readers}")]
        table.row(departure.phase, departure.form, size, *cells)
    return table


def _print_parts(departure: Departure, complete: bool) -> None:
    """List the arrays of one message; if there are too many, arrays that differ only in a number share a row."""
    lines = [(part.name, part, 1) for part in departure.parts]
    if len(lines) > MOST_LINES and not complete:
        lines = _alike(departure.parts)
    where = departure.what.partition("; in ")[2]
    title = f"In detail: {departure.what.partition(',')[0]}{f', in {where}' if where else ''}"
    if len(lines) < len(departure.parts):
        title += f"; arrays that differ only in a number share a row, --all lists all {len(departure.parts)}"
    table = Table(title, footer=True)
    table.column("name", "total", fold=True)
    table.column("content", fold=True)
    table.column("shape")
    table.column("type")
    table.column("bytes", f"{sum(part.bytes for part in departure.parts):,}", justify="right")
    for name, part, count in lines:
        shape = " × ".join(f"{size:,}" for size in part.shape)
        times = f" (×{count})" if count > 1 else ""
        table.row(f"{name}{times}", part.what, shape, part.dtype, f"{count * part.bytes:,}")
    table.show()


def _alike(parts: Iterable[SentArray]) -> list[tuple[str, SentArray, int]]:
    """Group parts that differ only in numbers in their names; return each group's name, first part and size."""
    groups: dict[tuple[Any, ...], list[SentArray]] = {}
    for part in parts:
        groups.setdefault((family(part.name), part.dtype, part.shape, part.what), []).append(part)
    return [
        (key[0] if len(members) > 1 else members[0].name, members[0], len(members)) for key, members in groups.items()
    ]


def _print_list(title: str, lines: Iterable[str]) -> None:
    say(title, style="bold")
    say_list(lines)
    say("")
