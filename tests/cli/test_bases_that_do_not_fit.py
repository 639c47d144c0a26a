"""Bases that cannot do what a plan asks of them, or whose files do not go together: refused with what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel

from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.checkpoint import measure, open_checkpoint
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from tests.commands import gramfuse

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {**SIZES, "max_position_embeddings": 64, "pad_token_id": 0}
GENERATION = {"task": '"causal-lm"', "labels": "[]"}


class Bases:
    """Pico models in a directory, locked and measured by the command line."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.number = 0

    def save(self, model: PreTrainedModel, tokenizer: Any = None) -> Path:
        self.number += 1
        place = self.directory / f"model-{self.number}"
        model.save_pretrained(place)
        (tokenizer or self.tokenizer).save_pretrained(place)
        return place

    def make(self, kind: str, auto: str, tokenizer: Any = None, **settings: Any) -> tuple[Path, Path]:
        """Return the places of a model of a type, and of one that was fine-tuned from it."""
        torch.manual_seed(4)
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(self.tokenizer), **settings)
        model = getattr(transformers, auto).from_config(config)
        base = self.save(model, tokenizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        return base, self.save(model, tokenizer)

    def lock(self, base: Path, **settings: str) -> dict[str, Any]:
        self.number += 1
        project = self.directory / f"project-{self.number}"
        project.mkdir()
        task = {"task": '"classification"', "labels": '["a", "b"]', "max-length": "16", **settings}
        lines = "".join(f"{key} = {value}\n" for key, value in task.items())
        (project / "plan.toml").write_text(
            f'[plan]\nname = "x"\n[model]\nbase = "{base}"\n{lines}'
            '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n[[silo]]\nname = "a"\n[[silo]]\nname = "b"\n'
        )
        return gramfuse("plan", "lock", project)

    def measure(self, model: Path, base: Path, *options: Any) -> dict[str, Any]:
        self.number += 1
        data = self.directory / "train.jsonl"
        data.write_text("".join(f'{{"text": "{text}"}}\n' for text in ("the cat and a dog", "rain", "my old pan")))
        out = self.directory / f"{self.number}.safetensors"
        return gramfuse("measure", model, "--base", base, "--data", data, "-o", out, *options)


@pytest.fixture
def bases(tmp_path: Path, pico_tokenizer: Any) -> Bases:
    return Bases(tmp_path, pico_tokenizer)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm", "xlnet"])
def test_a_model_that_sees_the_words_it_is_to_predict_is_locked_and_measured_by_nobody(kind: str, bases: Bases) -> None:
    settings: dict[str, dict[str, Any]] = {
        "xlm": {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "causal": False, "pad_index": 0},
        "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    }
    tokenizer = copy.deepcopy(bases.tokenizer)
    tokenizer.padding_side = "left" if kind == "xlnet" else "right"
    base, tuned = bases.make(kind, "AutoModelForCausalLM", tokenizer, **settings.get(kind, BERT))
    for refused in (
        lambda: bases.lock(base, **GENERATION),
        lambda: bases.measure(tuned, base, "--task", "causal-lm"),
    ):
        with pytest.raises(ModelError, match=r"decoder.*\"is_decoder\": true"):
            refused()


def test_a_task_that_is_not_the_models_is_named_where_weights_are_missing(bases: Bases) -> None:
    base, tuned = bases.make("bert", "AutoModelForSequenceClassification", **BERT)
    both = (
        r"cls\.predictions.* BertForSequenceClassification.* BertLMHeadModel.*--task.*get the files again.*config\.json"
    )
    with pytest.raises(ModelError, match=both):
        bases.measure(tuned, base, "--task", "causal-lm")


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_decoder_and_an_encoder_that_was_made_one_are_locked_and_measured(kind: str, bases: Bases) -> None:
    settings = BERT | {"is_decoder": True} if kind == "bert" else {"n_embd": 16, "n_layer": 1, "n_head": 2}
    base, tuned = bases.make(kind, "AutoModelForCausalLM", **settings)
    assert bases.lock(base, **GENERATION)
    assert bases.measure(tuned, base)["examples"] == 3


@pytest.mark.parametrize("known", [1, 2])
def test_a_plan_of_pairs_is_tried_with_a_pair_before_any_silo_is(known: int, bases: Bases) -> None:
    """A tokenizer that numbers the two texts, over a model that knows one number."""
    tokenizer = copy.deepcopy(bases.tokenizer)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    auto = "AutoModelForSequenceClassification"
    base, _ = bases.make("bert", auto, tokenizer, **BERT | {"type_vocab_size": known})
    assert bases.lock(base)
    if known == 2:
        assert bases.lock(base, pair="true")
        return
    with pytest.raises(ModelError, match=r"pair of texts.*token_type_ids.*type_vocab_size"):
        bases.lock(base, pair="true")


def test_a_model_that_takes_another_token_for_padding_is_refused_with_the_line_that_puts_it_right(
    bases: Bases,
) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 7}
    base, _ = bases.make("gpt2", "AutoModelForSequenceClassification", **sizes)
    with pytest.raises(ModelError, match=r'token 7.*token 0; set "pad_token_id": 0 in its config\.json$'):
        bases.lock(base)
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 0}))
    assert bases.lock(base)


@pytest.mark.parametrize("share", [0, 10])
def test_a_tokenizer_that_does_not_say_which_token_is_unknown_is_refused_if_most_text_is(
    share: int, bases: Bases
) -> None:
    """Its backend has such a token all the same."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {
        word: index for index, word in enumerate([*special, *list(bases.tokenizer.get_vocab())[4 : 4 + share]])
    }
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    assert tokenizer.unk_token is None
    base, _ = bases.make("bert", "AutoModelForSequenceClassification", tokenizer, **BERT)
    with pytest.raises(ModelError, match="100% of plain" if share == 0 else r"\d\d% of plain"):
        bases.lock(base)


def test_a_type_of_model_that_no_class_of_the_task_is_for_is_named_and_no_other(bases: Bases) -> None:
    base, _ = bases.make("bert", "AutoModelForSequenceClassification", **BERT)
    with pytest.raises(ModelError, match=r"'bert' .*sequence-to-sequence") as caught:
        bases.lock(base, task='"sequence-to-sequence"', labels="[]")
    assert str(base) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_model_that_is_not_there_is_called_a_model(bases: Bases) -> None:
    with pytest.raises(ModelError, match=r"^model '.*/nope': no such directory"):
        bases.measure(bases.directory / "nope", bases.directory)


def test_a_batch_of_images_that_cannot_be_computed_is_not_said_to_be_too_long(bases: Bases) -> None:
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(4)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    base = bases.save(model, processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02
    task = Task(task="image-classification", labels=("LABEL_0", "LABEL_1"))
    checkpoint = open_checkpoint(str(bases.save(model, processor)), str(base), task, bases.directory)
    image = bases.directory / "one.png"
    Image.new("RGB", (40, 30)).save(image)
    checkpoint.base.tokenizer.size = {"height": 64, "width": 64}
    with pytest.raises(ModelError, match="--batch-size") as caught:
        measure(
            checkpoint,
            Examples([image], None, [None]),
            limit=100,
            batch_size=1,
            device=torch.device("cpu"),
            progress=lambda done, total: None,
        )
    assert "text" not in str(caught.value)
    assert "length" not in str(caught.value)
