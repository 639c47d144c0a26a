"""`gramfuse silo ledger`: shows, verifies and copies a silo's egress ledger, and never writes it."""

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
"""Of a spreadsheet: those of the line again for each of its items."""

silo_file = click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@click.group()
def ledger() -> None:
    """What left this silo: show it, verify it, copy it.

    A silo writes a line into its ledger before each message leaves, with the name, shape, size and SHA-256 of all that
    the message carries, and the digest of the line before. The ledger is ledger.jsonl in the state directory that
    SILO_TOML names. These commands read it and write nothing into it.
    """


@ledger.command()
@silo_file
@click.option(
    "--last", type=click.IntRange(1), metavar="N", help="Only the last N lines; all are verified all the same."
)
@click.option("--items", is_flag=True, help="List all that each message carried, with its SHA-256.")
@json_option
def show(file: Path, last: int | None, items: bool, as_json: bool) -> None:
    """Show the lines of the ledger of SILO_TOML, oldest first.

    'form' says how the content could be read: 'masked' as random words, 'sealed shares' by the silo that each was for,
    'open' as it is; 'no data' says that the message had nothing but its header. A refusal has its reason as note.
    """
    source = _ledger(file)
    lines = deque(source.lines(), maxlen=last)
    if as_json:
        shown = [{**line.model_dump(mode="json"), "digest": line.digest} for line in lines]
        show_json({"ledger": str(source.path), "silo": source.silo, "lines": shown})
        return
    if not lines:
        say(f"{source.path}: no line yet: nothing left {source.silo}")
        return
    table = Table()
    for column in ("", "time (UTC)", "phase", "kind", "form", "bytes", "note"):
        table.column(column, justify="right" if column in ("", "bytes") else "left", fold=True)
    for line in lines:
        entry = line.entry
        style = "" if entry.kind == "reply" else "yellow"
        when = line.time.replace("T", " ").removesuffix("Z")
        cells = [f"{line.number:,}", when, entry.phase, entry.kind, entry.form, f"{entry.bytes:,}", entry.note]
        table.row(*cells, style=style)
        for item in entry.items if items else ():
            table.row("", "", "", "", f"  {item.name}", f"{item.bytes:,}", _about(item), style="dim")
    table.show()


@ledger.command()
@silo_file
@click.option(
    "--head",
    metavar="DIGEST",
    help="A head digest that was noted before; the line that has it must still be there.",
)
@json_option
def verify(file: Path, head: str | None, as_json: bool) -> None:
    """Go through the whole ledger of SILO_TOML, and print where its chain of digests ends.

    A line that was changed, removed, inserted or moved is named, with exit code 18. Who can write the silo's files can
    write the whole ledger anew, though. Against that, note the head digest now and then where they cannot write, and
    give it as --head later.
    """
    if head is not None and not re.fullmatch(r"[0-9a-f]{64}", head):
        raise click.BadParameter("expected 64 hexadecimal digits, as this command prints them", param_hint="--head")
    source = _ledger(file)
    end = source.verify(head)
    whole = source.path.with_suffix(".head").exists() or not end.number
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
                "end_is_known": whole,
            }
        )
        return
    say(f"ledger  {source.path}", f"lines   {end.number:,}, which hold together")
    if end.number:
        say(f"first   {end.first}", f"last    {end.last}", f"bytes   {end.bytes:,} left in all")
        say(f"head    {end.digest}", copied=True)
        say("Note this digest somewhere this machine cannot write.", err=True)
    if not whole:
        say("ledger.head is missing: lines that were cut off at the end are not noticed", err=True)


@ledger.command()
@silo_file
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to make; it must not exist."
)
@click.option(
    "--csv", "as_csv", is_flag=True, help="For a spreadsheet: a row for each item. Otherwise the lines as they are."
)
@json_option
def export(file: Path, out: Path, as_csv: bool, as_json: bool) -> None:
    """Verify the ledger of SILO_TOML and copy it to a file that only you can read.

    Without --csv the copy is the ledger itself, line by line as it is, so that whoever gets it can follow the chain:
    each line's 'previous' is the SHA-256 of the line before, without its newline. Neither form holds data of the silo:
    names, shapes, sizes and digests of what left.
    """
    source = _ledger(file)
    if os.path.lexists(out):
        raise click.BadParameter(f"{out} exists already; name another file", param_hint="--out")
    seen: deque[Line] = deque(maxlen=1)
    plans: dict[str, None] = {}

    def lines() -> Iterator[Line]:
        for line in source.lines():
            seen.append(line)
            plans.update({line.entry.plan: None} if line.entry.plan else {})
            yield line

    _write_new(out, _rows(lines()) if as_csv else (line.serialised() for line in lines()))
    number, digest = (seen[0].number, seen[0].digest) if seen else (0, None)
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


def _about(item: Item) -> str:
    shape = f"{item.dtype} {list(item.shape)}" if item.shape else item.dtype
    return f"{shape} {item.sha256}"


def _rows(lines: Iterator[Line]) -> Iterator[bytes]:
    """Yield a spreadsheet, one row at a time."""
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
    """Return a cell that a spreadsheet takes for text: one that begins with = and the like it would calculate."""
    text = str(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text.startswith(("\t", "\r")) else value


def _write_new(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a new file, 0600, which is there whole or not at all.

    Raises:
        LedgerError: if it cannot be written, or what is to be written cannot be read.
        BadParameter: if another process made it meanwhile.
    """
    from gramfuse_protocol.files import replacing

    try:
        with replacing(path, private=True, durable=True, new=True) as temporary, temporary.open("wb") as file:
            file.writelines(chunks)
    except FileExistsError:
        raise click.BadParameter(f"{path} exists already; name another file", param_hint="--out") from None
    except OSError as error:
        raise LedgerError(f"{path}: the copy cannot be written: {error.strerror}; name another place") from None
