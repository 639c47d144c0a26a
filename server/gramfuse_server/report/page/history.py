"""Sections of a page on how a run went: failures, losses, solves, checks, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup

from gramfuse_server.report.page import charts
from gramfuse_server.report.page.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Facts,
    Folded,
    Notice,
    PageSection,
    Table,
    TableRow,
    Text,
)
from gramfuse_server.report.page.charts import count
from gramfuse_server.report.page.view import Reading
from gramfuse_server.report.page.words import CHECKS, PHASE_TITLES, VERDICTS, bounds, explain
from gramfuse_server.report.schema import Report
from gramfuse_server.report.verdicts import worst


def failure(reading: Reading) -> PageSection:
    """What failed, where, and what to do."""
    failure = reading.failure
    assert failure is not None  # noqa: S101
    code, phase = failure.exit_code, PHASE_TITLES.get(failure.phase, failure.phase)
    named = [silo for silo in reading.silos if f"'{silo}'" in failure.message] or [name for _, name, _ in reading.lost]
    entries: list[tuple[str, str | Markup]] = [("What happened", failure.message)]
    session = reading.session(failure.round)
    entries.append(("Phase", f"{phase}, in {session}" if session else phase))
    if named:
        entries.append(("Silos concerned", ", ".join(dict.fromkeys(named))))
    entries.append(("Error", f"{failure.error}, exit code {code}"))
    entries.append(("Causes, and what to do", Markup("<code>gramfuse explain {}</code>").format(code)))
    blocks: list[Block] = [
        Notice("Failed", f"The run failed in the phase “{phase}”. There is no merged model.", grave=True),
        Facts(entries),
    ]
    if failure.resumable:
        blocks += [
            Text(
                "The progress is kept, and no silo trains again. Once the cause is fixed, resume the run from the "
                "parent of this directory, with DIR and CONNECTION as before:"
            ),
            Code("Command to resume the run", f"gramfuse run DIR CONNECTION --resume {reading.report.run}"),
        ]
    else:
        blocks.append(Text("Only this report is kept. Once the cause is fixed, start the run again."))
    return PageSection("result", "What failed", blocks)


def losses(reading: Reading) -> PageSection | None:
    """Silos that dropped out or refused."""
    report = reading.report
    blocks: list[Block] = []
    if reading.lost:
        several = len({number for number, _, _ in reading.lost}) > 1 or reading.last > 1
        rows = []
        for number, name, reason in reading.lost:
            inside = "" if reading.failure else _part_of(name, report)
            note = ", ".join([*([f"round {number}"] if several else []), *([inside] if inside else [])])
            rows.append(TableRow(name, [Cell(reason)], note=note))
        silos = count(len({name for _, name, _ in reading.lost}), "silos")
        blocks.append(Notice("Note", f"{silos} dropped out or refused."))
        blocks.append(Table("Silos that were lost", [Column("Silo"), Column("What happened", number=False)], rows))
    if report.unmeasured and reading.models:
        blocks.append(Notice("Note", f"Metrics are missing: {report.unmeasured}"))
    return PageSection("lost", "Drop-outs and refusals", blocks) if blocks else None


def _part_of(name: str, report: Report) -> str:
    """Return what a lost silo has part in: the merge, only a head that was fitted, or nothing."""
    trained = [one.survivors for one in report.rounds if one.work == "train"]
    inside = {silo.name for silo in report.silos if silo.state == "merged"}
    if name not in inside:
        return "not in the merge"
    return "in the merge" if not trained or any(name in silos for silos in trained) else "only in the fitted head"


def solve(reading: Reading) -> PageSection | None:
    """How each group of weights was solved."""
    steps = reading.report.solve
    if not steps:
        return None
    odd = reading.unsolved
    blocks: list[Block] = []
    if odd:
        blocks.append(
            Notice(
                "Note",
                f"{len(odd)} of {count(len(steps), 'groups')} of weights were not solved exactly. They took the simple "
                "average or were regularised towards it; the model is complete.",
            )
        )
        blocks.append(
            Table(
                "Groups that were not solved exactly",
                [Column("Group"), Column("How it was solved", number=False)],
                [TableRow(step.group, [Cell(explain(step))]) for step in odd],
            )
        )
    worst = min(steps, key=lambda step: (step.smallest_eigenvalue, step.group))
    dead = sum(step.dead_features for step in steps)
    unused = f" {count(dead, 'features')} were zero at every silo; their rows took the simple average." if dead else ""
    clean = f"All {count(len(steps), 'groups')} of weights were solved exactly. " if not odd else ""
    blocks.append(
        Text(
            f"{clean}The least well-conditioned is {worst.group}, with a smallest eigenvalue of "
            f"{worst.smallest_eigenvalue:.2g}; 1 is perfect, and below about 1e-6 the statistics carry no information "
            f"in some direction.{unused}"
        )
    )
    rows = [
        TableRow(
            step.group,
            [Cell(step.outcome), Cell(f"{step.smallest_eigenvalue:.2g}"), Cell(f"{step.dead_features:,}")],
        )
        for step in steps
    ]
    titles = [Column("Group"), Column("Outcome", number=False), Column("Smallest eigenvalue"), Column("Zero features")]
    blocks.append(Folded(f"All {count(len(steps), 'groups')}", [Table("How each group was solved", titles, rows)]))
    return PageSection("solve", "Quality of the solve", blocks)


def checks(reading: Reading) -> PageSection | None:
    """Checks of the merge, from the sum alone."""
    listed = [
        (check, reading.session(earlier.round))
        for earlier in reading.rounds
        for check in earlier.checks
        if earlier.round < min(reading.first, reading.last) and check.verdict != "ok"
    ]
    listed += [(check, "") for check in reading.report.checks]
    if not listed:
        return None
    verdict = worst(check for check, _ in listed)
    blocks: list[Block] = []
    if verdict != "ok":
        blocks.append(
            Notice(
                "Look" if verdict == "look" else "Bad", f"At least one check: {VERDICTS[verdict]}.", verdict == "bad"
            )
        )
    rows = [
        TableRow(
            check.name,
            [
                Cell(check.verdict),
                Cell(check.where),
                Cell(f"{check.value:.4g}"),
                Cell(bounds(check.usual)),
                Cell(bounds(check.possible)),
            ],
            note=place,
            strong=check.verdict != "ok",
        )
        for check, place in listed
    ]
    titles = [
        Column("Check"),
        Column("Verdict", number=False),
        Column("Where", number=False),
        Column("Value"),
        Column("Usual"),
        Column("Possible"),
    ]
    blocks.append(Table("The least usual place of each check", titles, rows))
    blocks.append(Folded("What these checks and verdicts mean", [Facts([*CHECKS.items(), *VERDICTS.items()])]))
    blocks.append(
        Text("The checks cannot tell which silo it is, nor detect a silo that distorts the merge within these ranges.")
    )
    return PageSection("checks", "Checks of the merge", blocks)


def traffic(reading: Reading) -> PageSection | None:
    """Bytes and seconds."""
    report = reading.report
    seconds = report.seconds
    if isinstance(seconds, int | float):
        return PageSection("traffic", "Time", [Text(f"The merge took {charts.duration(seconds)}.")])
    sent, received = report.bytes, report.bytes_to_silos
    phases = list(
        dict.fromkeys([*seconds, *(phase for phases in (*sent.values(), *received.values()) for phase in phases)])
    )
    blocks: list[Block] = []
    silos = list(dict.fromkeys([*sent, *received]))
    if silos:
        ways = [[float(sum(way.get(silo, {}).values())) for silo in silos] for way in (sent, received)]
        drawn = charts.bars([*ways[0], *ways[1]])
        rows = [
            TableRow(
                silo,
                [
                    Cell(charts.size(ways[0][place]), drawn[place]),
                    Cell(charts.size(ways[1][place]), drawn[place + len(silos)]),
                ],
            )
            for place, silo in enumerate(silos)
        ]
        total = f"Bytes of each silo: {charts.size(sum(ways[0]))} from all, {charts.size(sum(ways[1]))} to all"
        blocks.append(Table(total, [Column("Silo"), Column("From it"), Column("To it")], rows))
    if len(reading.rounds) > 1:
        blocks.append(_by_session(reading))
    if phases:
        drawn = charts.bars([seconds.get(phase) for phase in phases])
        rows = [
            TableRow(
                PHASE_TITLES.get(phase, phase),
                [
                    Cell(charts.duration(seconds[phase]) if phase in seconds else charts.NONE, bar),
                    Cell(_in_phase(sent, phase)),
                    Cell(_in_phase(received, phase)),
                ],
            )
            for phase, bar in zip(phases, drawn, strict=True)
        ]
        titles = [Column("Phase"), Column("Time"), Column("From silos"), Column("To silos")]
        blocks.append(Table(f"Phases: {charts.duration(sum(seconds.values()))} in all", titles, rows))
    for way, by_silo in (("from", sent), ("to", received)):
        if by_silo:
            blocks.append(Folded(f"Bytes {way} each silo by phase", [_by_phase(way, by_silo, phases)]))
    return PageSection("traffic", "Bytes and time", blocks) if blocks else None


def _by_session(reading: Reading) -> Table:
    took = [sum(one.seconds.values()) for one in reading.rounds]
    rows = [
        TableRow(
            reading.session(one.round),
            [
                Cell(charts.duration(seconds), bar),
                *(Cell(charts.size(_all(way))) for way in (one.bytes, one.bytes_to_silos)),
            ],
        )
        for one, seconds, bar in zip(reading.rounds, took, charts.bars(took), strict=True)
    ]
    titles = [Column("Exchange"), Column("Time"), Column("From silos"), Column("To silos")]
    return Table(f"{len(rows)} exchanges", titles, rows)


def _all(traffic: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sum(by_phase.values()) for by_phase in traffic.values())


def _in_phase(traffic: Mapping[str, Mapping[str, int]], phase: str) -> str:
    total = sum(by_phase.get(phase, 0) for by_phase in traffic.values())
    return charts.size(total) if total else charts.NONE


def _by_phase(way: str, traffic: Mapping[str, Mapping[str, int]], phases: Iterable[str]) -> Table:
    silos = list(traffic)
    rows = [
        TableRow(
            PHASE_TITLES.get(phase, phase),
            [Cell(charts.size(traffic[silo][phase]) if phase in traffic[silo] else charts.NONE) for silo in silos],
        )
        for phase in phases
        if any(phase in by_phase for by_phase in traffic.values())
    ]
    return Table(f"Bytes {way} each silo by phase", [Column("Phase"), *map(Column, silos)], rows)
