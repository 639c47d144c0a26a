"""Partitions the examples of a set among silos."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from sets import Rows


def by_label(rows: Rows, silos: int, skew: float, rng: random.Random) -> list[Rows]:
    """Assign each label a home silo with a share `skew` of its rows; the rest is spread evenly over the other silos.

    Homes are assigned round-robin over a random order of labels, so that silos have equally many labels, up to one.
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
    """Split in two like the RegMean authors: the first silo gets `skew` of one random main label and 1 - skew of every
    other label; the second gets the rest. Numeric labels form two classes, split at the middle of their range.
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
    """Draw rows until each label has `most` or none are left; a row is drawn if any of its labels needs more."""
    counts: Counter[str] = Counter()
    kept = []
    for row in rng.sample(rows, len(rows)):
        if min(counts[label] for label in row["labels"]) < most:
            counts.update(row["labels"])
            kept.append(row)
    return kept
