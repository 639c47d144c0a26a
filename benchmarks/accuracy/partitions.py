"""How the examples of one set come to lie at several silos."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from sets import Rows


def by_label(rows: Rows, silos: int, skew: float, rng: random.Random) -> list[Rows]:
    """Give each label a home: `skew` of its rows lie there, the rest at the other silos, drawn evenly.

    Homes are dealt out in a random order of labels, so that each silo is home to as many labels, but for one.
    """
    labels = sorted({row["label"] for row in rows})
    rng.shuffle(labels)
    home = {label: index % silos for index, label in enumerate(labels)}
    shares: list[Rows] = [[] for _ in range(silos)]
    for row in rows:
        at = home[row["label"]]
        elsewhere = [silo for silo in range(silos) if silo != at]
        shares[at if rng.random() < skew else rng.choice(elsewhere)].append(row)
    return shares


def halves(rows: Rows, skew: float, rng: random.Random) -> list[Rows]:
    """Split in two as the RegMean authors do: one main label drawn, `skew` of it at the first silo, and 1 - skew of
    every other label; the rest at the second. Numbers are cut into two classes at the middle of their range.
    """
    values = [row["label"] for row in rows]
    if isinstance(values[0], int | float):
        middle = (min(values) + max(values)) / 2
        classes: Sequence[object] = [value > middle for value in values]
    else:
        classes = values
    main = rng.choice(sorted(set(classes), key=str))
    shares: list[Rows] = [[], []]
    for each in sorted(set(classes), key=str):
        own = [row for row, kind in zip(rows, classes, strict=True) if kind == each]
        rng.shuffle(own)
        cut = round(len(own) * (skew if each == main else 1 - skew))
        shares[0] += own[:cut]
        shares[1] += own[cut:]
    for share in shares:
        rng.shuffle(share)
    return shares


def balanced(rows: Rows, most: int, rng: random.Random) -> Rows:
    """Draw rows until there are `most` of each label, or no more; a row with several is drawn if one is lacking."""
    counts: Counter[str] = Counter()
    kept = []
    for row in rng.sample(rows, len(rows)):
        if min(counts[label] for label in row["labels"]) < most:
            counts.update(row["labels"])
            kept.append(row)
    return kept
