"""The experiments by name. Each takes the folder of the sets and a seed, which draws rows and splits."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from partitions import by_label, halves
from projects import Setting, SiloData
from results import gramfuse
from sets import Row, Rows, labels_of, read

Maker = Callable[[Path, int], Setting]

EMOTIONS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


def hwu64(data: Path, seed: int, rounds: int = 1) -> Setting:
    """Intents under strong label skew."""
    rng = random.Random(seed)
    folder = data / "intent_hwu64"
    train = rng.sample(read(folder, "train"), 3000)
    test, validation = read(folder, "test"), read(folder, "validation")
    rng.shuffle(test)
    shares = by_label(train, 4, 0.85, rng)
    return Setting(
        title="HWU64 intents, 4 silos × 750 requests, 85% of each intent at one silo, MiniLM-L6",
        silos={f"silo-{n + 1}": SiloData(shares[n], test[n::4], validation[n::4]) for n in range(4)},
        model={"task": "classification", "labels": labels_of(train), "max-length": 32},
        training={"epochs": 5, "seed": seed},
        merge={"rounds": rounds},
        compare="best,ensemble,joint" if rounds == 1 else "joint",
    )


def rounds(data: Path, seed: int) -> Setting:
    """The same intents, merged twice."""
    return hwu64(data, seed, rounds=2)


def sent(data: Path, seed: int) -> Setting:
    """Sentiment over four domains."""
    rng = random.Random(seed)
    silos = {
        domain: SiloData(
            rng.sample(read(data / f"sent_{domain}", "train"), 400),
            rng.sample(read(data / f"sent_{domain}", "test"), 200),
            read(data / f"sent_{domain}", "validation"),
        )
        for domain in ("books", "dvd", "electronics", "kitchen")
    }
    return Setting(
        title="Amazon sentiment, 4 silos (books, dvd, electronics, kitchen) × 400 reviews, MiniLM-L6",
        silos=silos,
        model={"task": "classification", "labels": ["negative", "positive"], "max-length": 64},
        training={"epochs": 3, "seed": seed},
    )


def desk(_: Path, seed: int) -> Setting:
    """The demo's data, with the demo's training."""
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        project = Path(scratch) / "desk"
        subprocess.run([gramfuse(), "init", str(project)], check=True, capture_output=True)
        folders = sorted((project / "data").iterdir())
        silos = {f.name: SiloData(read(f, "train"), read(f, "held-out")) for f in folders}
    return Setting(
        title="The demo: 4 front desks × about 315 messages, MiniLM-L6",
        silos=silos,
        model={
            "task": "classification",
            "labels": labels_of([row for silo in silos.values() for row in silo.train]),
            "max-length": 64,
        },
        training={"seed": seed},
    )


def glue(name: str, data: Path, seed: int) -> Setting:
    """One GLUE task at two silos of about 1,000 examples, split as the RegMean authors do."""
    rng = random.Random(seed)
    folder = data / f"glue_{name}"
    train = rng.sample(read(folder, "train"), 2000)
    test, validation = read(folder, "test"), read(folder, "validation")
    shares = halves(train, 0.8, rng)
    pair = "text_pair" in train[0]
    regression = isinstance(train[0]["label"], int | float)
    return Setting(
        title=f"GLUE {name}, 2 silos × about 1,000 examples, label skew 80/20, MiniLM-L6",
        silos={f"silo-{n + 1}": SiloData(shares[n], test[n::2], validation[n::2]) for n in range(2)},
        model={
            "task": "regression" if regression else "classification",
            **({} if regression else {"labels": labels_of(train)}),
            "pair": pair,
            "max-length": 96 if pair else 48,
        },
        training={"epochs": 5, "seed": seed},
        columns={"text-pair": "text_pair"} if pair else {},
    )


def emotion(data: Path, seed: int, domains: tuple[str, ...] = ("isear", "goemotions")) -> Setting:
    """Emotions over domains that do not annotate the same ones; those that a silo does not annotate are masked."""
    rng = random.Random(seed)
    silos = {}
    for domain in domains:
        folder = data / f"emo_{domain}"
        train, test, validation = (read(folder, split) for split in ("train", "test", "validation"))
        own = labels_of(train, "labels")
        entry = {} if own == EMOTIONS else {"labels": own}
        silos[domain] = SiloData(_some(train, 1000, rng), _some(test, 1000, rng), _some(validation, 500, rng), entry)
    return Setting(
        title=f"Emotions, {len(domains)} silos ({', '.join(domains)}) × 1,000 texts, masked heads, MiniLM-L6",
        silos=silos,
        model={"task": "multi-label", "labels": EMOTIONS, "max-length": 64, "threshold": 0.3},
        training={"epochs": 8, "seed": seed},
        columns={"label": "labels"},
        compare="best,ensemble,joint",
    )


def ner(data: Path, seed: int, domains: tuple[str, ...] = ("wikigold", "sec", "btc")) -> Setting:
    """Names of persons, places and organisations over domains."""
    rng = random.Random(seed)
    silos = {}
    for domain in domains:
        folder = data / f"ner_{domain}"
        train, test, validation = (_some(read(folder, s), 600, rng) for s in ("train", "test", "validation"))
        silos[domain.replace("_", "-")] = SiloData(train, test, validation)
    return Setting(
        title=f"NER, {len(domains)} silos ({', '.join(domains)}) × 600 sentences at most, MiniLM-L6",
        silos=silos,
        model={"task": "token-classification", "labels": TAGS, "max-length": 96},
        training={"epochs": 6, "seed": seed},
        columns={"text": "tokens", "label": "tags"},
    )


def tasks(data: Path, seed: int) -> Setting:
    """Three different tasks: one body is merged, each silo keeps its head."""
    rng = random.Random(seed)
    kinds = {"trec6": "topic_trec6", "sst2": "glue_sst2", "mrpc": "glue_mrpc"}
    silos, sections = {}, []
    for name, folder in kinds.items():
        train = _some(read(data / folder, "train"), 1000, rng)
        test, validation = _some(read(data / folder, "test"), 1000, rng), read(data / folder, "validation")
        pair = "text_pair" in train[0]
        silos[name] = SiloData([_plain(r) for r in train], [_plain(r) for r in test], [_plain(r) for r in validation],
                               {"task": name})  # fmt: skip
        sections.append(
            {"name": name, "task": "classification", "labels": labels_of(train), "pair": pair, "max-length": 64}
        )
    return Setting(
        title="Three tasks (TREC questions, SST-2, MRPC) × 1,000 examples, heads of their own, MiniLM-L6",
        silos=silos,
        model={"head": "own"},
        training={"epochs": 5, "seed": seed},
        columns={"text-pair": "text_pair"},
        tasks=sections,
        compare="fisher,ties",
    )


def _some(rows: Rows, most: int, rng: random.Random) -> Rows:
    return rng.sample(rows, min(most, len(rows)))


def _plain(row: Row) -> Row:
    return {key: row[key] for key in ("text", "text_pair", "label") if key in row}


SETTINGS: Mapping[str, Maker] = {
    "hwu64": hwu64,
    "sent": sent,
    "desk": desk,
    "mrpc": lambda data, seed: glue("mrpc", data, seed),
    "stsb": lambda data, seed: glue("stsb", data, seed),
    "emotion": emotion,
    "ner": ner,
    "tasks": tasks,
    "rounds": rounds,
}
