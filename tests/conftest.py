"""Pico models and projects: everything is as in a deployment, only small."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from gramfuse_client.silo_file import write_identity
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.secure_sum.keys import Identity

TOPICS = {
    "animals": "cat dog horse sheep goat duck hen cow",
    "weather": "rain snow wind sun storm cloud frost hail",
    "kitchen": "pan pot knife spoon oven plate bowl cup",
}
FILLERS = ["the", "a", "of", "and", "with", "near", "my", "your", "old", "new", "big", "small"]
LABELS = list(TOPICS)
WORDS = sorted({word for words in TOPICS.values() for word in words.split()} | set(FILLERS))
PUBLIC_WORDS = sorted(set(re.findall(r"\w+", " ".join(PUBLIC_TEXT))) - set(WORDS))
"""What a tokenizer must know to be taken for one."""


# Fine-tuning collects garbage each time; what is imported is none, and looking through it took a third of the time.
gc.collect()
gc.freeze()

hypothesis.settings.register_profile("patient", deadline=None)  # how long a test takes is no result
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate(special + WORDS + PUBLIC_WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for WORDS."""
    return _tokenizer()


def save_model(model: Any, directory: Path) -> Path:
    """Save a model with a tokenizer for WORDS."""
    tokenizer = _tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def small_bert(directory: Path, seed: int, **more: Any) -> Path:
    """Save a BERT of two layers, 16 features wide, with a tokenizer for WORDS; return its directory.

    Args:
        more: further settings of its configuration.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    return save_model(BertModel(config), directory)


@pytest.fixture(scope="session")
def pico_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, 16 features wide, with a tokenizer for WORDS."""
    return small_bert(tmp_path_factory.mktemp("pico-bert"), 11)


@pytest.fixture(scope="session")
def loud_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT like `pico_bert` with large weights: the features of its head differ from text to text."""
    return small_bert(tmp_path_factory.mktemp("loud-bert"), 13, initializer_range=0.3)


@pytest.fixture(scope="session")
def pico_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers, 16 features wide: its linear layers are Conv1D."""
    torch.manual_seed(12)
    config = GPT2Config(
        vocab_size=4 + len(WORDS),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return save_model(GPT2Model(config), tmp_path_factory.mktemp("pico-gpt2"))


def messages(count: int, seed: int, favourite: str | None = None) -> list[dict[str, str]]:
    """Short labelled texts; a favourite label makes up most of them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = favourite if favourite and rng.random() < 0.7 else rng.choice(LABELS)
        words = [*rng.sample(TOPICS[label].split(), 2), *rng.choices(FILLERS, k=rng.randint(1, 5))]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class PicoProject:
    """A project directory that `gramfuse simulate` takes, with pico data and a pico model."""

    directory: Path
    names: tuple[str, ...]

    @property
    def plan(self) -> Path:
        return self.directory / "plan.toml"

    def silo(self, name: str) -> Path:
        return self.directory / "silos" / f"{name}.toml"

    def train(self, name: str) -> Path:
        return self.directory / "data" / name / "train.jsonl"

    def identity(self, name: str) -> Path:
        """Where the silo file says that the silo's private key is."""
        return self.directory / "state" / f"{name}.pem"

    def replace(self, path: Path, old: str, new: str) -> None:
        """Change one place of one file; the place must be there."""
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {path}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")


def make_identities(project: PicoProject) -> dict[str, str]:
    """Make every silo's private key, the same for the same name; return the public keys by silo."""
    keys = {}
    for name in project.names:
        identity = Identity(hashlib.sha256(name.encode()).digest())
        write_identity(project.identity(name), identity)
        keys[name] = identity.public.hex()
    return keys


@pytest.fixture
def pico_project(tmp_path: Path, pico_bert: Path) -> Callable[..., PicoProject]:
    """Return a function that makes a project: `pico_project(silos=4)`; with `secure`, its plan has the silos' keys."""

    def make(
        silos: int = 4, examples: int = 24, base: Path = pico_bert, name: str = "pico", *, secure: bool = False
    ) -> PicoProject:
        directory = tmp_path / name
        names = tuple(f"silo-{chr(97 + n)}" for n in range(silos))
        project = PicoProject(directory, names)
        keys = {n: f'public-key = "{key}"\n' for n, key in make_identities(project).items()} if secure else {}
        roster = "".join(f'\n[[silo]]\nname = "{n}"\n{keys.get(n, "")}' for n in names)
        privacy = 'metrics = "sum"' if secure else 'secure-aggregation = false\nmetrics = "silo"'
        limits = f'open-uploads = {"false" if secure else "true"}\nmetrics = "{"sum" if secure else "silo"}"'
        # A pico model's pooler is so quiet that a fast fine-tuning leaves the range of the fixed-point sums.
        rate = "2e-3" if secure else "1e-2"
        directory.mkdir(exist_ok=True)
        (directory / "plan.toml").write_text(
            f"""[plan]
name = "{name}"

[model]
base = "{base}"
task = "classification"
head = "same"
labels = {json.dumps(LABELS)}
max-length = 16

[training]
epochs = 2
learning-rate = {rate}
batch-size = 8
freeze = ["*embeddings*"]

[merge]
alpha = 0.9
gram = {{ "*" = "full" }}

[privacy]
{privacy}
{roster}"""
        )
        for n, silo in enumerate(names):
            write_jsonl(directory / "data" / silo / "train.jsonl", messages(examples, n, LABELS[n % len(LABELS)]))
            write_jsonl(directory / "data" / silo / "held-out.jsonl", messages(20, 100 + n))
            path = directory / "silos" / f"{silo}.toml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                f"""name = "{silo}"
identity = "../state/{silo}.pem"
state = "../state/{silo}"
device = "cpu"
threads = 1
approved = []

[data]
train = "../data/{silo}/train.jsonl"
held-out = "../data/{silo}/held-out.jsonl"

[limits]
minimum-examples = 10
{limits}
"""
            )
        return project

    return make


@pytest.fixture
def seeded() -> torch.Generator:
    """A torch generator with a fixed seed."""
    return torch.Generator().manual_seed(7)
