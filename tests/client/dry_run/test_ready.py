"""`gramfuse silo check` where all is well: what would leave is all that would."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gramfuse_cli.commands import silo_check as cli_check
from gramfuse_client.dry_run import of_coordinator as connection
from gramfuse_client.dry_run.check import check
from gramfuse_client.guard import disclosure
from gramfuse_client.guard.disclosure import disclose
from gramfuse_client.silo_file import Silo, write_identity
from gramfuse_client.state.state import State
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.messages.phases import JoinReply, MaskedReply, SharesReply, UnmaskReply
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum.keys import Identity
from tests.client.dry_run.sites import NAME, Coordinator, Site, finding, problems, tree


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "open"])
def test_a_silo_that_is_ready_is_told_so_and_nothing_is_written(
    make_site: Callable[..., Site], coordinator: Coordinator, gramfuse: Callable[..., Any], secure: bool
) -> None:
    site = make_site(coordinator, secure)
    if not secure:
        write_identity(site.project.identity(NAME), Identity(bytes(32)))
    before = tree(site.project.directory)
    code, out, err = gramfuse("silo", "check", site.silo, "--plan", site.project.plan)
    assert code == 0, out + err
    assert tree(site.project.directory) == before
    assert not Silo.read(site.silo).state.exists()
    assert "PROBLEM" not in out
    assert site.plan.digest in out
    assert "24 training examples ('animals' 22, 'weather' 2, 'kitchen' 0), 20 held out" in out
    assert "What stays here" in out
    if secure:
        assert "nobody: random words" in out
        assert "over at least 3 of the 4 silos" in out
    else:
        assert "Open: the coordinator sees" in out
    assert coordinator.asked == [connection.NOTHING, *connection.HIDDEN]


def test_as_json_it_is_one_object_with_the_same_in_it(site: Site, gramfuse: Callable[..., Any]) -> None:
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["ready"]
    assert "error" not in document
    assert document["plan"]["digest"] == site.plan.digest
    assert {finding["state"] for finding in document["findings"]} == {"ok"}
    leaves = document["leaves"]
    assert leaves["bytes"] == sum(departure["bytes"] or 0 for departure in leaves["departures"])
    assert [d["phase"] for d in leaves["departures"]] == [
        "connection", "join", "train", "keys", "shares", "masked", "survivors", "unmask",
        "evaluate", "masked", "survivors", "unmask", "finish", "any",
    ]  # fmt: skip
    contribution = leaves["departures"][5]
    layout = Layout.read(site.project.directory / "layout.json")
    assert [(p["name"], tuple(p["shape"])) for p in contribution["parts"]] == [(b.name, b.shape) for b in layout.sums]
    assert sum(part["bytes"] for part in contribution["parts"]) == 8 * layout.sum_entries
    assert 0 < contribution["bytes"] - 8 * layout.sum_entries < 300  # its header


def test_sizes_are_those_of_the_messages(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    about: dict[str, Any] = {"plan": site.plan.digest, "session": "a" * 32, "silo": NAME}
    by_phase = {d.phase: d.bytes for d in reversed(disclose(NAME, site.plan, layout).departures)}
    words = np.zeros(layout.sum_entries, np.uint64)
    sealed = {name: "ab" * 280 for name in site.plan.names if name != NAME}
    for reply in (
        JoinReply(**about),
        SharesReply(**about, sealed=sealed),
        MaskedReply(**about, sum_of="statistics", piece=0, arrays={"masked": words}),
        UnmaskReply(**about, sum_of="statistics", shares=dict.fromkeys(site.plan.names, "cd" * 66)),
    ):
        assert by_phase[reply.phase] == pack(reply).nbytes


def test_what_leaves_in_rounds_is_counted_as_often(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    merge = site.plan.merge.model_copy(update={"rounds": 3})
    once, often = (disclose(NAME, p, layout) for p in (site.plan, site.plan.model_copy(update={"merge": merge})))
    for one, three in zip(once.departures, often.departures, strict=True):
        assert three.bytes == (one.bytes if one.phase in ("connection", "finish", "any") else 3 * (one.bytes or 0))
        assert three.parts == one.parts
    assert any("3 rounds" in claim for claim in often.claims)


def test_a_contribution_in_pieces_has_as_many_headers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    whole = disclose(NAME, site.plan, layout).departures[5]
    monkeypatch.setattr(disclosure, "PIECE_BYTES", 16384)
    pieces = disclose(NAME, site.plan, layout).departures[5]
    assert "in 5 pieces" in pieces.what
    assert 4 * 200 < (pieces.bytes or 0) - (whole.bytes or 0) < 4 * 300


def test_how_many_may_collude_is_what_the_terms_withstand(make_site: Callable[..., Site]) -> None:
    site = make_site()
    layout = Layout.read(site.project.directory / "layout.json")
    five = [*site.plan.silo, site.plan.silo[0].model_copy(update={"name": "silo-e"})]
    said = " ".join(disclose(NAME, site.plan.model_copy(update={"silo": tuple(five)}), layout).claims)
    assert "at least 4 of the 5 silos" in said
    assert "at most 2 silos" in said
    assert "The plan asks for 1" in said
    assert "over at least 2 silos" in said


def test_long_lists_are_shortened_for_people_and_whole_with_all(
    site: Site, gramfuse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_check, "MOST_LINES", 20)
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    _, out, _ = gramfuse(*arguments)
    assert "s:bert.encoder.layer.*.output.dense (×2)" in out
    assert "s:bert.encoder.layer.1.output.dense" not in out
    _, out, _ = gramfuse(*arguments, "--all")
    assert "s:bert.encoder.layer.1.output.dense" in out


def test_a_plan_cannot_write_over_what_is_printed(site: Site, gramfuse: Callable[..., Any]) -> None:
    site.project.replace(site.project.plan, '"kitchen"', r'"kitchen", "\u001b[2Jx\n  ok      approval"')
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    assert code == 19
    assert "\x1b" not in out
    assert "U+001B" in out
    assert not [line for line in out.splitlines() if line.startswith("  ok      approval")]


def test_offline_the_coordinator_is_left_alone(
    site: Site, coordinator: Coordinator, gramfuse: Callable[..., Any]
) -> None:
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    assert code == 0
    assert out.count("--offline") == len(connection.REMOTE)
    assert coordinator.asked == []


def test_without_a_plan_it_is_one_that_was_joined(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    state = Silo.read(site.silo).state
    state.mkdir(mode=0o700)
    assert "gramfuse silo check" in problems(check(site.silo, offline=True))["plan"]
    older, other = site.plan, site.plan.override(["merge.alpha=0.5"])
    for plan in (older, other):
        State(state, plan.digest).join(plan.to_toml(), layout)
    report = check(site.silo, offline=True)
    assert not problems(report)
    assert report.plan["digest"] == older.digest  # approved, though the other is newer
    assert "joined 1 more" in finding(report, "plan").what
