"""Options that several commands share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gramfuse_deployment.endpoint import listening_address
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_server.merging.methods.registry import METHODS
from gramfuse_simulation.labelled_rows import F
from gramfuse_simulation.terms import Term, explained, parse_terms


def as_json(command: F) -> F:
    """Add --json."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object on standard output; everything else goes to standard error.",
    )(command)


def project_directory(command: F) -> F:
    """Add the argument DIR."""
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, exists=True))(command)


def settings(command: F) -> F:
    """Add --set, --seed and --out."""
    for option in (
        click.option(
            "-o", "--out", type=click.Path(path_type=Path), help="Run directory to make.  [default: runs/<plan>-<time>]"
        ),
        click.option("--seed", type=click.IntRange(0), help="Same as --set training.seed=SEED."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the plan, for instance --set merge.alpha=1.0. Can be repeated.",
        ),
    ):
        command = option(command)
    return command


def columns(command: F) -> F:
    """Add --text, --text-pair, --image and --label."""
    for option in (
        click.option("--label", default="label", show_default=True, help="Column with the label."),
        click.option("--image", default="image", show_default=True, help="Column with the image."),
        click.option("--text-pair", help="Column with the second text, for models of text pairs."),
        click.option("--text", default="text", show_default=True, help="Column with the (first) text."),
    ):
        command = option(command)
    return command


def machine(command: F) -> F:
    """Add --batch-size, --threads and --device."""
    for option in (
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda", "mps"]),
            default="auto",
            show_default=True,
            help="Device to run on.",
        ),
        click.option(
            "--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: torch's own choice]"
        ),
        click.option(
            "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples in a batch."
        ),
    ):
        command = option(command)
    return command


def open_mode(command: F) -> F:
    """Add --open."""
    return click.option(
        "--open",
        "opened",
        is_flag=True,
        help="Simulate in open mode: same as --set privacy.secure-aggregation=false, and silos allow open uploads "
        "whatever their files say. Nothing leaves this machine.",
    )(command)


def all_settings(settings: tuple[str, ...], seed: int | None, *, opened: bool = False) -> tuple[str, ...]:
    """Return the values of --set, with --seed and --open added."""
    seeds = () if seed is None else (f"training.seed={seed}",)
    return (*settings, *seeds, *(("privacy.secure-aggregation=false",) if opened else ()))


def run_path(out: Path | None, plan: Plan) -> Path:
    """Return the run directory: `out`, or a new one under ./runs."""
    return (out or Path("runs") / f"{plan.plan.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def compare_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --compare."""

    def parse(_: click.Context, __: click.Parameter, text: str | None) -> tuple[Term, ...]:
        try:
            return () if text is None else parse_terms(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    methods = "\n\n".join(map(explained, METHODS.values()))
    return click.option(
        "--compare",
        callback=parse,
        metavar="TERM,…",
        help="Measure other models on the same held-out examples, for instance fisher:soft,ensemble,fedavg:5. All "
        f"except simple need open mode (see --open).\n\n{methods}",
    )(command)


def _address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            listening_address(value, 1)
        except PlanError as error:
            raise click.BadParameter(str(error)) from None
    return value


def listening(command: F) -> F:
    """Add --host and --port."""
    for option in (
        click.option("--port", default=9443, show_default=True, type=click.IntRange(1, 65535), help="Port for silos."),
        click.option(
            "--host",
            metavar="IP",
            callback=_address,
            help="Address of this machine to listen on for silos.  [default: 0.0.0.0, all addresses]",
        ),
    ):
        command = option(command)
    return command
