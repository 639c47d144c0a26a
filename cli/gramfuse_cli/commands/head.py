"""`gramfuse head`: commands that fit a classifier's last layer by files."""

from __future__ import annotations

import click

from gramfuse_cli.group import FileGroup


@click.group(cls=FileGroup, prefix="head_")
def head() -> None:
    """Fit the last layer of a classifier to the data of several silos, by files.

    \b
    At each silo:  gramfuse head measure MODEL --data train.jsonl -o north.head.safetensors
    Once:          gramfuse head fit MODEL north.head.safetensors south.head.safetensors -o fitted

    Use it after gramfuse merge, on the merged model: models that were trained from different heads, or on few labels
    each, have a merged head that fits the merged body badly. Or use it on a base model that was not fine-tuned, and
    name the labels: that takes seconds, and is a first thing to try.

    The head is computed in closed form from sums over the silos' examples: no training, and no data in one place. It
    is for one label an example (classification, image-classification). A file has 1 MB at 384
    features, 3 MB at 768.

    In a network, a plan does the same: model.head = "fitted" and merge.refit.
    """
