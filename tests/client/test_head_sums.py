"""What a head is fitted from: the features of each example, however a model pads, pools or picks its token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from gramfuse_client.measuring.head_sums import collect_head_sums
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, ModelError

TASK = Task(task="classification", labels=("a", "b", "c"))
SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    match family:
        case "bert":
            return BertForSequenceClassification(BertConfig(**SIZE))
        case "roberta":
            return RobertaForSequenceClassification(RobertaConfig(**SIZE))
        case "distilbert":
            config = DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3)
            return DistilBertForSequenceClassification(config)
        case _:
            config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=3)
            config.pad_token_id = 0
            return GPT2ForSequenceClassification(config)


def batches(size: int, *, left: bool = False, count: int = 12) -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 40, size=rng.integers(3, 11)).tolist() for _ in range(count)]
    labels = rng.integers(0, 3, count)
    made = []
    for start in range(0, count, size):
        some = texts[start : start + size]
        width = max(map(len, some))
        pads = [[0] * (width - len(text)) for text in some]
        rows = [p + t if left else t + p for t, p in zip(some, pads, strict=True)]
        marks = [
            ([0] * len(p) + [1] * len(t)) if left else ([1] * len(t) + [0] * len(p))
            for t, p in zip(some, pads, strict=True)
        ]
        made.append(
            {
                "input_ids": torch.tensor(rows),
                "attention_mask": torch.tensor(marks),
                "labels": torch.tensor(labels[start : start + size]),
            }
        )
    return made


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_the_sums_are_those_of_each_example_alone_whatever_the_batch_and_padding(family: str) -> None:
    model = model_of(family)
    alone, together = (collect_head_sums(model, batches(size), TASK) for size in (1, 6))
    for name in ("second", "first", "counts"):
        assert np.allclose(getattr(alone, name), getattr(together, name), rtol=1e-5, atol=1e-6), name
    assert together.examples == 12

    # The head's own layer, fed with the features, gives the model's mean logits.
    head = model.get_submodule(
        {"bert": "classifier", "roberta": "classifier.out_proj", "gpt2": "score"}.get(family, "classifier")
    )
    weight, bias = head.weight.detach().double().numpy(), 0 if head.bias is None else head.bias.detach().numpy()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches(6)])
    assert np.allclose(alone.first[:-1].sum(axis=1) @ weight.T / 12 + bias, logits.mean(dim=0).numpy(), atol=1e-5)


def test_a_model_in_training_mode_is_measured_in_evaluation_mode_and_left_in_training_mode() -> None:
    model = model_of("bert").train()
    first, second = (collect_head_sums(model, batches(4), TASK) for _ in range(2))
    assert np.array_equal(first.second, second.second)
    assert model.training


def test_what_gives_no_sums_is_refused() -> None:
    model = model_of("bert")
    with pytest.raises(ModelError, match="4"):
        collect_head_sums(model, batches(4), Task(task="classification", labels=tuple("abcd")))
    with pytest.raises(ContributionError):
        collect_head_sums(model, [], TASK)
    model.register_forward_hook(lambda module, inputs, output: SequenceClassifierOutput(logits=2 * output.logits))
    with pytest.raises(ModelError):
        collect_head_sums(model, batches(4), TASK)
