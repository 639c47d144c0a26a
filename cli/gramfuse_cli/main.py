"""Entry point: turns errors into messages and exit codes."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from gramfuse_cli.group import FileGroup
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.errors import GramfuseError

INTERRUPTED = 130


@click.group(cls=FileGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gramfuse")
def cli() -> None:
    """Merge language models that were fine-tuned in different data silos, in one exchange, without their data.

    \b
    See it work:            gramfuse demo
    Start a project:        gramfuse init my-merge
    Try it on one machine:  gramfuse simulate my-merge
    Choose α and weights:   gramfuse tune my-merge
    Make a silo's keys:     gramfuse silo keygen silo.toml
    Make certificates:      gramfuse pki init DIR --host HOST
    Lock the plan:          gramfuse plan lock my-merge
    Run the coordinator:    gramfuse server start DIR
    Run a silo:             gramfuse silo start silo.toml
    Merge real silos:       gramfuse run my-merge DIR
    Without a network:      gramfuse measure, gramfuse merge, gramfuse head
    Remake a run's page:    gramfuse report RUN
    Explain an error:       gramfuse explain CODE

    Every command accepts --json: it prints one JSON object on standard output, everything else on standard error.
    """


def main() -> NoReturn:
    """Run the command line and exit: 0, 2 for wrong usage, 130 after Ctrl-C, else the error's own code."""
    for stop in (signal.SIGTERM, signal.SIGHUP):  # closing the terminal stops a run like Ctrl-C, except under nohup
        if signal.getsignal(stop) is not signal.SIG_IGN:
            signal.signal(stop, _interrupt)
    as_json = "--json" in sys.argv
    try:
        result = cli.main(prog_name="gramfuse", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except GramfuseError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json, error.report)
    except click.ClickException as error:
        if not as_json:
            shown = io.StringIO()
            error.show(shown)
            say(*shown.getvalue().rstrip().split("\n"), err=True)
            sys.exit(error.exit_code)
        _fail("UsageError", error.format_message(), error.exit_code, as_json)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted", "interrupted; no process was left", INTERRUPTED, as_json)
    except Exception:  # noqa: BLE001  # so that --json prints JSON even for our own bugs
        _fail("InternalError", f"this is a bug in gramfuse\n{traceback.format_exc()}", 1, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool, report: Path | None = None) -> NoReturn:
    """Print an error and exit.

    Args:
        kind: the error's class name.
        code: the exit code.
        report: the failed run's report, if it left one.
    """
    if as_json:
        left = {} if report is None else {"report": str(report)}
        show_json({"error": {"type": kind, "message": message, "exit_code": code, **left}})
    first, *others = message.split("\n")
    say(f": {first}", *(f"  {line}" for line in others), lead=("error", "bold red"), err=True)
    if report is not None:
        say(f"report of the failed run: {report}", err=True)
    if 10 <= code < 100:
        say(f"exit code {code}; what to do: gramfuse explain {code}", err=True)
    sys.exit(code)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
