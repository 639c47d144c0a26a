"""Errors: an exit code and a page for each, and what of them the other side gets to read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from gramfuse_cli.commands import explain
from gramfuse_cli.main import cli
from gramfuse_protocol import errors
from gramfuse_protocol.errors import ContributionError, GramfuseError, RefusalError, SecurityError, error_types
from gramfuse_protocol.messages.phases import REPLIES, Refusal, TrainReply, TrainRequest, expect, refusal
from gramfuse_protocol.messages.wire import pack, unpack

PAGES = Path(__file__).parents[2] / "docs" / "exit-codes"
LEAVES = list(error_types().values())
SECRET = "/data/ward-3/patients.jsonl:17: unknown label 'HIV positive'"

# A message about tensors is made of names, shapes and counts, one about the protocol of silos and phases, so they may
# cross; all others may quote data or paths.
CROSSING = [ContributionError, SecurityError]
QUOTING = [leaf for leaf in LEAVES if leaf not in CROSSING]

by_leaf = pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
by_quoting_leaf = pytest.mark.parametrize("leaf", QUOTING, ids=lambda leaf: leaf.__name__)


def _all_leaves(root: type[GramfuseError]) -> list[type[GramfuseError]]:
    children = root.__subclasses__()
    return [leaf for child in children for leaf in _all_leaves(child)] if children else [root]


def test_every_leaf_has_an_exit_code_of_its_own() -> None:
    codes = [leaf.exit_code for leaf in LEAVES]
    assert len(set(codes)) == len(codes) >= 7
    # 0, 1, 2 and 130 have their usual meanings; from 126 on, shells have theirs.
    assert all(10 <= code < 100 for code in codes)


def test_every_leaf_can_be_found_by_the_name_that_a_refusal_gives() -> None:
    ours = [leaf for leaf in _all_leaves(GramfuseError) if leaf.__module__ == errors.__name__]
    assert error_types() == {leaf.__name__: leaf for leaf in ours}


@by_leaf
def test_a_page_explains_the_exit_code(leaf: type[GramfuseError]) -> None:
    page = (PAGES / f"{leaf.exit_code}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Exit code {leaf.exit_code}: ")
    assert f"`{leaf.__name__}`" in page
    assert "The other side reads" in page
    assert leaf not in QUOTING or f'"{leaf.summary}"' in page


@by_leaf
def test_a_user_gets_the_page_of_an_exit_code(leaf: type[GramfuseError]) -> None:
    code = leaf.exit_code
    shown = CliRunner().invoke(cli, ["explain", str(code)])
    assert shown.exit_code == 0
    page = (PAGES / f"{code}.md").read_text(encoding="utf-8")
    assert shown.stdout.split() == page.split()
    assert json.loads(CliRunner().invoke(cli, ["explain", str(code), "--json"]).stdout) == {"code": code, "page": page}


def test_the_pages_are_in_what_is_installed() -> None:
    wheel = tomllib.loads((PAGES.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"] == {"docs/exit-codes": f"gramfuse_cli/{explain.PLACES[0].name}"}


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_code_without_a_page_of_its_own_is_explained_on_the_page_of_all(code: int) -> None:
    shown = CliRunner().invoke(cli, ["explain", str(code)])
    assert shown.exit_code == 0
    assert "Interrupted" in shown.stdout


def test_a_code_that_is_none_leads_to_all_of_them() -> None:
    assert "gramfuse explain" in CliRunner().invoke(cli, ["explain", "99"]).output
    assert "Interrupted" in CliRunner().invoke(cli, ["explain"]).stdout


def test_every_page_belongs_to_a_code_and_the_table_lists_all() -> None:
    codes = {leaf.exit_code for leaf in LEAVES}
    assert {path.stem for path in PAGES.glob("*.md")} == {"README", *map(str, codes)}
    table = (PAGES / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    listed = {row.split("]")[0].strip("[`") for row in rows} - {"code", "---"}
    assert listed == {"0", "1", "2", "130", *map(str, codes)}
    for leaf in LEAVES:
        assert f"| [{leaf.exit_code}]({leaf.exit_code}.md) | `{leaf.__name__}` |" in table


@by_leaf
def test_the_tree_at_the_top_of_the_module_shows_the_leaf_with_its_code(leaf: type[GramfuseError]) -> None:
    (line,) = [line for line in (errors.__doc__ or "").splitlines() if leaf.__name__ in line]
    assert str(leaf.exit_code) in line.split()


@by_quoting_leaf
def test_what_crosses_is_the_summary_and_never_the_message(leaf: type[GramfuseError]) -> None:
    error = leaf(SECRET)
    assert str(error) == SECRET
    assert error.reason == leaf.summary

    request = TrainRequest(plan="0" * 64, session="1" * 32)
    frame = pack(refusal(request, "ward-3", error))
    assert frame.buffers == ()
    for part in ("patients", "HIV", "17"):
        assert part not in frame.header

    reply = unpack(frame, REPLIES)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.exit_code, reply.reason) == (leaf.__name__, leaf.exit_code, leaf.summary)
    with pytest.raises(RefusalError, match=f"silo 'ward-3' refused in phase 'train': {leaf.summary}") as caught:
        expect(TrainReply, request, reply, "silo 'ward-3'")
    assert caught.value.reason == leaf.summary


def test_a_reason_that_is_given_crosses_in_place_of_the_summary() -> None:
    error = RefusalError(SECRET, reason="this silo allows no open uploads")
    request = TrainRequest(plan="0" * 64, session="1" * 32)
    reply = refusal(request, "ward-3", error)
    assert "open uploads" in reply.reason
    assert "ward-3/patients" not in pack(reply).header


def test_an_empty_reason_stays_empty() -> None:
    assert RefusalError(SECRET, reason="").reason == ""


@pytest.mark.parametrize("leaf", CROSSING)
def test_what_is_wrong_with_a_tensor_or_a_message_crosses_as_it_is(leaf: type[GramfuseError]) -> None:
    message = "this silo: tensor 'delta:x' has 3 NaN or infinite values out of 9"
    request = TrainRequest(plan="0" * 64, session="1" * 32)
    reply = refusal(request, "ward-3", leaf(message))
    assert (reply.error, reply.exit_code, reply.reason) == (leaf.__name__, leaf.exit_code, message)
