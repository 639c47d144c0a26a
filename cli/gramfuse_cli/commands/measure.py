"""`gramfuse measure`: statistics as a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import columns as column_options
from gramfuse_deployment.terminal import bars, say, show_json
from gramfuse_model.project import Project
from gramfuse_protocol.contract.coverage import Coverage, coverage, coverage_lines, unchanged
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError, RunDirectoryError
from gramfuse_protocol.tasks.registry import KINDS
from gramfuse_protocol.text import listed
from gramfuse_simulation.labelled_rows import COLUMNS, label_names, row_options

if TYPE_CHECKING:
    from gramfuse_client.measuring.checkpoint import Checkpoint
    from gramfuse_client.state.state import State
    from gramfuse_protocol.statistics.contribution import Contribution

LENGTH = Task.model_fields["max_length"].default
"""Most tokens of an example, where nothing is said."""

FEW = 100
"""Examples under which a warning is worth it; silos take part in no run with fewer, unless their files say so."""

EVERY = 50
"""Steps between two lines of progress where there is no terminal."""


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--base", metavar="BASE", help="The model that MODEL was fine-tuned from: directory or hub id.")
@click.option(
    "--data",
    metavar="DATA",
    help="What MODEL was fine-tuned on: .jsonl, .json, .csv, .tsv, .parquet, or hf:NAME[:config][#split].",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The statistics file; must not exist."
)
@click.option("--name", help="What the file calls MODEL.  [default: the last part of MODEL]")
@click.option("--task", type=click.Choice(list(KINDS)), help="What MODEL is for.  [default: as its config says]")
@column_options
@row_options()
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Most tokens of an example.  [default: 128, or as many as MODEL has places for]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=Merge().tokens,
    show_default=True,
    help="Most token rows for one Gram matrix; examples are drawn.",
)
@click.option(
    "--gram",
    multiple=True,
    metavar="PATTERN=STRUCTURE",
    help="Keep these weights' Gram matrices as full, block:<width> or diagonal. Can be repeated.  [default: *=full]",
)
@click.option(
    "--freeze",
    multiple=True,
    metavar="PATTERN",
    help="Leave out parameters that fine-tuning did not change, such as 'embeddings'. Can be repeated.",
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples at a time.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: as torch finds]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to run.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="In place of MODEL: fine-tune and measure as a silo of this plan would.",
)
@click.option(
    "--silo", metavar="NAME", help="With --plan: which silo; its file is DIR/silos/NAME.toml, or give the file."
)
@json_option
@click.pass_context
def measure(context: click.Context, /, model: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Measure a fine-tuned model on its training data, and write what others need to merge it.

    \b
    gramfuse measure MODEL --base BASE --data train.jsonl -o mine.safetensors
    gramfuse measure --plan DIR --silo NAME -o silo.safetensors

    The first form is for a model that is there already. Models that others measured against the same base can be merged
    with it: gramfuse merge. All must use the same --gram and --freeze. Rows need no label, but for target texts; one
    that is there must be the model's. MODEL may have tokens that were added to BASE's.

    The second is for a silo of a locked, open plan that has no network: it fine-tunes and measures as it would in
    a run, by the same rules of the silo file, with a line in the ledger; gramfuse merge makes of the silos' files what
    gramfuse simulate makes of the plan.

    The file gives away MODEL itself (its difference from BASE) and the Gram matrices of its layers' inputs on the
    data: with few examples, which tokens stood where; with many, still whether a text was among them. Give it to
    whomever you would give MODEL and a summary of its data. Only you can read it until you change its mode (0600).
    docs/statistics-format.md has it byte for byte.
    """
    given = {
        parameter
        for parameter in context.params
        if context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE
    }
    if options["plan"] is not None:
        odd = sorted(given - {"plan", "silo", "out", "as_json"})
        if odd:
            raise click.UsageError(
                f"{_spelled(odd[0])} does not go with --plan: the plan and the silo file say all of that"
            )
        if options["silo"] is None:
            raise click.UsageError("--plan needs --silo NAME")
        report = _silo(options["plan"], options["silo"], out)
    else:
        missing = [name for name in ("model", "base", "data") if name not in given]
        if missing:
            raise click.UsageError(f"{_spelled(missing[0])} is missing (or give --plan DIR --silo NAME)")
        if options["silo"] is not None:
            raise click.UsageError("--silo goes with --plan")
        assert model is not None  # noqa: S101
        report = _checkpoint(model, out, options, labelled="label" in given)
    if report["examples"] < FEW:
        say(
            f"{report['examples']} examples are few: the file says much of each, and gramfuse merge gives this model "
            "as much weight as one of many, unless it is told --weighting examples",
            style="yellow",
            err=True,
        )
    if as_json:
        show_json(report)
        return
    if report.get("left_out"):
        say(f"{len(report['left_out'])} bad rows are left out:", *report["left_out"], err=True)
    say(
        f"{out} has {report['bytes'] / 1e6:,.1f} MB: {report['name']!r}, measured on {report['examples']:,} examples.",
        f"sha256 {report['sha256']}",
        *coverage_lines(Coverage(report["closed"], report["unmatched"])),
        "It holds the fine-tuned model and says much about its data. Merge it with others: gramfuse merge",
    )


def _spelled(parameter: str) -> str:
    return "MODEL" if parameter == "model" else f"--{parameter.replace('_', '-')}"


def _checkpoint(model: str, out: Path, options: dict[str, Any], *, labelled: bool) -> dict[str, Any]:
    """Measure a model that is there already, and return what is to be said of it.

    Args:
        labelled: whether a column of labels was named, which must be there then.
    """
    structures = _structures(options["gram"])
    name = options["name"] or re.sub(r"[^a-z0-9]+", "-", Path(model).resolve().name.lower()).strip("-")[:63]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
        raise click.UsageError(f"--name {name!r}: expected small letters, digits and '-', 63 at most")
    check_absent(out)
    import torch

    from gramfuse_client.data.examples import load_measured
    from gramfuse_client.data.setting_names import of_options
    from gramfuse_client.measuring.checkpoint import measure as measure_checkpoint
    from gramfuse_client.measuring.checkpoint import open_checkpoint, task_of_model
    from gramfuse_client.silo_file import Data, Silo, SiloFile
    from gramfuse_client.training.finetune import choose_device
    from gramfuse_model.heads import head_parameters
    from gramfuse_protocol.statistics.file import write_statistics

    here = Path.cwd()
    device = choose_device(options["device"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    settings = {"pair": options["text_pair"] is not None, "max-length": options["max_length"] or LENGTH}
    task = task_of_model(model, here, options["task"], **settings)
    columns = {key: options[key] for key in ("text", "text_pair", "image", "label")}
    data = Data(train=options["data"], held_out=0.5, skip_bad=options["skip_bad"], **columns)
    names = label_names(options["labels"], task)
    words = of_options(COLUMNS, unlabelled=not labelled)
    silo = Silo(here / "--data", SiloFile(name=name, data=data), words=words)
    examples = load_measured(silo, task, names, labelled=labelled)
    checkpoint = open_checkpoint(
        model,
        options["base"],
        task,
        here,
        freeze=options["freeze"],
        gram=structures,
        shorten=options["max_length"] is None,
    )
    if checkpoint.task.max_length < task.max_length:
        say(f"examples are cut to {checkpoint.task.max_length} tokens, as many as MODEL has places for", err=True)
    added = checkpoint.added
    _tell_growth(checkpoint)
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


def _tell_growth(checkpoint: Checkpoint) -> None:
    """Say which tokens were added to a model, and what becomes of them."""
    growth = checkpoint.growth
    if growth is None:
        return
    if growth.tokens:
        say(
            f"MODEL has tokens that BASE has not: {listed(growth.tokens, 20)}. Rows of BASE's tokens are measured as "
            "always. Those of the others are in the file as they are; gramfuse merge leaves them out, and keeps them "
            "if --tokenizer names a tokenizer that has the tokens",
            style="yellow",
            err=True,
        )
    if growth.idle:
        say(f"rows of MODEL's table that are no token's are left out: {growth.idle:,}", style="yellow", err=True)


def _silo(directory: Path, name: str, out: Path) -> dict[str, Any]:
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
        sha256 = contribute(silo, plan, layout, out, _shown(State(silo.state, plan.digest), show))
    statistics = State(silo.state, plan.digest).contribution()
    return {
        **_report(out, silo.name, statistics.examples, sha256, layout, statistics),
        "plan_digest": plan.digest,
    }


def _shown(state: State, show: Any) -> State:
    """Have a state show progress on the terminal beside noting it on its disk."""
    note = state.progress

    def progress(phase: str, done: int, total: int) -> None:
        note(phase, done, total)
        show(phase, done, total)

    state.progress = progress  # type: ignore[method-assign]
    return state


def check_absent(out: Path) -> None:
    """Raise RunDirectoryError if a file has this name already, or its directory is not there."""
    if out.exists():
        raise RunDirectoryError(f"{out} exists already; choose another -o, or remove it")
    if not out.absolute().parent.is_dir():
        raise RunDirectoryError(f"{out}: there is no directory {out.absolute().parent}; make it first")


def _structures(settings: tuple[str, ...]) -> dict[str, str]:
    """Return --gram as `merge.gram` of a plan has it."""
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
    """Yield a function (phase, done, total) that shows how far a phase is, on standard error."""
    names = {"train": "fine-tune", "measure": "measure"}
    with bars("{task.description:<10}") as shown:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = shown.add_task(names.get(phase, phase), total=total)
            shown.update(tasks[phase], completed=done)
            if not shown.console.is_terminal and (done % EVERY == 0 or done == total):
                say(f"{names.get(phase, phase)}: {done} of {total}", err=True)

        yield show
