"""`gramfuse head measure`: writes the sums that a model's head is fitted from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gramfuse_cli.measuring import (
    FEW,
    LENGTH,
    check_absent,
    name_of_file,
    prepare,
    say_left_out,
    show_progress,
    silo_of,
)
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import columns as column_options
from gramfuse_cli.options import machine
from gramfuse_client.data.formats import READABLE
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.statistics.head_file import fitted_by_files
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_protocol.text import listed
from gramfuse_simulation.labelled_rows import parse_names, skip_bad


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--data", metavar="DATA", required=True, help=f"The silo's training data, with labels: {READABLE}.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The head file; must not exist.")
@click.option("--name", help="Name of the silo in the file.  [default: OUT's name up to the first dot]")
@click.option(
    "--task",
    type=click.Choice([name for name, kind in TASK_KINDS.items() if fitted_by_files(kind)]),
    help="The task of the head.  [default: from MODEL's config]",
)
@click.option(
    "--labels",
    metavar="NAME,…",
    help="All labels of the head, in order, as in DATA; the same at all silos.  [default: those of MODEL's config]",
)
@column_options
@skip_bad
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Maximum tokens of an example; longer ones are cut.  [default: 128, or fewer if MODEL takes fewer]",
)
@click.option(
    "--minimum-label-examples",
    "least",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Leave out labels with fewer examples: of a label with one, the file has that example's features.",
)
@machine
@json_option
def measure(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Measure a model on a silo's data, and write a file with the sums that its head is fitted from.

    \b
    gramfuse head measure merged --data train.jsonl -o north.head.safetensors
    gramfuse head measure BASE --labels no,yes --data train.jsonl -o north.head.safetensors

    MODEL is the same at all silos: a model that gramfuse merge wrote, or a base model without a head for the labels.
    All silos use the same --labels and --max-length. A silo need not have examples of all labels. Give all files to
    gramfuse head fit.

    The file reveals, of the features that enter MODEL's head, their products in pairs, summed over all examples, and
    for each label their sum and the number of examples: so the mean of the silo's examples of a label, and how many it
    has. Nothing is masked. Its mode is 0600, so only you can read it until you change that. docs/statistics-format.md
    describes it byte by byte.
    """
    report = _measure(model, out, options)
    if report["examples"] < FEW:
        say(f"{report['examples']} examples are few: the file reveals much about each", style="yellow", err=True)
    if as_json:
        show_json(report)
        return
    say_left_out(report["left_out"])
    if report["rare_labels"]:
        say(
            f"left out {sum(report['rare_labels'].values())} examples of labels with fewer than {options['least']}: "
            f"{listed(sorted(report['rare_labels']))}",
            err=True,
        )
    say(
        f"{out} ({report['bytes'] / 1e6:,.1f} MB): {report['name']!r}, measured on {report['examples']:,} examples.",
        f"sha256 {report['sha256']}",
        "It reveals sums over its data. To fit the head to all silos' files: gramfuse head fit",
    )


def _measure(model: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a model, write the file, and return the command's report."""
    name = name_of_file(options["name"], out.name.partition(".")[0])
    check_absent(out)
    from gramfuse_client.data.examples import load_training, outputs
    from gramfuse_client.measuring.head_of_model import measure_head, open_headed, task_of_head
    from gramfuse_protocol.statistics.head_file import write_head

    directory = Path.cwd()
    device = prepare(options)
    labels = None if options["labels"] is None else parse_names(options["labels"])
    settings = {"pair": options["text_pair"] is not None, "max-length": options["max_length"] or LENGTH}
    task = task_of_head(model, directory, options["task"], labels, **settings)
    examples = load_training(silo_of(name, options, labelled=True), task, outputs(task))
    headed = open_headed(model, task, directory, shorten=options["max_length"] is None)
    if headed.task.max_length < task.max_length:
        say(f"cutting examples to {headed.task.max_length} tokens, the most that MODEL takes", err=True)
    if headed.random:
        say(
            f"MODEL's files lack {listed(headed.random, 4)}: its features pass through random numbers there, the same "
            "at all silos",
            style="yellow",
            err=True,
        )
    with show_progress() as show:
        measured = measure_head(
            headed,
            examples,
            (model, options["data"]),
            least=options["least"],
            batch_size=options["batch_size"],
            device=device,
            progress=lambda done, total: show("measure", done, total),
        )
    sha256 = write_head(
        out,
        measured.sums,
        name=name,
        model=headed.model.origin(model),
        task=headed.task,
        head=headed.head,
        least=options["least"],
    )
    return {
        "file": str(out.absolute()),
        "name": name,
        "examples": round(measured.sums.examples),
        "bytes": out.stat().st_size,
        "sha256": sha256,
        "rare_labels": measured.rare,
        "left_out": list(examples.left_out),
    }
