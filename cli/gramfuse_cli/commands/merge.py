"""`gramfuse merge`: merges models from their statistics files."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.show.results import check_sound, show_checks, show_steps
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.contract.coverage import coverage_lines
from gramfuse_server.report.page.added_tokens import explain_added_tokens
from gramfuse_server.report.schema import Report


@click.command()
@click.argument("files", metavar="STATS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory for the model; must not exist."
)
@click.option(
    "--base", metavar="BASE", help="The base model on this machine: directory, hub id or bundled name. Required."
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    help="Share of the Gram matrices' off-diagonals to keep.  [default: the plan's, or 0.9]",
)
@click.option("--weighting", type=click.Choice(["uniform", "examples"]), help="[default: the plan's, or uniform]")
@click.option(
    "--weight", "weights", multiple=True, metavar="NAME=W", help="Multiply the weight of one file. Can be repeated."
)
@click.option(
    "--heads",
    type=click.Choice(["merged", "own"]),
    help="own: merge only the bodies; each model keeps its head, in OUT/NAME.  [default: the plan's, or merged]",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the added tokens that the tokenizer in DIR has besides BASE's.  [default: BASE's tokens only]",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="Of a merged adapter: the best adapter of this rank.  [default: the rows of all A, which loses nothing]",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: torch's own choice]")
@json_option
def merge(
    files: tuple[Path, ...],
    out: Path,
    base: str | None,
    alpha: float | None,
    weighting: str | None,
    weights: tuple[str, ...],
    heads: str | None,
    tokenizer: Path | None,
    rank: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """Merge fine-tuned models with RegMean, from their statistics files made by gramfuse measure.

    \b
    gramfuse merge mine.safetensors yours.safetensors --base BASE -o merged

    All STATS must have the same base model, and be measured with the same --gram and --freeze. The name that a file
    gives its base is not trusted: nothing is loaded by that name, and the file's digests of weights, configuration and
    tokenizer are compared with BASE's. OUT is an ordinary Hugging Face model with a model card, report.json and
    SHA256SUMS; nothing remains there if the merge fails. The order of the files does not matter.

    Models can have tokens that were added to BASE's (resize_token_embeddings). They are left out, unless --tokenizer
    names a tokenizer that has them. Then the row of each token is the weighted mean over the models that have it.

    Files of adapters (LoRA) make one adapter, which PEFT loads. Adapters with different A are measured beside each
    other first (gramfuse measure --beside). The merged adapter then has the rows of all A, and --rank makes a smaller
    one: of that rank, the one whose outputs on the silos' data differ least.

    Files of a plan's silos (gramfuse measure --plan) give the same model that gramfuse simulate makes from that plan,
    bit for bit if all use the same number of threads.
    """
    factors = dict(map(_factor, weights))
    import torch
    from transformers.utils.logging import disable_progress_bar

    from gramfuse_server.merging.files import Settings, merge_files

    if threads:
        torch.set_num_threads(threads)
    say("reading the files and the base model", err=True)
    disable_progress_bar()
    settings = Settings(
        alpha=alpha,
        weighting=weighting,  # type: ignore[arg-type]
        weights=factors,
        heads=heads,  # type: ignore[arg-type]
        base=base,
        tokenizer=tokenizer,
        rank=rank,
    )
    report = merge_files(files, out.absolute(), settings, Path.cwd())
    if len(files) == 1:
        say(
            "One model merged with no other is that same model; name the files of other models too",
            style="yellow",
            err=True,
        )
    if as_json:
        check_sound(report, out.absolute())
        show_json({**report.document(), "run": str(out.absolute())})
        return
    show_steps(report.solve, err=True)
    show_checks(report, err=True)
    names = ", ".join(silo.name for silo in report.silos)
    say(*coverage_lines(report), *explain_added_tokens(report), *_truncation(report), err=True)
    count = "1 model" if len(files) == 1 else f"{len(files)} models"
    say(f"merged {count} ({names}), alpha {report.alpha}, in {report.seconds:.0f} s: {out}")
    check_sound(report, out.absolute())


def _truncation(report: Report) -> list[str]:
    """Say what a smaller rank loses."""
    if not report.truncated:
        return []
    worst = max(report.truncated, key=lambda module: report.truncated[module])
    return [
        f"The smaller rank loses {report.truncated[worst]:.1%} of the mean square of the adapter's outputs at {worst}, "
        "and less at the others; report.json has all."
    ]


def _factor(setting: str) -> tuple[str, float]:
    name, separator, text = setting.partition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not separator or not 0 < factor < float("inf"):
        raise click.UsageError(f"--weight {setting}: expected NAME=W with W above zero, for instance north=2")
    return name, factor
