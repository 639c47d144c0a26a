"""`gramfuse measure`: measures a fine-tuned model, and writes its statistics file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from gramfuse_model.project import Project
from gramfuse_protocol.contract.coverage import Coverage, coverage, coverage_lines, unchanged
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_protocol.text import listed
from gramfuse_simulation.labelled_rows import label_names, row_options

if TYPE_CHECKING:
    from gramfuse_client.measuring.checkpoint import Checkpoint
    from gramfuse_client.state.state import State
    from gramfuse_protocol.statistics.contribution import Contribution


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
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="STATS",
    help="MODEL is an adapter: measure it for a merge with adapters whose matrices A differ; STATS is the file of one "
    "of them. Can be repeated.",
)
@machine
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

    MODEL can be an adapter (LoRA) that PEFT saved, in a directory. The file then has what the adapter trained, and is
    small. Adapters that were trained with one frozen A merge at once. Otherwise measure each a second time, with
    --beside for the files of all others: each file then covers the rows of all A.

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
    say_left_out(report.get("left_out", ()))
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
    name = name_of_file(options["name"], model)
    check_absent(out)
    from gramfuse_client.data.examples import load_measured
    from gramfuse_client.measuring.adapter import open_adapter, task_of_adapter
    from gramfuse_client.measuring.checkpoint import measure as measure_checkpoint
    from gramfuse_client.measuring.checkpoint import open_checkpoint, task_of_model
    from gramfuse_model.adapters.read import is_adapter_directory
    from gramfuse_model.heads import head_parameters
    from gramfuse_protocol.statistics.about import FrozenOfAdapter
    from gramfuse_protocol.statistics.file import write_statistics

    directory = Path.cwd()
    device = prepare(options)
    settings = {"pair": options["text_pair"] is not None, "max-length": options["max_length"] or LENGTH}
    place = directory / Path(model).expanduser()
    is_adapter = is_adapter_directory(place)
    _check_for_adapters(is_adapter, options)
    task = (
        task_of_adapter(place, options["base"], directory, options["task"], **settings)
        if is_adapter
        else task_of_model(model, directory, options["task"], **settings)
    )
    names = label_names(options["labels"], task)
    silo = silo_of(name, options, labelled=labelled)
    examples = load_measured(silo, task, names, labelled=labelled)
    shorten, adapter = options["max_length"] is None, None
    if is_adapter:
        beside = _matrices(options["beside"])
        opened = open_adapter(place, options["base"], task, directory, beside=beside, gram=structures, shorten=shorten)
        checkpoint = opened.checkpoint
        adapter = FrozenOfAdapter(
            matrices={name: matrix.numpy() for name, matrix in opened.adapter.frozen.items()},
            saved=opened.adapter.saved,
            adapters=opened.adapters,
        )
    else:
        checkpoint = open_checkpoint(
            model, options["base"], task, directory, freeze=options["freeze"], gram=structures, shorten=shorten
        )
    if checkpoint.task.max_length < task.max_length:
        say(f"cutting examples to {checkpoint.task.max_length} tokens, the most that MODEL takes", err=True)
    added = checkpoint.added
    _say_growth(checkpoint)
    with show_progress() as show:
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
        adapter=adapter,
    )
    return {
        **_report(out, name, len(examples), sha256, checkpoint.layout, statistics),
        "left_out": list(examples.left_out),
        "added_tokens": list(added.tokens if added else ()),
    }


def _check_for_adapters(is_adapter: bool, options: Mapping[str, Any]) -> None:
    """Raise click.UsageError for options that only adapters take, or only whole models."""
    if is_adapter and options["freeze"]:
        raise click.UsageError("--freeze is for whole models; of an adapter, only what it trained is measured")
    if options["beside"] and not is_adapter:
        raise click.UsageError("--beside is for adapters (MODEL has no adapter_config.json)")


def _matrices(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the matrices A of adapters from their statistics files.

    Raises:
        PlanError: naming a file that is not that of one adapter.
    """
    import torch

    from gramfuse_protocol.statistics.file import read_statistics

    matrices = []
    for path in files:
        file = read_statistics(path)
        if file.about.adapter is None:
            raise PlanError(f"{path}: is not the statistics file of an adapter, so there is nothing to measure beside")
        if file.about.adapter.adapters > 1:
            raise PlanError(f"{path}: was itself measured beside others; name the first file of its adapter")
        matrices.append({name: torch.from_numpy(matrix) for name, matrix in file.frozen().items()})
    return matrices


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
    with show_progress() as show:
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
