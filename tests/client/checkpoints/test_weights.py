"""Weights as others leave them: sound ones are measured and locked, others are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.client.checkpoints.models import ROWS, WEIGHTS, Change, Models, config, keys, refused, without


def test_a_sound_model_is_measured_and_a_sound_base_is_locked(models: Models) -> None:
    assert models.measure()["examples"] == len(ROWS)
    assert models.lock(models.base)["base_sha256"]


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [
        ("_orig_mod.", "_orig_mod. torch.compile"),
        ("module.", "module. DataParallel"),
        ("model.", "model. names"),
        ("base_model.model.", "base_model.model. merge_and_unload()"),
    ],
)
def test_weights_under_the_names_of_a_wrapper_are_not_taken_for_new_ones(
    models: Models, wrapper: str, named: str
) -> None:
    wrapped = keys(lambda name: wrapper + name)
    for files in (models.model, models.base):
        copy = models.copy(files, wrapped)
        refused(f"{named} {copy} bert.embeddings.LayerNorm.bias", lambda copy=copy: models.lock(copy))  # type: ignore[misc]
    copy = models.copy(models.model, wrapped)
    refused(f"{named} {copy}", lambda: models.measure(copy))


def test_weights_under_the_names_of_a_wrapped_layer_are_not_taken_for_new_ones(models: Models) -> None:
    compiled = models.copy(models.model, keys(lambda name: name.replace("layer.0.", "layer.0._orig_mod.")))
    refused("_orig_mod. torch.compile", lambda: models.measure(compiled))
    adapted = models.copy(models.model, keys(lambda name: name.replace("query.weight", "query.base_layer.weight")))
    refused("base_layer. merge_and_unload()", lambda: models.measure(adapted))


def test_what_the_files_of_a_fine_tuned_model_lack_is_not_made_up(models: Models) -> None:
    for part, name in (("layer.1.", "bert.encoder.layer.1."), ("classifier", "classifier.bias"), ("pooler", "pooler")):
        lacking = models.copy(models.model, without(part))
        refused(f"{lacking} {name} MODEL", lambda lacking=lacking: models.measure(lacking))  # type: ignore[misc]
    models.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    two = config(id2label={"0": "animals", "1": "weather"}, label2id={"animals": 0, "weather": 1})
    refused("classifier.bias (3,) (2,)", lambda: models.measure(models.copy(models.model, two)))


def test_what_a_fine_tuned_model_has_beyond_its_architecture_is_not_left_out(models: Models) -> None:
    fewer = models.copy(models.model, config(num_hidden_layers=1))
    refused("bert.encoder.layer.1. number of layers", lambda: models.measure(fewer))

    def adapter(copy: Path) -> None:
        added = {f"bert.encoder.layer.0.attention.self.query.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
        save_file({**load_file(copy / WEIGHTS), **added}, copy / WEIGHTS, metadata={"format": "pt"})

    adapted = models.copy(models.model, adapter)
    refused("query.lora_A.weight merge_and_unload()", lambda: models.measure(adapted))
    refused("query.lora_A.weight merge_and_unload()", lambda: models.lock(adapted))


def test_only_the_head_and_the_pooler_of_a_base_may_be_new(models: Models) -> None:
    refused("bert.encoder.layer.1. base", lambda: models.lock(models.copy(models.base, without("layer.1."))))
    refused("encoder.layer.1.", lambda: models.lock(models.copy(models.base, config(num_hidden_layers=1))))
    refused("word_embeddings.weight", lambda: models.lock(models.copy(models.base, config(vocab_size=400))))
    assert models.lock(models.copy(models.base, without("pooler")))

    def pretrained(copy: Path) -> None:
        """As a model that fills in words is saved: with another head, and without a pooler."""
        body = transformers.AutoModel.from_pretrained(models.base)
        whole = transformers.BertForMaskedLM(body.config)
        whole.bert.load_state_dict({n: t for n, t in body.state_dict().items() if "pooler" not in n})
        whole.save_pretrained(copy)

    assert models.lock(models.copy(models.base, pretrained))


def test_a_classifier_is_a_base_for_other_labels_unless_its_files_contradict_each_other(models: Models) -> None:
    locked = models.lock(models.model, labels='["yes", "no"]')
    again = models.lock(models.model, labels='["yes", "no"]')
    assert locked["base_sha256"] == again["base_sha256"]  # the new head is drawn by the plan's seed
    two = models.copy(models.model, config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}))
    refused("classifier.bias (3,) (2,)", lambda: models.lock(two, labels='["yes", "no"]'))
    refused("classifier.bias (3,) (4,)", lambda: models.lock(two, labels='["a", "b", "c", "d"]'))


def test_an_output_layer_that_predicts_tokens_is_no_head_that_may_be_new(
    models: Models, pico_tokenizer: Any, tmp_path: Path
) -> None:
    body = transformers.LlamaConfig(
        vocab_size=len(pico_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    transformers.LlamaModel(body).save_pretrained(tmp_path / "body")
    pico_tokenizer.save_pretrained(tmp_path / "body")
    refused("lm_head.weight", lambda: models.lock(tmp_path / "body", task='"causal-lm"', labels="[]"))


def shortened(keep: Callable[[int], int]) -> Change:
    def change(copy: Path) -> None:
        weights = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(weights[: keep(len(weights))])

    return change


@pytest.mark.parametrize("keep", [lambda size: size - 1, lambda size: size // 2, lambda size: 100, lambda size: 0])
def test_weights_that_were_cut_off_are_to_be_had_again(models: Models, keep: Callable[[int], int]) -> None:
    model, base = models.copy(models.model, shortened(keep)), models.copy(models.base, shortened(keep))
    refused(f"model {model} cut off again", lambda: models.measure(model))
    refused(f"base {base} cut off again", lambda: models.lock(base))
    refused(f"base {base} cut off again", lambda: models.measure(base=base))


def adapter(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")


def alone(copy: Path) -> None:
    adapter(copy)
    for name in ("config.json", WEIGHTS):
        (copy / name).unlink()


def test_an_adapter_alone_or_beside_a_model_is_to_be_merged_into_it_first(models: Models) -> None:
    for change, named in ((adapter, "beside"), (alone, "without")):
        model, base = models.copy(models.model, change), models.copy(models.base, change)
        if named == "beside":
            refused("adapter_config.json beside merge_and_unload()", lambda model=model: models.measure(model))  # type: ignore[misc]
        refused(f"adapter_config.json {named} merge_and_unload()", lambda base=base: models.measure(base=base))  # type: ignore[misc]
        refused(f"adapter_config.json {named} merge_and_unload()", lambda base=base: models.lock(base))  # type: ignore[misc]


def test_a_model_that_is_its_own_base_has_nothing_to_merge(models: Models) -> None:
    for base in (models.model, models.copy(models.model)):
        refused(f"same weights {base} --base", lambda base=base: models.measure(base=base))  # type: ignore[misc]


def test_a_directory_of_checkpoints_is_pointed_into(models: Models, tmp_path: Path) -> None:
    for step in (500, 1500):
        shutil.copytree(models.model, tmp_path / "trained" / f"checkpoint-{step}")
    refused("checkpoint-1500", lambda: models.measure(tmp_path / "trained"))
    shutil.copy(models.model / "config.json", tmp_path / "trained")
    refused("checkpoint-1500", lambda: models.lock(tmp_path / "trained"))
    assert models.measure(tmp_path / "trained" / "checkpoint-1500")
