"""Small base models that are trained here, for the families of which no pretrained one is small enough.

Each is trained on sets that no silo has, and kept in the cache.
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
"""A quick benchmark's base models are trained on every so-many-th text."""

Base = Callable[[Source, Path, int], None]
"""Writes a base model, trained on every n-th text, into a directory."""


def there(name: str, data: Source, cache: Path, *, quick: bool) -> Path:
    """Return where a base model is in the cache, made now if it is not there."""
    place = cache / "bases" / (f"{name}-quick" if quick else name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place.with_suffix(".lock")):  # another seed may be making it
        if not place.exists():
            print(f"  train base model {place.name}", file=sys.stderr, flush=True)
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            BASES[name](data, partial, QUICK if quick else 1)
            partial.rename(place)
    return place


def t5(data: Source, directory: Path, every: int) -> None:
    """A T5 of three layers each side, 192 features wide, that was taught to name the intents of CLINC150."""
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
    """A GPT-2 of four layers, 192 features wide, taught on sentences of SST-2, MultiNLI, TREC and CLINC150."""
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
    """Return a label as words."""
    return label.replace("_", " ").replace("/", " ").lower()


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE, learned from texts; every text ends with END."""
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
