"""The Fisher diagonal against the definition: each example's own gradient by autograd, squared, then averaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from gramfuse_client.tasks.registry import AT_SILO
from gramfuse_client.training.fisher import choose_variant, fisher_diagonal
from gramfuse_model.probing.batch import Batch
from gramfuse_protocol.contract.task import MaskedTask, Task
from gramfuse_protocol.errors import ContributionError, PlanError

Fisher = dict[str, torch.Tensor]
Terms = Callable[[Any, Batch], list[tuple[torch.Tensor, torch.Tensor]]]
"""(probability, log-likelihood) of everything that an example's expectation is over."""

LABELS = ("a", "b", "c")
IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [8, 1, 6, 4, 10, 12], [2, 2, 9, 5, 7, 1]])
BERT = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def examples(*labels: Any) -> list[Batch]:
    return [
        {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, 6, dtype=torch.long), "labels": label}
        for ids, label in zip(IDS, labels, strict=True)
    ]


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]


def by_definition(model: Any, batches: list[Batch], terms: Terms) -> Fisher:
    """Mean over examples of the expectation of the squared gradient, each gradient by a run of its own."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for batch in batches:
        for index in range(len(terms(model, batch))):
            probability, log_likelihood = terms(model, batch)[index]
            model.zero_grad()
            log_likelihood.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += probability.detach() * parameter.grad**2 / len(batches)
    model.zero_grad()
    return total


def assert_same(found: Fisher, expected: Fisher) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=2e-4, atol=1e-12, msg=name)
    assert any(values.abs().max() > 1e-6 for values in expected.values())


@pytest.fixture
def classifier() -> Any:
    torch.manual_seed(2)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.bert.embeddings.requires_grad_(False)
    return model


@pytest.mark.parametrize("own", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("variant", ["hard", "soft", "empirical"])
def test_of_one_label(classifier: Any, variant: Any, own: tuple[int, ...]) -> None:
    task = MaskedTask(task="classification", labels=LABELS, annotates=tuple(LABELS[i] for i in own))
    batches = examples(*(torch.tensor([label]) for label in (2, 0, 2)))

    def terms(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        z = logits_of(model, batch)
        log_p = {label: z[label] - torch.logsumexp(torch.stack([z[i] for i in own]), 0) for label in own}
        if variant == "soft":
            return [(log_p[label].exp(), log_p[label]) for label in own]
        chosen = int(batch["labels"]) if variant == "empirical" else max(own, key=z.tolist().__getitem__)
        return [(torch.tensor(1.0), log_p[chosen])]

    found = fisher_diagonal(classifier, iter(batches), task, variant)
    assert not any("embeddings" in name for name in found)
    classifier.eval()
    assert_same(found, by_definition(classifier, batches, terms))


@pytest.mark.parametrize("variant", ["hard", "soft", "empirical"])
def test_of_a_set_of_labels(classifier: Any, variant: Any) -> None:
    task = MaskedTask(task="multi-label", labels=LABELS, annotates=("a", "c"), threshold=0.4)
    batches = examples(*(torch.tensor([row]) for row in ([1.0, 0, 0], [0, 1, 1], [1, 0, 1])))

    def log_likelihood(z: torch.Tensor, labels: tuple[float, ...]) -> torch.Tensor:
        p = torch.sigmoid(z)
        return sum(torch.log(p[i]) if y else torch.log(1 - p[i]) for i, y in zip((0, 2), labels, strict=True))  # type: ignore[return-value]

    def terms(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        z = logits_of(model, batch)
        if variant == "soft":  # over all sets of labels, which the code does not go through
            all_sets = [log_likelihood(z, labels) for labels in itertools.product((0.0, 1.0), repeat=2)]
            return [(value.exp(), value) for value in all_sets]
        truth = batch["labels"][0] if variant == "empirical" else (torch.sigmoid(z) >= 0.4).float()
        return [(torch.tensor(1.0), log_likelihood(z, (float(truth[0]), float(truth[2]))))]

    found = fisher_diagonal(classifier, batches, task, variant)
    assert_same(found, by_definition(classifier, batches, terms))


def test_of_a_number() -> None:
    torch.manual_seed(3)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=1)).eval()
    batches = examples(*(torch.tensor([value]) for value in (0.5, -1.0, 2.0)))

    def terms(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        normal = torch.distributions.Normal(logits_of(model, batch)[0], 1.0)
        return [(torch.tensor(1.0), normal.log_prob(batch["labels"][0]))]

    found = fisher_diagonal(model, batches, Task(task="regression"), "empirical")
    assert_same(found, by_definition(model, batches, terms))


CAUSAL = ("causal-lm", "prompt-completion")


def of_tokens(kind: str, variant: str) -> tuple[Any, list[Batch], Task, Terms]:
    """A model whose likelihood is a product over tokens, and its definition by transformers' own mean loss."""
    torch.manual_seed(4)
    tags = ("O", "B-X", "I-X")
    ignored = [torch.tensor([[-100, 1, 2, -100, 0, -100]])] * 3
    if kind == "token-classification":
        model: Any = BertForTokenClassification(BertConfig(**BERT, num_labels=3)).eval()
        task, batches = Task(task=kind, labels=tags), examples(*ignored)
    elif kind in CAUSAL:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
        )
        labels = [ids.unsqueeze(0) for ids in IDS] if kind == "causal-lm" else ignored
        task, batches = Task(task=kind), examples(*labels)
    else:
        config = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))
        task, batches = Task(task=kind), examples(*ignored)

    def terms(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        labels = batch["labels"]
        if variant == "hard":
            labels = torch.where(labels == -100, labels, logits_of(model, batch).argmax(dim=-1))
        loss = model(**{**batch, "labels": labels}).loss
        predicted = (labels[:, 1:] if kind in CAUSAL else labels) != -100
        return [(torch.tensor(1.0), -loss * int(predicted.sum()))]

    return model.eval(), batches, task, terms


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("token-classification", "hard"),
        ("token-classification", "empirical"),
        ("causal-lm", "empirical"),
        ("prompt-completion", "empirical"),
        ("sequence-to-sequence", "empirical"),
    ],
)
def test_of_tokens(kind: str, variant: Any) -> None:
    model, batches, task, terms = of_tokens(kind, variant)
    assert_same(fisher_diagonal(model, batches, task, variant), by_definition(model, batches, terms))


def test_each_kind_has_a_default_and_refuses_what_it_cannot_have() -> None:
    regression = Task(task="regression")
    assert choose_variant(regression, None) == "empirical"
    assert choose_variant(Task(task="classification", labels=LABELS), None) == "hard"
    with pytest.raises(PlanError, match=r"'regression' .*fisher:hard.*fisher:empirical"):
        choose_variant(regression, "hard")
    assert all("empirical" in kind.fisher for kind in AT_SILO.values())


def test_a_diverged_model_is_named(classifier: Any) -> None:
    with torch.no_grad():
        classifier.classifier.weight[0, 0] = torch.nan
    batches = examples(*(torch.tensor([0]) for _ in range(3)))
    with pytest.raises(ContributionError, match="NaN or infinite"):
        fisher_diagonal(classifier, batches, Task(task="classification", labels=LABELS), "empirical")
