"""`gramfuse head fit`: fits a model's head to the sums of several silos."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.text import listed
from gramfuse_server.report.page.words import explain_check


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("files", metavar="FILES...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the model; must not exist."
)
@click.option(
    "--seen",
    is_flag=True,
    help="MODEL was trained on the examples of FILES: its head becomes half as sure, as features of such examples lie "
    "too close to the means of their labels.",
)
@json_option
def fit(model: str, files: tuple[Path, ...], out: Path, seen: bool, as_json: bool) -> None:
    """Fit the head of a model to the head files of all silos together, and write the model with it.

    \b
    gramfuse head fit merged north.head.safetensors south.head.safetensors --seen -o fitted

    FILES are from gramfuse head measure. MODEL is the model that all of them were measured on; it stays as it is. OUT
    is an ordinary Hugging Face model with a model card and SHA256SUMS: MODEL with another last layer. Nothing remains
    there if it fails. The order of the files does not matter; each example counts the same.

    Compare OUT with MODEL on held-out data before you use it: a head that was trained well can be better.
    """
    from transformers.utils.logging import disable_progress_bar

    from gramfuse_server.merging.head_files import fit_files

    disable_progress_bar()
    report = fit_files(model, files, out.absolute(), Path.cwd(), seen=seen)
    for check in report.checks:
        if check.verdict != "ok":
            say(explain_check(check), style="yellow", err=True)
    if report.absent:
        say(
            f"no file has examples of {listed(report.absent)}: the model never predicts them",
            style="yellow",
            err=True,
        )
    if as_json:
        show_json({**report.document(), "out": str(out.absolute())})
        return
    count = f"{len(report.silos)} file" + ("s" if len(report.silos) > 1 else "")
    examples = sum(report.examples.values())
    names = ", ".join(silo.name for silo in report.silos)
    say(f"fitted {', '.join(report.tensors)} to {examples:,} examples in {count} ({names}): {out}")
