"""`gramfuse merge`: statistics files become a model."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.show.results import check_sound, show_checks, show_steps
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.contract.coverage import coverage_lines
from gramfuse_server.report.page.added_tokens import explain_added_tokens


@click.command()
@click.argument("files", metavar="STATS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The model; must not exist.")
@click.option(
    "--base", metavar="BASE", help="The base model, where it is here: directory, hub id or bundled name. Always needed."
)
@click.option(
    "--alpha", type=click.FloatRange(0, 1), help="Share of off-diagonals kept.  [default: the plan's, or 0.9]"
)
@click.option("--weighting", type=click.Choice(["uniform", "examples"]), help="[default: the plan's, or uniform]")
@click.option(
    "--weight", "weights", multiple=True, metavar="NAME=W", help="Multiply the weight of one file. Can be repeated."
)
@click.option(
    "--heads",
    type=click.Choice(["merged", "own"]),
    help="own: merge the bodies only; each model keeps its head, in OUT/NAME.  [default: the plan's, or merged]",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep added tokens: those that the tokenizer in DIR has beside BASE's.  [default: BASE's tokens only]",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: as torch finds]")
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
    threads: int,
    as_json: bool,
) -> None:
    """Merge fine-tuned models by RegMean, from the files that gramfuse measure wrote of them.

    \b
    gramfuse merge mine.safetensors yours.safetensors --base BASE -o merged

    All STATS must be of one base model, and measured with the same --gram and --freeze. What a file says that its base
    is called is a stranger's word: nothing is loaded for it, and BASE is compared with what the file says of its
    weights, configuration and tokenizer. OUT is an ordinary Hugging Face model with its card, and with report.json and
    SHA256SUMS; nothing is left there if the merge fails. The order of the files does not matter.

    Models may have tokens that were added to BASE's (resize_token_embeddings). They are left out, unless --tokenizer
    names a tokenizer that has them: the row of each is the weighted mean over the models that have that token.

    Files of a plan's silos (gramfuse measure --plan) become the model that gramfuse simulate makes of that plan, bit
    for bit where all used as many threads.
    """
    factors = dict(map(_factor, weights))
    import torch
    from transformers.utils.logging import disable_progress_bar

    from gramfuse_server.merging.files import Settings, merge_files

    if threads:
        torch.set_num_threads(threads)
    say("read the files and the base model", err=True)
    disable_progress_bar()
    settings = Settings(
        alpha=alpha,
        weighting=weighting,  # type: ignore[arg-type]
        weights=factors,
        heads=heads,  # type: ignore[arg-type]
        base=base,
        tokenizer=tokenizer,
    )
    report = merge_files(files, out.absolute(), settings, Path.cwd())
    if len(files) == 1:
        say(
            "One model, merged with no other, is that model again; name the files of others too",
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
    say(*coverage_lines(report), *explain_added_tokens(report), err=True)
    many = "1 model" if len(files) == 1 else f"{len(files)} models"
    say(f"{many} merged ({names}), alpha {report.alpha}, in {report.seconds:.0f} s: {out}")
    check_sound(report, out.absolute())


def _factor(setting: str) -> tuple[str, float]:
    name, separator, text = setting.partition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not separator or not 0 < factor < float("inf"):
        raise click.UsageError(f"--weight {setting}: expected NAME=W with a number above zero, for instance north=2")
    return name, factor
