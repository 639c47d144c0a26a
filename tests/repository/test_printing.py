"""Nothing is printed past the one module that prints: all sources are read for what would."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protocol", "model", "client", "server", "simulation", "deployment", "cli")
TERMINAL = "deployment/gramfuse_deployment/terminal.py"

CLICK = {"echo", "secho", "echo_via_pager", "prompt", "confirm", "progressbar", "pause", "launch", "getchar"}
BUILTINS = {"print", "input", "breakpoint"}
LOGGING = {"basicConfig", "Formatter", "StreamHandler", "lastResort", "config"}

ALLOWED = {
    "simulation/gramfuse_simulation/engine.py: logging.basicConfig",  # into its log, whose end is shown
    "simulation/gramfuse_simulation/engine.py: traceback.print_exc",  # there too
    "client/gramfuse_client/app.py: logging.Formatter",  # the base of the one that escapes
    "client/gramfuse_client/app.py: logging.StreamHandler",  # writes with it
    "server/gramfuse_server/app.py: print",  # events in JSON, which is ASCII
}


def past(source: str) -> Iterator[str]:
    """Yield what in a source prints, or could, but for the functions of the one module."""
    modules = {"rich": None, "click": CLICK, "sys": {"stdout", "stderr", "__stdout__", "__stderr__"}}
    modules |= {"pprint": None, "curses": None, "logging": LOGGING, "tqdm": None}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.partition(".")[0] in ("rich", "pprint", "tqdm"))
            case ast.ImportFrom(module=str(module), names=names):
                root = module.partition(".")[0]
                of = modules.get(root, set())
                yield from (f"{module}.{name.name}" for name in names if of is None or name.name in of)
            case ast.Attribute(value=ast.Name(id="click"), attr=attr) if attr in CLICK:
                yield f"click.{attr}"
            case ast.Attribute(value=ast.Name(id="logging"), attr=attr) if attr in LOGGING:
                yield f"logging.{attr}"
            case ast.Attribute(value=ast.Name(id="traceback"), attr=attr) if attr.startswith("print"):
                yield f"traceback.{attr}"
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="sys"), attr=of), attr=attr) if of.strip("_") in (
                "stdout",
                "stderr",
            ) and attr not in ("isatty", "encoding"):
                yield f"sys.{of}.{attr}"
            case ast.Call(func=ast.Attribute(attr="print")):
                yield ".print()"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="write"), args=[ast.Constant(1 | 2), *_]):
                yield "os.write"
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="sys"), attr="exit"), args=[ast.JoinedStr() | ast.BinOp()]
            ):
                yield "sys.exit"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="sys"), attr="exit"), args=[ast.Constant(str())]):
                yield "sys.exit"
            case ast.Call(func=ast.Name(id="SystemExit"), args=[ast.JoinedStr() | ast.Constant(str())]):
                yield "SystemExit"
            case ast.Name(id=name) if name in BUILTINS:
                yield name


def test_nothing_in_the_sources_prints_past_the_one_module() -> None:
    sources = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(sources) > 120
    names = {path: path.relative_to(ROOT).as_posix() for path in sources}
    found = {f"{names[path]}: {what}" for path in sources for what in past(path.read_text(encoding="utf-8"))}
    assert any(line.startswith(TERMINAL) for line in found)
    assert {line for line in found if not line.startswith(TERMINAL)} == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        'print(f"silo {name}")',
        "say = print",
        'click.echo(f"lost: {reason}")',
        "from click import echo",
        "echo = click.secho",
        "click.confirm(label)",
        "from rich.console import Console",
        "import rich.progress",
        "from rich import print",
        'console.print(f"[yellow]{reason}[/]")',
        "self._progress.console.print(line)",
        "sys.stdout.write(text)",
        "sys.stderr.buffer.write(text.encode())",
        "from sys import stderr",
        "os.write(2, text)",
        "traceback.print_exception(error)",
        "logging.basicConfig()",
        'sys.exit(f"error: {reason}")',
        'raise SystemExit(f"error: {reason}")',
        "import pprint",
    ],
)
def test_whatever_prints_is_found(source: str) -> None:
    assert list(past(source))


@pytest.mark.parametrize(
    "source",
    ['say(f"silo {name}")', 'log.error("%s", error)', "sys.exit(code)", "sys.stdout.isatty()", "os.write(file, b'')"],
)
def test_what_does_not_print_is_not_found(source: str) -> None:
    assert not list(past(source))
