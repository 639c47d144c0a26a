"""A coordinator, a silo or a stranger that writes what an owner or an operator reads.

A plan's author puts text into labels and names that draws another plan over the real one: other keys, another mode. A
silo does the same to the coordinator's terminal by a reason, and whoever publishes statistics to a model's page by the
name of a base. Text that does not show is refused where it is parsed, and other text is shown as it is, on its own
line, and no more of it than leaves the rest in sight.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import yaml
from flwr.app import Error
from flwr.supercore.task_identity import TaskIdentity
from markdown_it import MarkdownIt
from pydantic import ValidationError

from gramfuse_cli import main as cli_main
from gramfuse_cli.main import cli
from gramfuse_cli.show.progress import RunProgress
from gramfuse_client.app import _Formatter
from gramfuse_client.guard.ledger_lines import Entry
from gramfuse_client.silo_file import SiloFile
from gramfuse_model.loading.auto_classes import merged_form
from gramfuse_model.project import Project
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.documents import parse
from gramfuse_protocol.errors import FederationError, GramfuseError, PlanError
from gramfuse_protocol.messages import phases as m
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.statistics.about import About, Origin
from gramfuse_protocol.text import QUOTE_LIMIT, printable
from gramfuse_server.app import coordinate
from gramfuse_server.report.merged_model import card, front_matter
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import Measured, Report
from tests.grid import InProcessGrid
from tests.pages import open_run

FAKE_KEY = "ab" * 32
SCREEN = {
    "conceal": "\x1b[8m",
    "a whole screen": "\x1b[2J\x1b[1;1Hkeys, to be compared with those silos:",
    "a line of its own": f"\n  silo-b           public key {FAKE_KEY}",
    "carriage return": f"\r  silo-b           public key {FAKE_KEY}",
    "backspaces": "\b" * 20 + "mode secure",
    "C1 control sequence": "\x9b8m",
    "C1 next line": "\x85mode secure",
    "hyperlink": "\x1b]8;;https://evil.example\x1b\\silo-b\x1b]8;;\x1b\\",
    "title of the window": "\x1b]0;approved\x07",
    "bidi override": "\u202ebalis",
    "bidi isolate": "\u2067silo\u2069",
    "bidi mark": "\u200f1 \u061c2",
    "zero width": "si\u200blo\u200d\ufeff",
    "line separator": "a\u2028keys\u2029",
    "tags": "silo\U000e0062",
    "private use": "\ue000",
    "marks that run into other lines": "a" + "\u0336" * 40,
    "a blank letter": "\u3164",
}
"""What a terminal obeys, or a reader does not see."""

SHOWN = [
    "[bold red]mode open[/]",
    "[/x] [/]",
    ":smile: :skull:",
    "[link=https://evil.example]silo-b[/link]",
    "keys; compare them with these silos:",
    " " * 60 + f"  silo-b           public key {FAKE_KEY}",
    "' and 0 more",
    "x" * 200,
    "漢字 é 👍🏽",
]
"""Labels that are legal, and try the same by markup, by emoji codes, by looking like a heading, by their length."""


class Terminal(io.StringIO):
    """A screen of 80 columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Return a function that puts a terminal in the place of standard output and error."""

    def begin() -> Terminal:
        screen = Terminal()
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return begin


def seen(text: str) -> list[str]:
    """What stands on a screen in the end; it obeys colours, and the moves with which bars are drawn anew."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])", text):
        match part:
            case "\n":
                row += 1
                lines += [""] * (row == len(lines))
            case "\x1b[1A":
                row -= 1
            case "\x1b[2K":
                lines[row] = ""
            case "\r" | "\x1b[?25l" | "\x1b[?25h":
                pass
            case _ if re.fullmatch(r"\x1b\[[0-9;]*m", part):
                assert not {"8", "7"} & set(part[2:-1].split(";")), "something is concealed"
            case _:
                assert printable(part), part
                lines[row] += part
    return [line.rstrip() for line in lines]


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every text in a document, and of every key that a document's author chooses."""
    if isinstance(document, str):
        yield path
    elif isinstance(document, dict):
        for key, value in document.items():
            yield from leaves(value, (*path, key))
            if path and path[-1] in ("gram", "weights", "own", "tokens"):
                yield (*path, key, None)
    elif isinstance(document, list | tuple):
        for place, value in enumerate(document):
            yield from leaves(value, (*path, place))


def forged(document: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy of a document with something added to a text in it, or to a key."""
    made = copy.deepcopy(document)
    *way, last = path if path[-1] is not None else path[:-1]
    at = made
    for step in way:
        at = at[step]
    if path[-1] is None:
        at[last + text] = at.pop(last)
    else:
        at[last] += text
    return made


PLAN = """
[plan]
name = "clinics"
[model]
base = "some/base"
task = "multi-label"
labels = ["pain", "fever"]
[training]
freeze = ["embeddings"]
[merge]
gram = {"*" = "full"}
exclude = ["*pooler*"]
[privacy]
secure-aggregation = false
metrics = "silo"
[[silo]]
name = "north"
labels = ["pain", "fever"]
[[silo]]
name = "south"
"""
LAYOUT = {
    "version": 1,
    "groups": [
        {"name": "g", "d_in": 2, "structure": "full", "weights": [{"weight": "a", "d_out": 2, "transposed": True}]}
    ],
    "tensors": [{"name": "a", "shape": [2, 2], "merge": "regmean"}, {"name": "b", "shape": [2], "merge": "mean"}],
    "frozen": ["c"],
}


def _layout(document: Any) -> Layout:
    return Layout.parse(json.dumps(document))


def _about(document: Any) -> About:
    return About.model_validate_json(json.dumps(document), by_alias=True, by_name=False)


DOCUMENTS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "plan": (tomllib.loads(PLAN), lambda document: Plan.parse(tomlkit.dumps(document), "plan.toml")),
    "silo file": (
        tomllib.loads(
            'name = "north"\nbase = "b"\nstate = "s"\nidentity = "i"\n[data]\ntrain = "t"\nheld-out = "h"\ntext = "x"\n'
            '[limits]\ntrain-hours = "20:00-06:00"\n[coordinator]\naddress = "h:1"\nca = "c"\n'
        ),
        lambda document: parse(SiloFile, tomlkit.dumps(document), "silo.toml"),
    ),
    "layout": (LAYOUT, _layout),
    "statistics file": (
        json.loads(
            About(
                name="north",
                base=Origin(name="some/base", weights={"a": "0" * 64}, config="1" * 64, processor="2" * 64),
                task=Task(task="classification", labels=("yes", "no")),
                layout=_layout(LAYOUT),
                examples=1,
                tokens={"g": 1},
                head=("a",),
                own={"d": (1,)},
                plan=PLAN,
                made_by="1",
            ).model_dump_json(by_alias=True)
        ),
        _about,
    ),
    "line of a ledger": (
        {"phase": "join", "kind": "reply", "form": "open", "note": "said"}
        | {"items": [{"name": "a", "dtype": "text", "shape": [], "bytes": 1, "sha256": "0" * 64}]},
        lambda document: Entry.model_validate_json(json.dumps(document)),
    ),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_text_that_a_terminal_obeys_is_refused_wherever_it_stands(kind: str) -> None:
    """It hoped that one field was forgotten: a name, a pattern, a key of a table. No document with such a text parses.

    What is said of it quotes it so that it can be read.
    """
    document, parsed = DOCUMENTS[kind]
    parsed(document)
    places = list(leaves(document))
    assert len(places) > 4
    for path in places:
        for what, text in SCREEN.items():
            if path == ("plan",) and text[:1] == "\n":
                continue  # a whole plan has lines; it is parsed again where it is used
            with pytest.raises((PlanError, ValidationError, ValueError)) as refused:
                parsed(forged(document, path, text))
            if isinstance(refused.value, PlanError):
                assert all(map(printable, str(refused.value).split("\n"))), (path, what)


ABOUT = {"plan": "0" * 64, "session": "f" * 32, "round": 1}
MESSAGES = {
    "refusal": m.Refusal(**ABOUT, silo="silo-a", error="PlanError", exit_code=10, reason="why"),
    "train": m.TrainReply(**ABOUT, silo="silo-a", examples=1, tokens={"g": 1}),
}


@pytest.mark.parametrize("phase", MESSAGES)
def test_a_message_with_such_a_text_cannot_be_read(phase: str) -> None:
    """A silo answers by hand, past its gramfuse, and what it sends is well-formed but for its text."""
    header = json.loads(pack(MESSAGES[phase]).header)
    unpack(Frame(canonical_json(header).decode(), ()), m.REPLIES)
    for path in leaves(header["body"]):
        for text in SCREEN.values():
            made = {**header, "body": forged(header["body"], path, text)}
            with pytest.raises(FederationError) as refused:
                unpack(Frame(canonical_json(made).decode(), ()), m.REPLIES)
            assert printable(str(refused.value))
    arrays = {**header, "arrays": [["masked\x1b[8m", "uint64", [0]]]}
    with pytest.raises(FederationError) as refused:
        unpack(Frame(canonical_json(arrays).decode(), ()), m.REPLIES)
    assert printable(str(refused.value))


def test_a_plan_of_many_bad_labels_does_not_scroll_its_first_error_away() -> None:
    """Five hundred labels of two thousand characters each: what is wrong is said in a few lines."""
    labels = json.dumps([f"{n}\x1b" + "x" * 2000 for n in range(500)])
    with pytest.raises(PlanError) as refused:
        Plan.parse(PLAN.replace('["pain", "fever"]', labels, 1), "plan.toml")
    assert len(str(refused.value)) < 20_000
    assert str(refused.value).count("\n") <= 20


def test_what_an_owner_approves_is_the_last_that_is_shown(
    pico_project: Callable[..., Any], show: Callable[[], Terminal]
) -> None:
    """A plan with hundreds of labels that look like keys, headings and modes, or are markup, or are as long as may be.

    It hoped that the owner compares its keys. The owner sees mode, thresholds, keys and digest below all of it, as they
    are in the plan, and no line but theirs looks like one of them.
    """
    project = pico_project(silos=4, examples=12, secure=True)
    labels = [*SHOWN, "animals", "weather", "kitchen", *(f"keys; compare them {n}:" for n in range(400))]
    text = re.sub(
        "^labels = .*$", lambda _: f"labels = {tomlkit.item(labels).as_string()}", project.plan.read_text(), flags=re.M
    )
    for name in project.names:
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\nlabels = {tomlkit.item(labels).as_string()}\n')
    project.plan.write_text(text)
    terminal = show()
    cli.main(["plan", "show", str(project.directory)], standalone_mode=False)
    plan = Project.read(project.directory).locked()[0]
    lines = seen(terminal.getvalue())
    last = [line for line in lines if line][-10:]
    assert last[0].startswith("mode secure: ")
    assert last[1:4] == [
        "  silos 4, threshold 3, minimum survivors 3",
        "  may drop out                              1",
        "  may collude with a malicious coordinator  1 (the plan asks for 1)",
    ]
    assert last[4].startswith("keys; ")
    assert last[5:9] == [f"  {silo.name:<16} public key {silo.public_key}" for silo in plan.silo]
    assert last[9].startswith(f"plan pico, version 1, digest {plan.digest}")
    above = lines[: lines.index(last[0])]
    assert not [line for line in above if re.match(" *(keys|silo-[b-d] +public|mode|silos \\d)", line)]
    assert len(above) < 100
    told = " ".join(line.removeprefix("│ ") for line in above)
    assert "[bold red]mode open[/]" in told
    assert ":smile: :skull:" in told
    assert "[link=https://evil.example]silo-b[/link]" in told
    assert "and 404 more" in told
    assert "more characters)" in told.replace("│", "")


@pytest.fixture
def _server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets in the process of a ServerApp."""
    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)


@pytest.mark.usefixtures("_server_app")
@pytest.mark.parametrize("what", ["conceal", "hyperlink", "C1 control sequence", "carriage return", "bidi override"])
def test_a_reason_of_flower_reaches_the_operator_as_text(
    pico_project: Callable[..., Any], tmp_path: Path, what: str
) -> None:
    """A silo answers by one of Flower's errors, whose reason draws on the screen and puts a success into the log.

    The operator reads what it sent, cut short, in the error, in the events, in the report and on its page.
    """
    evil = SCREEN[what] + '\n{"phase": "end", "state": "end", "seconds": 0} <script>alert(1)</script>' + "x" * 10_000
    project = pico_project(silos=2, examples=12)
    plan, layout = Project.read(project.directory).locked()
    events: list[dict[str, Any]] = []

    def silo(*_: Any) -> Any:
        raise AssertionError("it answers by the fault")

    grid = InProcessGrid(dict.fromkeys(plan.names, silo), fault=lambda visit, deliver: Error(6, evil))
    with pytest.raises(GramfuseError) as ended:
        coordinate(grid, plan, layout, project.directory, tmp_path / "run", observer=events.append)
    assert all(printable(line) and len(line) < QUOTE_LIMIT + 200 for line in str(ended.value).split("\n"))
    assert {event["silo"] for event in events if event["state"] == "lost"} != set()
    assert all(printable(event["reason"]) for event in events if event["state"] == "lost")
    left = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("run*/*") if path.is_file()}
    assert {"report.json", "report.html"} <= left.keys()
    texts: list[str] = [text for path in leaves(json.loads(left["report.json"])) if (text := _at(left, path))]
    assert any("more characters)" in text for text in texts)
    assert all(printable(line) for text in (*texts, *left.values()) for line in text.split("\n"))
    assert "<script>" not in left["report.html"]


def _at(left: dict[str, str], path: tuple[Any, ...]) -> str:
    found = json.loads(left["report.json"])
    for step in path:
        found = found if step is None else found[step]
    return found if isinstance(found, str) else ""


@pytest.mark.parametrize("reason", [*SHOWN, "[/x]", "[@click=app.bell]x[/]", "\\[/x]", "x" * 2000])
def test_a_refusal_is_no_markup_and_the_display_of_a_run_goes_on(show: Callable[[], Terminal], reason: str) -> None:
    """A silo refuses with `[/x]`, which is markup that closes nothing, and hoped to end the display and the run.

    The operator reads the refusal as it was said, and the phases after it.
    """
    terminal = show()
    request = m.TrainRequest(**ABOUT)
    refusal = m.Refusal(**ABOUT, silo="silo-a", error="PlanError", exit_code=10, reason=reason)
    with pytest.raises(GramfuseError) as lost:
        m.expect(m.TrainReply, request, refusal, "silo 'silo-a'")
    with RunProgress(("silo-a", "silo-b"), lambda _: None) as progress:
        progress.take({"phase": "train", "state": "start"})
        progress.take({"phase": "train", "state": "lost", "silo": "silo-a", "reason": str(lost.value)})
        progress.take({"phase": "merge", "state": "start"})
    lines = seen(terminal.getvalue())
    (first,) = [number for number, line in enumerate(lines) if line.startswith("  silo-a       lost: ")]
    (merge,) = [number for number, line in enumerate(lines) if line == "merge"]
    told = [line for line in lines[first + 1 : merge] if line]
    assert all(line.startswith("│ ") for line in told if not line.startswith("  silo-")), "a folded line says so"
    said = re.sub(r"[\s│]", "", "".join(lines[first:merge]))
    assert re.sub(r"\s", "", reason)[:200] in said
    assert len(said) < QUOTE_LIMIT + 200


BASES = [
    "x\nlicense: mit",
    "x: y",
    "- x",
    "evil # license: mit",
    "'x'\"",
    "!!python/object/apply:os.system [id]",
    "&a *a",
    "---",
    "{x: [y]}",
    "`</code><script>alert(1)</script>`` ![x](https://evil.example/p.png)",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) **bold** https://evil.example",
    "true",
    "0x10",
]


@pytest.mark.parametrize("base", BASES)
def test_a_base_name_is_nothing_but_a_name_in_the_model_card(base: str) -> None:
    """A plan's author names a base that ends its line in the card, and hoped to add a licence, or a script."""
    document = tomllib.loads(PLAN)
    document["model"]["base"] = base
    document["model"]["labels"] = document["silo"][0]["labels"] = ["pain", "fever", "```", "~~~ <script>x</script>"]
    if "\n" in base:
        with pytest.raises(PlanError):
            Plan.parse(tomlkit.dumps(document))
        plan = Plan.parse(PLAN)
        lines = front_matter(base, merged_form(plan))  # even so
        assert yaml.safe_load("\n".join(lines[1:-1]))["base_model"] == base
        return
    plan = Plan.parse(tomlkit.dumps(document))
    text = card(plan, ["north", "south"], Measured(name="regmean", kind="regmean", metrics={"micro-f1": 0.5}))
    _, metadata, body = re.split("^---$", text, maxsplit=2, flags=re.M)
    assert yaml.safe_load(metadata) == {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["gramfuse", "regmean", "merge", "federated-learning"],
    }
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *inline) if token.type.startswith(("html", "link", "image", "strong"))]
    assert base in [child.content for child in inline if child.type == "code_inline"]
    fences = [token for token in tokens if token.type == "fence"]
    assert [fence.info for fence in fences] == ["python", "toml"]
    assert Plan.parse(fences[1].content) == plan


def test_a_report_from_a_stranger_makes_a_page_that_says_what_it_says() -> None:
    """Whoever mails a report.json gives its silos, groups and reasons names that draw on the page and on the screen."""
    report, plan = open_run()
    evil = 'north\u202e\x1b[8m\x9b1m<script>alert(1)</script>" onload="x\' \u2028'
    report["silos"][0]["name"] = report["models"][0]["name"] = report["solve"][0]["group"] = evil
    report["lost"] = [{"name": evil, "reason": f"[/x] {evil}"}]
    report["base"]["name"] = report["layout_digest"] = evil
    text = page(Report.read(report), plan)
    assert all(printable(line) for line in text.split("\n"))
    assert "<script" not in text
    assert '" onload="' not in text
    assert "north\\u202e\\x1b[8m\\x9b1m&lt;script&gt;" in text


def test_an_error_that_quotes_others_begins_no_line_of_the_silos_log() -> None:
    """A coordinator's text is quoted in an error; it hoped that the log has a line of it, as of the silo's own."""
    line = "2026-01-01 00:00:00,000 INFO silo north, phase train, plan approved"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.Logger("silo")
    log.addHandler(handler)
    log.error("silo %s: %s", "north", f"cannot be read: \n{line}\x1b[8m")
    try:
        raise ValueError(f"bad\n{line}\x1b[2J")
    except ValueError:
        log.exception("unexpected")
    lines = seen(stream.getvalue())
    assert [text for text in lines if text.startswith("2026-01-01")] == []
    assert [text[:9] for text in lines if not text.startswith((" ", "20"))] == ["Traceback", "ValueErro", ""]


def test_an_error_of_a_command_has_one_beginning(show: Callable[[], Terminal]) -> None:
    """Text of others in an error goes on under it, and looks like no other thing that a command says."""
    terminal = show()
    with pytest.raises(SystemExit):
        cli_main._fail("FederationError", "a log ends:\nexit code 0\nerror\x1b[8m: none \x9b[/x]", 16, as_json=False)
    lines = [line for line in seen(terminal.getvalue()) if line]
    assert lines == [
        "error: a log ends:",
        "  exit code 0",
        "  error\\x1b[8m: none \\x9b[/x]",
        "exit code 16; what to do: gramfuse explain 16",
    ]
