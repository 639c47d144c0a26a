"""`gramfuse measure`: measures a fine-tuned model, and writes its statistics file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import columns as column_options
from gramfuse_client.data.formats import READABLE
from gramfuse_deployment.terminal import bars, say, show_json
from gramfuse_model.project import Project
from gramfuse_protocol.contract.coverage import Coverage, coverage, coverage_lines, unchanged
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError, RunDirectoryError
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_protocol.text import listed
from gramfuse_simulation.labelled_rows import COLUMNS, label_names, row_options

if TYPE_CHECKING:
    from gramfuse_client.measuring.checkpoint import Checkpoint
    from gramfuse_client.state.state import State
    from gramfuse_protocol.statistics.contribution import Contribution

LENGTH = Task.model_fields["max_length"].default
"""Default maximum number of tokens in an example."""

FEW = 100
"""Warn if there are fewer examples; also the default of a silo's `limits.minimum-examples`."""

EVERY = 50
"""Steps between two lines of progress without a terminal."""


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--base", metavar="BASE", help="The model that MODEL was fine-tuned from: directory or hub id.")
@click.option(
    "--data",
    metavar="DATA",
    help=f"The training data of MODEL: {READABLE}.",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The statistics file; must not exist."
)
@click.option("--name", help="Name of MODEL in the file.  [default: the last part of MODEL]")
@click.option("--task", type=click.Choice(list(TASK_KINDS)), help="The task of MODEL.  [default: from its config]")
@column_options
@row_options()
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Maximum tokens of an example; longer ones are cut.  [default: 128, or fewer if MODEL takes fewer]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=Merge().tokens,
    show_default=True,
    help="Maximum token rows for one Gram matrix; examples are sampled.",
)
@click.option(
    "--gram",
    multiple=True,
    metavar="PATTERN=STRUCTURE",
    help="Store these weights' Gram matrices as full, block:<width> or diagonal. Can be repeated.  [default: *=full]",
)
@click.option(
    "--freeze",
    multiple=True,
    metavar="PATTERN",
    help="Leave out parameters that fine-tuning did not change, such as 'embeddings'. Can be repeated.",
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples in a batch.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: torch's own choice]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Device to run on.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="Instead of MODEL: fine-tune and measure as a silo of this plan would.",
)
@click.option("--silo", metavar="NAME", help="With --plan: the silo, with the file DIR/silos/NAME.toml, or its file.")
@json_option
@click.pass_context
def measure(context: click.Context, /, model: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Measure a fine-tuned model on its training data, and write a file with everything needed to merge it.

    \b
    gramfuse measure MODEL --base BASE --data train.jsonl -o mine.safetensors
    gramfuse measure --plan DIR --silo NAME -o silo.safetensors

    The first form takes an existing fine-tuned model. gramfuse merge merges its file with those of other models that
    were measured against the same base. All must use the same --gram and --freeze. Rows need no label, except where the
    label is a target text; a label that is present must be one of the model's. MODEL can have tokens added to BASE's.

    The second form is for a silo without a network, under a locked, open plan. The silo fine-tunes and measures as it
    would in a run, by the same rules of its silo file, and writes a line into the ledger. From the silos' files,
    gramfuse merge makes the same model that gramfuse simulate makes from the plan.

    The file reveals MODEL itself (as its difference from BASE) and the Gram matrices of its layers' inputs on the data:
    with few examples, which tokens stood where; with many, still whether a given text was among them. Give it only to
    people to whom you would give MODEL and a summary of its data. Its mode is 0600, so only you can read it until you
    change that. docs/statistics-format.md describes it byte by byte.
    """
    named = {
        parameter
        for parameter in context.params
        if context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE
    }
    if options["plan"] is not None:
        excess = sorted(named - {"plan", "silo", "out", "as_json"})
        if excess:
            raise click.UsageError(
                f"{_option(excess[0])} cannot be used with --plan: the plan and the silo file determine it"
            )
        if options["silo"] is None:
            raise click.UsageError("--plan needs --silo NAME")
        report = _measure_silo(options["plan"], options["silo"], out)
    else:
        missing = [name for name in ("model", "base", "data") if name not in named]
        if missing:
            raise click.UsageError(f"{_option(missing[0])} is missing (or give --plan DIR --silo NAME)")
        if options["silo"] is not None:
            raise click.UsageError("--silo needs --plan")
        assert model is not None  # noqa: S101
        report = _measure_model(model, out, options, labelled="label" in named)
    if report["examples"] < FEW:
        say(
            f"{report['examples']} examples are few: the file reveals much about each, and gramfuse merge gives this "
            "model as much weight as one trained on many, unless you use --weighting examples",
            style="yellow",
            err=True,
        )
    if as_json:
        show_json(report)
        return
    if report.get("left_out"):
        say(f"left out {len(report['left_out'])} bad rows:", *report["left_out"], err=True)
    say(
        f"{out} ({report['bytes'] / 1e6:,.1f} MB): {report['name']!r}, measured on {report['examples']:,} examples.",
        f"sha256 {report['sha256']}",
        *coverage_lines(Coverage(report["closed"], report["unmatched"])),
        "It contains the fine-tuned model and reveals much about its data. To merge it with others: gramfuse merge",
    )


def _option(parameter: str) -> str:
    return "MODEL" if parameter == "model" else f"--{parameter.replace('_', '-')}"


def _measure_model(model: str, out: Path, options: dict[str, Any], *, labelled: bool) -> dict[str, Any]:
    """Measure an existing model, and return the command's report.

    Args:
        labelled: whether the user named a label column; then every row must have a label.
    """
    structures = _structures(options["gram"])
    name = options["name"] or re.sub(r"[^a-z0-9]+", "-", Path(model).resolve().name.lower()).strip("-")[:63]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
        raise click.UsageError(f"--name {name!r}: expected at most 63 lowercase letters, digits and '-'")
    check_absent(out)
    import torch

    from gramfuse_client.data.examples import load_measured
    from gramfuse_client.data.setting_names import option_settings
    from gramfuse_client.measuring.checkpoint import measure as measure_checkpoint
    from gramfuse_client.measuring.checkpoint import open_checkpoint, task_of_model
    from gramfuse_client.silo_file import Data, Silo, SiloFile
    from gramfuse_client.training.finetune import choose_device
    from gramfuse_model.heads import head_parameters
    from gramfuse_protocol.statistics.file import write_statistics

    directory = Path.cwd()
    device = choose_device(options["device"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    settings = {"pair": options["text_pair"] is not None, "max-length": options["max_length"] or LENGTH}
    task = task_of_model(model, directory, options["task"], **settings)
    columns = {key: options[key] for key in ("text", "text_pair", "image", "label")}
    data = Data(train=options["data"], held_out=0.5, skip_bad=options["skip_bad"], **columns)
    names = label_names(options["labels"], task)
    words = option_settings(COLUMNS, unlabelled=not labelled)
    silo = Silo(directory / "--data", SiloFile(name=name, data=data), words=words)
    examples = load_measured(silo, task, names, labelled=labelled)
    checkpoint = open_checkpoint(
        model,
        options["base"],
        task,
        directory,
        freeze=options["freeze"],
        gram=structures,
        shorten=options["max_length"] is None,
    )
    if checkpoint.task.max_length < task.max_length:
        say(f"cutting examples to {checkpoint.task.max_length} tokens, the most that MODEL takes", err=True)
    added = checkpoint.added
    _say_growth(checkpoint)
    with _progress() as show:
        statistics = measure_checkpoint(
            checkpoint,
            examples,
            (model, options["data"]),
            limit=options["tokens"],
            batch_size=options["batch_size"],
            device=device,
            progress=lambda done, total: show("measure", done, total),
        )
    sha256 = write_statistics(
        out,
        statistics,
        name=name,
        base=checkpoint.base.origin(options["base"]),
        task=checkpoint.task,
        layout=checkpoint.layout,
        head=head_parameters(checkpoint.base.model),
        added=added,
    )
    return {
        **_report(out, name, len(examples), sha256, checkpoint.layout, statistics),
        "left_out": list(examples.left_out),
        "added_tokens": list(added.tokens if added else ()),
    }


def _say_growth(checkpoint: Checkpoint) -> None:
    """Print which tokens were added to a model, and how they are handled."""
    growth = checkpoint.growth
    if growth is None:
        return
    if growth.tokens:
        say(
            f"MODEL has tokens that BASE lacks: {listed(growth.tokens, 20)}. Rows of BASE's tokens are measured as "
            "usual; the file stores the rows of added tokens as they are. gramfuse merge leaves them out, unless "
            "--tokenizer names a tokenizer that has these tokens",
            style="yellow",
            err=True,
        )
    if growth.idle:
        say(f"left out {growth.idle:,} rows of MODEL's embedding table that no token uses", style="yellow", err=True)


def _measure_silo(directory: Path, name: str, out: Path) -> dict[str, Any]:
    """Fine-tune and measure a silo of a plan, and return the command's report."""
    check_absent(out)
    project = Project.read(directory)
    layout = project.locked_layout()
    from gramfuse_client.exchange.offline import contribute
    from gramfuse_client.silo_file import Silo
    from gramfuse_client.state.state import State

    path = Path(name) if name.endswith(".toml") else project.directory / "silos" / f"{name}.toml"
    silo = Silo(path, Silo.read(path).file, project.directory)
    plan = project.plan
    with _progress() as show:
        sha256 = contribute(silo, plan, layout, out, _with_progress(State(silo.state, plan.digest), show))
    statistics = State(silo.state, plan.digest).contribution()
    return {
        **_report(out, silo.name, statistics.examples, sha256, layout, statistics),
        "plan_digest": plan.digest,
    }


def _with_progress(state: State, show: Any) -> State:
    """Make a state show its progress on the terminal, besides writing it to disk."""
    note = state.progress

    def progress(phase: str, done: int, total: int) -> None:
        note(phase, done, total)
        show(phase, done, total)

    state.progress = progress  # type: ignore[method-assign]
    return state


def check_absent(out: Path) -> None:
    """Raise RunDirectoryError if a file exists already, or its directory does not."""
    if out.exists():
        raise RunDirectoryError(f"{out} exists already; choose another -o, or remove it")
    if not out.absolute().parent.is_dir():
        raise RunDirectoryError(f"{out}: no directory {out.absolute().parent}; make it first")


def _structures(settings: tuple[str, ...]) -> dict[str, str]:
    """Return the values of --gram in the form of a plan's `merge.gram`."""
    structures = {"*": "full"} if settings else {}
    for setting in settings:
        pattern, separator, structure = setting.rpartition("=")
        try:
            Merge(gram={pattern: structure})
        except ValueError:
            separator = ""
        if not separator:
            raise PlanError(
                f"--gram {setting}: expected PATTERN=STRUCTURE with full, block:<width> or diagonal, for instance "
                "--gram '*=block:128'"
            )
        structures[pattern] = structure
    return structures


def _report(
    out: Path, name: str, examples: int, sha256: str, layout: Layout, statistics: Contribution
) -> dict[str, Any]:
    return {
        "file": str(out.absolute()),
        "name": name,
        "examples": examples,
        "bytes": out.stat().st_size,
        "sha256": sha256,
        **coverage(layout, same=unchanged(layout, [statistics]))._asdict(),
    }


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield a function (phase, done, total) that shows a phase's progress on standard error."""
    names = {"train": "fine-tune", "measure": "measure"}
    with bars("{task.description:<10}") as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(names.get(phase, phase), total=total)
            progress.update(tasks[phase], completed=done)
            if not progress.console.is_terminal and (done % EVERY == 0 or done == total):
                say(f"{names.get(phase, phase)}: {done} of {total}", err=True)

        yield show
