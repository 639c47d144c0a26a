"""`gramfuse silo ledger`: shows, verifies and exports a silo's egress ledger; never modifies it."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import Table, say, show_json
from gramfuse_protocol.errors import LedgerError

if TYPE_CHECKING:
    from gramfuse_client.guard.ledger import Ledger
    from gramfuse_client.guard.ledger_lines import Item, Line

COLUMNS = (
    "number", "time", "silo", "plan", "session", "round", "run", "phase", "kind", "form", "note",
    "item", "dtype", "shape", "bytes", "sha256", "previous", "digest",
)  # fmt: skip
"""Columns of the CSV: one row for each item, with the columns of its line repeated."""

silo_file = click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@click.group()
def ledger() -> None:
    """Show, verify or export the record of what this silo sent.

    A silo writes a line into its ledger before it sends a message: the name, shape, size and SHA-256 of everything in
    the message, and the digest of the previous line. The ledger is ledger.jsonl in the state directory that SILO_TOML
    names. These commands only read it.
    """


@ledger.command()
@silo_file
@click.option(
    "--last", type=click.IntRange(1), metavar="N", help="Show only the last N lines; all lines are still verified."
)
@click.option("--items", is_flag=True, help="List every item of each message, with its SHA-256.")
@json_option
def show(file: Path, last: int | None, items: bool, as_json: bool) -> None:
    """Show the lines of the ledger of SILO_TOML, oldest first.

    'form' says who could read the content: 'masked' is random to anyone, only its recipient can open each of the
    'sealed shares', and 'open' is readable as it is. A message with 'no data' had only a header. The note of a refusal
    is its reason.
    """
    source = _ledger(file)
    lines = deque(source.lines(), maxlen=last)
    if as_json:
        shown = [{**line.model_dump(mode="json"), "digest": line.digest} for line in lines]
        show_json({"ledger": str(source.path), "silo": source.silo, "lines": shown})
        return
    if not lines:
        say(f"{source.path}: no lines yet: {source.silo} has sent nothing")
        return
    table = Table()
    for column in ("", "time (UTC)", "phase", "kind", "form", "bytes", "note"):
        table.column(column, justify="right" if column in ("", "bytes") else "left", fold=True)
    for line in lines:
        entry = line.entry
        style = "" if entry.kind == "reply" else "yellow"
        time = line.time.replace("T", " ").removesuffix("Z")
        phase = f"{entry.phase} ({entry.round})" if entry.round > 1 else entry.phase  # a later exchange of the run
        cells = [f"{line.number:,}", time, phase, entry.kind, entry.form, f"{entry.bytes:,}", entry.note]
        table.row(*cells, style=style)
        for item in entry.items if items else ():
            table.row("", "", "", "", f"  {item.name}", f"{item.bytes:,}", _summary(item), style="dim")
    table.show()


@ledger.command()
@silo_file
@click.option(
    "--head",
    metavar="DIGEST",
    help="A head digest noted earlier; some line must still have it.",
)
@json_option
def verify(file: Path, head: str | None, as_json: bool) -> None:
    """Verify the whole ledger of SILO_TOML, and print the head of its hash chain.

    This names a line that was changed, removed, inserted or moved, and exits with 18. But someone who can write the
    silo's files can rewrite the whole ledger. To detect that, note the head digest now and then in a place that they
    cannot write, and give it as --head later.
    """
    if head is not None and not re.fullmatch(r"[0-9a-f]{64}", head):
        raise click.BadParameter("expected 64 hexadecimal digits, as this command prints them", param_hint="--head")
    source = _ledger(file)
    end = source.verify(head)
    end_is_known = source.path.with_suffix(".head").exists() or not end.number
    if as_json:
        show_json(
            {
                "ledger": str(source.path),
                "silo": source.silo,
                "lines": end.number,
                "first": end.first or None,
                "last": end.last or None,
                "bytes": end.bytes,
                "head": end.digest,
                "end_is_known": end_is_known,
            }
        )
        return
    say(f"ledger  {source.path}", f"lines   {end.number:,}, verified")
    if end.number:
        say(f"first   {end.first}", f"last    {end.last}", f"bytes   {end.bytes:,} sent in all")
        say(f"head    {end.digest}", copied=True)
        say("Note this digest in a place that this machine cannot write.", err=True)
    if not end_is_known:
        say("ledger.head is missing, so lines cut off at the end go unnoticed", err=True)


@ledger.command()
@silo_file
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to make; it must not exist."
)
@click.option(
    "--csv", "as_csv", is_flag=True, help="Write CSV for a spreadsheet, one row per item; otherwise copy the lines."
)
@json_option
def export(file: Path, out: Path, as_csv: bool, as_json: bool) -> None:
    """Verify the ledger of SILO_TOML and copy it to a file that only you can read.

    Without --csv, the copy has the same lines as the ledger, so its recipient can verify the hash chain: each line's
    'previous' is the SHA-256 of the previous line, without its newline. Neither form contains the silo's data, only
    names, shapes, sizes and digests of what it sent.
    """
    source = _ledger(file)
    if os.path.lexists(out):
        raise click.BadParameter(f"{out} exists already; name another file", param_hint="--out")
    last: deque[Line] = deque(maxlen=1)
    plans: dict[str, None] = {}

    def lines() -> Iterator[Line]:
        for line in source.lines():
            last.append(line)
            plans.update({line.entry.plan: None} if line.entry.plan else {})
            yield line

    _write_new(out, _rows(lines()) if as_csv else (line.serialised() for line in lines()))
    number, digest = (last[0].number, last[0].digest) if last else (0, None)
    if as_json:
        about = {
            "ledger": str(source.path),
            "silo": source.silo,
            "out": str(out),
            "format": "csv" if as_csv else "jsonl",
        }
        show_json({**about, "lines": number, "head": digest, "plans": list(plans)})
        return
    say(f"{number:,} lines, verified, written to {out}")
    for plan in plans:
        say(f"plan  {plan}", copied=True)
    if digest:
        say(f"head  {digest}", copied=True)


def _ledger(file: Path) -> Ledger:
    from gramfuse_client.guard.ledger import Ledger
    from gramfuse_client.silo_file import Silo

    silo = Silo.read(file)
    return Ledger(silo.ledger, silo.name)


def _summary(item: Item) -> str:
    shape = f"{item.dtype} {list(item.shape)}" if item.shape else item.dtype
    return f"{shape} {item.sha256}"


def _rows(lines: Iterator[Line]) -> Iterator[bytes]:
    """Yield the CSV, one row at a time."""
    yield _row(*COLUMNS)
    for line in lines:
        entry = line.entry
        about = [line.number, line.time, line.silo, entry.plan, entry.session, entry.round, entry.run]
        about += [entry.phase, entry.kind, entry.form, entry.note]
        for item in entry.items:
            shape = "x".join(map(str, item.shape))
            yield _row(*about, item.name, item.dtype, shape, item.bytes, item.sha256, line.previous, line.digest)
        if not entry.items:
            yield _row(*about, "", "", "", 0, "", line.previous, line.digest)


def _row(*cells: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow([_cell(cell) for cell in cells])
    return text.getvalue().encode("utf-8")


def _cell(value: Any) -> Any:
    """Quote a cell that a spreadsheet would run as a formula, because it begins with = or the like."""
    text = str(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text.startswith(("\t", "\r")) else value


def _write_new(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a new file with mode 0600, atomically.

    Raises:
        LedgerError: if it cannot be written, or the ledger cannot be read.
        BadParameter: if another process has made it meanwhile.
    """
    from gramfuse_protocol.files import replacing

    try:
        with replacing(path, private=True, durable=True, new=True) as temporary, temporary.open("wb") as file:
            file.writelines(chunks)
    except FileExistsError:
        raise click.BadParameter(f"{path} exists already; name another file", param_hint="--out") from None
    except OSError as error:
        raise LedgerError(f"{path}: cannot write the copy: {error.strerror}; choose another place") from None
