"""The experiments and their tables. A seed determines rows, splits, heads and batches."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from bases import spoken
from command import gramfuse
from partitions import balanced, by_label, halves
from projects import Setting, SiloData
from sets import Row, Rows, Source, labels_of

Silos = tuple[str, ...]

EMOTIONS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
GLUE = ("cola", "sst2", "mrpc", "stsb", "mnli", "rte")
OWN_HEADS = ("sst2", "mrpc", "stsb", "mnli", "cola")
DOMAINS = {
    "emotion": ("isear", "goemotions", "dailydialog", "crowdflower"),
    "ner": ("wikigold", "sec", "btc", "crossner_politics"),
    "sent": ("books", "dvd", "electronics", "kitchen"),
}
PARTS = ("heads", "joint", "transport", "alphas", "structures", "tokens", "rounds", "fedavg")
"""Optional parts of experiments; curves and FedAvg run for the first seed only."""

MOST_TEST = 400
"""Most held-out rows of a domain or task; half as many for validation."""


@dataclass(frozen=True)
class Experiment:
    """A setting and its measurements.

    Args:
        make: returns the setting for a seed.
        subsets: sets of silos to merge; by default all silos.
        parts: additional measurements, as in `experiment.run`.
        fedavg: most rounds of FedAvg, for the first seed.
        base: one of `bases.BASES`, instead of the setting's.
    """

    make: Callable[[Source, int], Setting]
    subsets: tuple[Silos, ...] = ()
    parts: tuple[str, ...] = ("joint",)
    fedavg: int = 0
    base: str = ""


def intents(name: str, silos: int, skew: float, data: Source, seed: int) -> Setting:
    """Intents under label skew: `skew` of each intent's requests at one silo, the rest evenly over the others."""
    rng = random.Random(seed)
    folder = f"intent_{name}"
    train = _some(data.read(folder, "train"), 3000, rng)
    test, validation = (_some(data.read(folder, part), 1076, rng) for part in ("test", "validation"))
    shares = by_label(train, silos, skew, rng)
    return Setting(
        title=f"{name} intents, {silos} silos × {3000 // silos} requests, {skew:.0%} of each intent at one silo",
        silos={f"silo-{n + 1}": SiloData(shares[n], test[n::silos], validation[n::silos]) for n in range(silos)},
        model={"task": "classification", "labels": labels_of(train), "max-length": 32},
        training={"epochs": 5},
    )


def adapters(rank: int | None, data: Source, seed: int) -> Setting:
    """The intents of HWU64 under label skew, with adapters of a rank, or with the whole model."""
    setting = intents("hwu64", 4, 0.85, data, seed)
    if rank is None:
        return replace(setting, title=f"{setting.title}, whole models", training={"epochs": 5, "learning-rate": 5e-5})
    lora = {"rank": rank, "alpha": 2 * rank}
    training = {"epochs": 5, "learning-rate": 2e-3, "lora": lora}
    return replace(setting, title=f"{setting.title}, adapters of rank {rank}", training=training)


def glue(name: str, data: Source, seed: int) -> Setting:
    """One GLUE task at two silos of about 1,000 examples, split like the RegMean authors."""
    rng = random.Random(seed)
    folder = f"glue_{name}"
    train = _scaled(_some(data.read(folder, "train"), 2000, rng))
    test, validation = (_scaled(_some(data.read(folder, p), n, rng)) for p, n in (("test", 500), ("validation", 250)))
    shares = halves(train, 0.8, rng)
    pair = "text_pair" in train[0]
    regression = isinstance(train[0]["label"], int | float)
    return Setting(
        title=f"GLUE {name}, 2 silos × about 1,000 examples, label skew 80/20",
        silos={f"silo-{n + 1}": SiloData(shares[n], test[n::2], validation[n::2]) for n in range(2)},
        model={
            "task": "regression" if regression else "classification",
            **({} if regression else {"labels": labels_of(train)}),
            "pair": pair,
            "max-length": 96 if pair else 48,
        },
        training={"epochs": 5, "learning-rate": 5e-5 if pair else 2e-4},
        columns={"text-pair": "text_pair"} if pair else {},
        metric="mcc" if name == "cola" else "",
    )


def emotion(head: str, data: Source, seed: int) -> Setting:
    """Emotions over domains that annotate different ones; a silo's unannotated emotions are masked.

    Up to four in five texts are neutral and some emotions are rare, so the number of texts of each is capped.
    """
    rng = random.Random(seed)
    silos = {}
    for domain in DOMAINS["emotion"]:
        train, test, validation = (
            balanced(data.read(f"emo_{domain}", part), most, rng)
            for part, most in (("train", 220), ("test", 60), ("validation", 30))
        )
        own = labels_of(train, "labels")
        silos[domain] = SiloData(train, test, validation, {} if own == EMOTIONS else {"labels": own})
    return Setting(
        title=f"Emotions, four domains × 220 texts of each emotion at most, masked labels, {head} heads at the start",
        silos=silos,
        model={"task": "multi-label", "labels": EMOTIONS, "max-length": 48, "threshold": 0.3, "head": head},
        training={"epochs": 8},
        columns={"label": "labels"},
    )


def ner(head: str, data: Source, seed: int) -> Setting:
    """Named entities (persons, places, organisations) over four domains."""
    rng = random.Random(seed)
    silos = {}
    for domain in DOMAINS["ner"]:
        train, test, validation = _parts(data, f"ner_{domain}", 600, rng)
        silos[domain.replace("_", "-")] = SiloData(train, test, validation)
    return Setting(
        title=f"NER, four domains × 600 sentences at most, {head} heads at the start",
        silos=silos,
        model={"task": "token-classification", "labels": TAGS, "max-length": 96, "head": head},
        training={"epochs": 6},
        columns={"text": "tokens", "label": "tags"},
    )


def sent(data: Source, seed: int) -> Setting:
    """Sentiment over four domains."""
    rng = random.Random(seed)
    silos = {}
    for domain in DOMAINS["sent"]:
        train, test, validation = _parts(data, f"sent_{domain}", 400, rng)
        silos[domain] = SiloData(train, test, validation)
    return Setting(
        title="Amazon sentiment, four domains × 400 reviews, cut at 64 tokens",
        silos=silos,
        model={"task": "classification", "labels": ["negative", "positive"], "max-length": 64},
        training={"epochs": 3},
    )


def tasks(data: Source, seed: int) -> Setting:
    """Different tasks: one merged body, and each silo keeps its head."""
    rng = random.Random(seed)
    silos, sections = {}, []
    for name in OWN_HEADS:
        train, test, validation = _parts(data, f"glue_{name}", 1000, rng)
        pair = "text_pair" in train[0]
        parts = (_scaled([_plain(row) for row in part]) for part in (train, test, validation))
        silos[name] = SiloData(*parts, {"task": name})
        regression = isinstance(train[0]["label"], int | float)
        kind = {"task": "regression"} if regression else {"task": "classification", "labels": labels_of(train)}
        sections.append({"name": name, **kind, "pair": pair, "max-length": 96})
    return Setting(
        title="Five GLUE tasks × 1,000 examples, heads of their own",
        silos=silos,
        model={"head": "own"},
        training={"epochs": 5, "learning-rate": 1e-4},
        columns={"text-pair": "text_pair"},
        tasks=sections,
    )


def desk(_: Source, seed: int) -> Setting:
    """The demo's data, with the demo's training."""
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        project = Path(scratch) / "desk"
        subprocess.run([gramfuse(), "init", str(project)], check=True, capture_output=True)
        data = Source(str(project / "data"))
        silos = {}
        for folder in sorted((project / "data").iterdir()):
            held_out = data.read(folder.name, "held-out")
            silos[folder.name] = SiloData(data.read(folder.name, "train"), held_out[::2], held_out[1::2])
    return Setting(
        title="The demo: four front desks × about 315 messages",
        silos=silos,
        model={
            "task": "classification",
            "labels": labels_of([row for silo in silos.values() for row in silo.train]),
            "max-length": 64,
        },
    )


def t5(data: Source, seed: int) -> Setting:
    """Intents as text generated by a T5, under label skew."""
    rng = random.Random(seed)
    train = _some(data.read("intent_hwu64", "train"), 3000, rng)
    test, validation = (_some(data.read("intent_hwu64", part), 1076, rng) for part in ("test", "validation"))
    shares = by_label(train, 4, 0.85, rng)

    def spelled(rows: Rows) -> Rows:
        return [{"text": row["text"], "label": spoken(row["label"])} for row in rows]

    return Setting(
        title="hwu64 intents as text, 4 silos × 750 requests, 85% of each intent at one silo, a T5 of 192 features",
        silos={
            f"silo-{n + 1}": SiloData(spelled(shares[n]), spelled(test[n::4]), spelled(validation[n::4]))
            for n in range(4)
        },
        model={"task": "sequence-to-sequence", "max-length": 32, "target-length": 12},
        training={"epochs": 8, "learning-rate": 5e-4},
        metric="exact-match",
    )


def decoder(data: Source, seed: int) -> Setting:
    """Language modelling of reviews from four domains with a small decoder."""
    rng = random.Random(seed)
    silos = {}
    for domain in DOMAINS["sent"]:
        parts = _parts(data, f"sent_{domain}", 1400, rng)
        silos[domain] = SiloData(*([{"text": row["text"]} for row in part] for part in parts))
    return Setting(
        title="Amazon reviews as text, four domains × 1,360 reviews, cut at 64 tokens, a GPT-2 of 192 features",
        silos=silos,
        model={"task": "causal-lm", "max-length": 64},
        training={"epochs": 4, "learning-rate": 5e-4},
    )


def _parts(data: Source, folder: str, most: int, rng: random.Random) -> tuple[Rows, Rows, Rows]:
    sizes = {"train": most, "test": MOST_TEST, "validation": MOST_TEST // 2}
    train, test, validation = (_some(data.read(folder, part), size, rng) for part, size in sizes.items())
    return train, test, validation


def _some(rows: Rows, most: int, rng: random.Random) -> Rows:
    return rng.sample(rows, min(most, len(rows)))


def _scaled(rows: Rows) -> Rows:
    """Scale numeric labels from 0–5 to −1–1, since a head starts near 0 and moves slowly at a small learning rate."""
    if not isinstance(rows[0]["label"], int | float):
        return rows
    return [{**row, "label": row["label"] / 2.5 - 1} for row in rows]


def _plain(row: Row) -> Row:
    return {key: row[key] for key in ("text", "text_pair", "label") if key in row}


def _pairs(names: Sequence[str]) -> tuple[Silos, ...]:
    return tuple(combinations([name.replace("_", "-") for name in names], 2))


def _with_all(names: Sequence[str]) -> tuple[Silos, ...]:
    return (tuple(name.replace("_", "-") for name in names), *_pairs(names))


def _intents(name: str, silos: int, skew: float, **more: Any) -> Experiment:
    return Experiment(lambda data, seed: intents(name, silos, skew, data, seed), **more)


def _domains(make: Callable[[str, Source, int], Setting], name: str, head: str, **more: Any) -> Experiment:
    return Experiment(lambda data, seed: make(head, data, seed), _with_all(DOMAINS[name]), **more)


EIGHT = tuple(f"silo-{n + 1}" for n in range(8))
CURVES = ("joint", "alphas", "structures", "tokens", "rounds")

EXPERIMENTS: dict[str, Experiment] = {
    **{
        f"glue-{name}": Experiment(
            lambda data, seed, name=name: glue(name, data, seed), parts=("joint", "transport"), fedavg=3
        )
        for name in GLUE
    },
    "emotion": _domains(emotion, "emotion", "same", parts=("joint", "transport"), fedavg=3),
    "emotion-heads": _domains(emotion, "emotion", "different", parts=("transport",)),
    "ner": _domains(ner, "ner", "same", parts=("joint", "transport"), fedavg=5),
    "ner-heads": _domains(ner, "ner", "different", parts=("transport",)),
    "sent": Experiment(sent, _with_all(DOMAINS["sent"]), ("joint", "transport"), fedavg=5),
    "hwu64": _intents("hwu64", 4, 0.85, parts=CURVES, fedavg=10),
    "hwu64-8": _intents("hwu64", 8, 0.85, subsets=tuple(EIGHT[:n] for n in (1, 2, 4, 6, 8)), fedavg=10),
    "clinc150": _intents("clinc150", 4, 0.85, fedavg=10),
    "clinc150-8": _intents("clinc150", 8, 0.85),
    **{f"skew-{skew}": _intents("hwu64", 4, skew / 100, parts=(), fedavg=5) for skew in (25, 50, 70, 95, 100)},
    "tasks": Experiment(tasks, _pairs(OWN_HEADS), parts=("transport",)),
    "t5": Experiment(t5, fedavg=5, base="t5"),
    "decoder": Experiment(decoder, fedavg=5, base="decoder"),
    "desk": Experiment(desk, parts=("joint",), fedavg=5),
}
RANKS = (8, 32, 64)

EXPERIMENTS |= {
    f"adapters-{'whole' if rank is None else f'r{rank}'}": Experiment(
        lambda data, seed, rank=rank: adapters(rank, data, seed), parts=("heads", "joint")
    )
    for rank in (None, *RANKS)
}
"""Adapters of several ranks; name a base with --base."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "heads": ("hwu64", "hwu64-8", "clinc150", "clinc150-8", "desk"),
    "heads-skew": tuple(name for name in EXPERIMENTS if name.startswith("skew-")),
    "heads-glue": tuple(f"glue-{name}" for name in GLUE),
    "heads-domains": ("emotion", "ner", "sent"),
}
"""The experiments that are repeated with heads in closed form, by table."""

EXPERIMENTS |= {
    f"heads-{name}": replace(EXPERIMENTS[name], subsets=(), parts=("heads", "joint"), fedavg=0)
    for names in HEADS.values()
    for name in names
}
"""All experiments by name."""

TABLES: Mapping[str, tuple[str, ...]] = {
    "glue": tuple(f"glue-{name}" for name in GLUE),
    "emotion": ("emotion", "emotion-heads"),
    "ner": ("ner", "ner-heads"),
    "sent": ("sent",),
    "intents": ("hwu64", "hwu64-8", "clinc150", "clinc150-8"),
    "skew": tuple(name for name in EXPERIMENTS if name.startswith("skew-")),
    "tasks": ("tasks",),
    "generation": ("t5", "decoder"),
    "desk": ("desk",),
    "adapters": ("adapters-whole", *(f"adapters-r{rank}" for rank in RANKS)),
    **{table: tuple(f"heads-{name}" for name in names) for table, names in HEADS.items()},
}
"""The experiments in each table."""
