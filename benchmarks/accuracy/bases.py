"""Trains small base models for families without a small enough pretrained one.

Each is trained on sets that no silo has, and cached.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from gramfuse_client.data.batches import Encoded
from gramfuse_client.data.examples import Examples
from gramfuse_client.training.finetune import choose_device, finetune
from gramfuse_protocol.contract.plan_sections import Training
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.files import exclusive
from sets import Source

VOCABULARY = 4000
PAD, END = "<pad>", "</s>"

QUICK = 8
"""Quick benchmarks train base models on every n-th text."""

Base = Callable[[Source, Path, int], None]
"""Trains a base model on every n-th text and writes it into a directory."""


def cached_base(name: str, data: Source, cache: Path, *, quick: bool) -> Path:
    """Return the path of a base model in the cache; trains it if it is missing."""
    place = cache / "bases" / (f"{name}-quick" if quick else name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place.with_suffix(".lock")):  # another process may be training it
        if not place.exists():
            print(f"  training base model {place.name}", file=sys.stderr, flush=True)
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            BASES[name](data, partial, QUICK if quick else 1)
            partial.rename(place)
    return place


def t5(data: Source, directory: Path, every: int) -> None:
    """Train a T5 with 3 + 3 layers, 192 features wide, to name the intents of CLINC150."""
    rows = data.read("intent_clinc150", "train")[::every]
    texts = [row["text"] for row in rows]
    targets = [spoken(row["label"]) for row in rows]
    tokenizer = _tokenizer([*texts, *targets])
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=48,
            d_ff=512,
            num_layers=3,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    task = Task(task="sequence-to-sequence", max_length=32, target_length=12)
    _train(model, tokenizer, task, Examples(texts, None, targets), epochs=6, directory=directory)


def decoder(data: Source, directory: Path, every: int) -> None:
    """Train a GPT-2 with 4 layers, 192 features wide, on sentences of SST-2, MultiNLI, TREC and CLINC150."""
    sets = ("glue_sst2", "glue_mnli", "topic_trec6", "intent_clinc150")
    texts = [row["text"] for name in sets for row in data.read(name, "train")[::every]]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=192,
            n_layer=4,
            n_head=4,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    task = Task(task="causal-lm", max_length=64)
    long_enough = [text for text in texts if len(text.split()) > 2]
    _train(model, tokenizer, task, Examples(long_enough, None, long_enough), epochs=3, directory=directory)


BASES: dict[str, Base] = {"t5": t5, "decoder": decoder}


def spoken(label: str) -> str:
    """Return a label as lower-case words."""
    return label.replace("_", " ").replace("/", " ").lower()


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts; it appends END to every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def _train(
    model: PreTrainedModel, tokenizer: Any, task: Task, examples: Examples, *, epochs: int, directory: Path
) -> None:
    training = Training(epochs=epochs, learning_rate=1e-3, batch_size=32, precision="bfloat16", freeze=())
    finetune(model, Encoded(examples, tokenizer, task), training, choose_device("auto"))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
