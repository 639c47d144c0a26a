"""Tokenizers and lengths of texts that do not fit the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError, PlanError
from gramfuse_protocol.statistics.file import read_statistics
from tests.client.checkpoints.models import ROWS, Change, Models, edit, refused, tokenizer
from tests.commands import gramfuse


def test_no_text_becomes_unknown_because_the_tokenizer_is_missing_or_empty(models: Models) -> None:
    def none(copy: Path) -> None:
        for path in copy.glob("tokenizer*"):
            path.unlink()

    def empty(copy: Path) -> None:
        none(copy)
        transformers.AutoTokenizer.from_pretrained(copy).save_pretrained(copy)

    for change, named in ((none, "tokenizer.json"), (empty, "100% unknown")):
        refused(named, lambda change=change: models.lock(models.copy(models.base, change)))  # type: ignore[misc]
        refused(named, lambda change=change: models.measure(base=models.copy(models.base, change)))  # type: ignore[misc]


def test_every_token_has_a_row_in_the_table_or_the_first_without_is_named(models: Models) -> None:
    def added(special: bool) -> Change:
        def change(copy: Path) -> None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
            tokenizer.add_tokens(["<mine>"], special_tokens=special)
            tokenizer.save_pretrained(copy)

        return change

    refused("'<mine>' resize_token_embeddings", lambda: models.lock(models.copy(models.base, added(False))))
    assert models.lock(models.copy(models.base, added(True)))  # as Gemma has one for images, which no text has


def llama(directory: Path, pico_tokenizer: Any, **tokens: int | None) -> Path:
    """A decoder whose configuration says what it is told of special tokens."""
    torch.manual_seed(4)
    settings = transformers.LlamaConfig(
        vocab_size=len(pico_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        **{"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None, **tokens},
    )
    transformers.LlamaModel(settings).save_pretrained(directory)
    pico_tokenizer.save_pretrained(directory)
    return directory


def test_a_configuration_that_names_no_padding_gets_that_of_the_tokenizer(
    tmp_path: Path, pico_tokenizer: Any, models: Models
) -> None:
    decoder = Models(llama(tmp_path / "decoder", pico_tokenizer), tmp_path / "of decoder")
    assert decoder.measure()["examples"] == len(ROWS)
    assert decoder.lock(decoder.base)


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(models: Models) -> None:
    def neither(copy: Path) -> None:
        backend = transformers.AutoTokenizer.from_pretrained(copy).backend_tokenizer
        for path in copy.glob("tokenizer*"):
            path.unlink()
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(copy)

    refused("pad_token eos_token", lambda: models.lock(models.copy(models.base, neither)))


def test_texts_are_no_longer_than_the_model_has_places_for(models: Models, tmp_path: Path) -> None:
    long = {"text": " ".join(["the cat"] * 40), "label": "animals"}
    models.data.write_text(json.dumps(long) + "\n" + json.dumps(ROWS[2]) + "\n", encoding="utf-8")
    file = read_statistics(models.measure()["file"])
    assert file.about.task.max_length == 32
    assert set(file.tokens.values()) == {2, 32 + 5}  # the head has one row for an example; the long text was cut
    refused("max-length 64 32", lambda: models.measure(None, None, "--max-length", 64), PlanError)
    refused("max-length 64 32", lambda: models.lock(models.base, **{"max-length": "64"}), PlanError)


def role(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", cls_token="[SEP]", sep_token="[CLS]")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (tokenizer(normalizer={"type": "Lowercase"}), "backend.normalizer"),
        (tokenizer(pre_tokenizer={"type": "WhitespaceSplit"}), "backend.pre_tokenizer"),
        (tokenizer(post_processor=None), "backend.post_processor"),
        (role, "special.cls_token"),
        (lambda copy: edit(copy / "tokenizer_config.json", truncation_side="left"), "settings.truncation_side"),
    ],
    ids=["normalizer", "pre-tokenizer", "post-processor", "special", "truncation"],
)
def test_the_same_vocabulary_by_other_rules_is_another_tokenizer_on_every_way(
    models: Models, change: Change, part: str, tmp_path: Path
) -> None:
    other, tuned = models.copy(models.base, change), models.copy(models.model, change)
    refused(f"tokenizers {part}", lambda: models.measure(base=other))
    refused(f"tokenizers {part} base", lambda: models.measure(tuned))
    mine, theirs = models.measure()["file"], models.measure(tuned, other, "--name", "theirs")["file"]
    out = ("-o", tmp_path / "merged", "--base")
    refused("bases tokenizers --base", lambda: gramfuse("merge", mine, theirs, *out, models.base), ContributionError)
    refused("not the base tokenizers", lambda: gramfuse("merge", mine, *out, other))
    project = models.project(models.base)
    gramfuse("plan", "lock", project)
    plan = (project / "plan.toml").read_text(encoding="utf-8")
    (project / "plan.toml").write_text(plan.replace(str(models.base), str(other)), encoding="utf-8")
    refused("tokenizer model.processor", lambda: gramfuse("plan", "show", project))
    refused("tokenizer model.processor", lambda: load_base(Plan.read(project / "plan.toml"), project))
