"""`gramfuse silo check`: prints what a silo's dry run found, and what would leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gramfuse_cli.ledger import printable
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.plan import family
from gramfuse_protocol.errors import CheckError

if TYPE_CHECKING:
    from gramfuse_client.check import Report
    from gramfuse_client.departures import Departure, Leaving, Part
    from gramfuse_client.finding import Finding

MOST_LINES = 60
"""Lines of one contribution's table that are still read; with more, those that differ in a number only become one."""

WIDE = 130
"""Columns from which on what a message says, and to whom, stand side by side."""

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
@click.option("--all", "complete", is_flag=True, help="List every array that would leave, however many there are.")
@json_option
def check(file: Path, plan: Path | None, offline: bool, complete: bool, as_json: bool) -> None:
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
    from gramfuse_client.check import check as look

    report = look(file, plan, offline=offline, progress=lambda line: click.echo(line, err=True))
    subjects = [finding.subject for finding in report.findings.problems]
    many = "1 problem" if len(subjects) == 1 else f"{len(subjects)} problems"
    error = CheckError(f"{file}: {many}: {', '.join(dict.fromkeys(subjects))}; what to do is said above")
    if as_json:
        click.echo(json.dumps(_document(report, error if subjects else None)))
    else:
        # A pipe has no width, and lines that are folded in one are of no use to grep.
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
        _print(console, report, complete)
    if subjects and not as_json:
        raise error
    if subjects:
        click.echo(f"error: {error}", err=True)
        click.get_current_context().exit(CheckError.exit_code)


def _document(report: Report, error: CheckError | None) -> dict[str, Any]:
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


def _print(console: Console, report: Report, complete: bool) -> None:
    console.print(Text("What was looked at", style="bold"))
    width = max(len(finding.subject) for finding in report.findings)
    for finding in report.findings:
        _print_finding(console, finding, width)
    if report.leaving is None:
        return
    leaving, name = report.leaving, report.plan["name"]
    console.print()
    form = "masked" if leaving.secure else "open"
    title = (
        f"What would leave {report.silo} in one run of the plan {name}: {leaving.bytes:,} bytes, contribution {form}"
    )
    console.print(Text(title, style="bold"))
    console.print(_messages(leaving, wide=console.width >= WIDE))
    _print_list(console, "Who could read it", leaving.claims)
    _print_list(console, "What does not leave", leaving.stays)
    _print_list(console, "Words", [f"{word}: {said}" for word, said in leaving.words.items()])
    for departure in leaving.departures:
        if departure.parts:
            _print_parts(console, departure, complete)


def _print_finding(console: Console, finding: Finding, width: int) -> None:
    mark, style = MARKS["notice" if finding.state == "ok" and finding.remedy else finding.state]
    indent = " " * (12 + width)
    remedy = [f"{'  ' if number else '→ '}{line}" for number, line in enumerate(finding.remedy.splitlines())]
    lines = [*finding.what.splitlines(), *remedy]
    # Some of it is of whoever made the plan, and must not move the cursor over the rest.
    lines = [printable(line) for line in lines]
    first = Text.assemble("  ", (f"{mark:<8}", style), f"{finding.subject:<{width}}  ", lines[0])
    # A line to be copied is never folded by us: a terminal that folds it still copies it as one.
    console.print(first, soft_wrap=True)
    for line in lines[1:]:
        console.print(Text(indent + line), soft_wrap=True)


def _messages(leaving: Leaving, *, wide: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    table.add_column("message", "in all", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("bytes", f"{leaving.bytes:,}", justify="right", no_wrap=True)
    for column in (
        ("what it says", "goes to", "can be read by") if wide else ("what it says, to whom, and who can read it",)
    ):
        table.add_column(column, overflow="fold")
    for departure in leaving.departures:
        size = "small" if departure.bytes is None else f"{departure.bytes:,}"
        said = [departure.what, departure.to, departure.readers]
        if not wide:
            said = ["\n".join((departure.what, f"to: {departure.to}", f"read by: {departure.readers}"))]
        table.add_row(departure.phase, departure.form, size, *said)
    return table


def _print_parts(console: Console, departure: Departure, complete: bool) -> None:
    """List the arrays of one message; those that differ in a number only in one line, if there are too many."""
    lines = [(part.name, part, 1) for part in departure.parts]
    if len(lines) > MOST_LINES and not complete:
        lines = _alike(departure.parts)
    title = f"In detail: {departure.what.partition(',')[0]}"
    if len(lines) < len(departure.parts):
        title += f"; arrays that differ in a number only are one line, --all lists all {len(departure.parts)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_footer=True)
    table.add_column("name", "in all", overflow="fold")
    table.add_column("what it is", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("bytes", f"{sum(part.bytes for part in departure.parts):,}", justify="right", no_wrap=True)
    for name, part, count in lines:
        shape = " × ".join(f"{size:,}" for size in part.shape)
        times = f" (×{count})" if count > 1 else ""
        table.add_row(f"{printable(name)}{times}", part.what, shape, part.dtype, f"{count * part.bytes:,}")
    console.print(table)


def _alike(parts: Iterable[Part]) -> list[tuple[str, Part, int]]:
    """Return a line for all parts that are the same but for numbers in their names: `layer.*.weight`, and how many."""
    groups: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        groups.setdefault((family(part.name), part.dtype, part.shape, part.what), []).append(part)
    return [(key[0] if len(of) > 1 else of[0].name, of[0], len(of)) for key, of in groups.items()]


def _print_list(console: Console, title: str, lines: Iterable[str]) -> None:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        grid.add_row("  •", Text(line))
    console.print(Text(title, style="bold"))
    console.print(grid)
    console.print()
