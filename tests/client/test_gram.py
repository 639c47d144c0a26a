"""Gram matrices against a loop over single tokens, on pico models with padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.measuring.gram import Gram, collect_grams
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import trainable
from gramfuse_model.probing.hooks import rows_of
from gramfuse_protocol.contract.layout import Group, Layout, Linear, RowKind, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator
from tests.projects import bert_config

Batch = dict[str, torch.Tensor]
UNLIMITED = 10**9


def load(directory: Path) -> PreTrainedModel:
    """The pico model with a head of three labels; its embeddings are frozen."""
    return load_base(
        Plan.parse(
            f"""
            [plan]
            name = "gram"
            [model]
            base = "{directory}"
            task = "classification"
            labels = ["a", "b", "c"]
            [training]
            freeze = [{"'*wte*', '*wpe*'" if "gpt2" in str(directory) else "'*embeddings*'"}]
            [privacy]
            secure-aggregation = false
            [[silo]]
            name = "one"
            """
        ),
        Path(),
    ).model


def sentences(seed: int, count: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 40, size=rng.integers(3, 11)).tolist() for _ in range(count)]


def padded(rows: list[list[int]], size: int, *, extra: int = 0, filler: int = 0) -> Iterator[Batch]:
    """Batches of `size`, padded to the longest of the batch and `extra` more."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(map(len, chunk)) + extra
        yield {
            "input_ids": torch.tensor([row + [filler] * (width - len(row)) for row in chunk]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chunk]),
            "labels": torch.zeros(len(chunk), dtype=torch.long),
        }


def tokens_of(model: nn.Module, batches: Iterable[Batch], weight: str) -> np.ndarray:
    """Every real token's input to one module, (tokens, d_in) in float64, taken one by one."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    rows = []
    with torch.no_grad():
        for batch in batches:
            seen.clear()
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for x in seen:
                for example in range(len(x)):
                    if x.dim() == 2:  # one row for each example
                        rows.append(x[example])
                        continue
                    for position in range(x.shape[1]):
                        if batch["attention_mask"][example, position]:
                            rows.append(x[example, position])
    handle.remove()
    return torch.stack(rows).double().numpy()


def gram_of(rows: np.ndarray, group: Group) -> np.ndarray:
    """The packed mean of x xᵀ, one token and one entry at a time."""
    total = np.zeros((group.d_in, group.d_in))
    for row in rows:
        total += np.outer(row, row)
    total /= len(rows)
    packed = []
    width = group.blocks.b
    for first in range(0, group.d_in, width):
        stop = min(first + width, group.d_in)
        packed += [total[i, j] for i in range(first, stop) for j in range(i, stop)]
    return np.array(packed)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def layout_of(model: nn.Module, **merge: Any) -> Layout:
    batch = {key: value for key, value in next(padded(sentences(0), 4)).items() if key != "labels"}
    return derive_layout(model, batch, Merge(context_free="full", **merge))


@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
@pytest.mark.parametrize("kind", ["pico_bert", "pico_gpt2"])
def test_the_shared_gram_is_that_of_each_of_its_modules_over_real_tokens(
    kind: str, structure: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(kind))
    layout = layout_of(model, gram={"*": structure})
    grams = collect_grams(model, padded(sentences(1), 5), layout, limit=UNLIMITED)
    assert set(grams) == {group.name for group in layout.groups}
    for group, linear in layout.linear():
        rows = tokens_of(model, padded(sentences(1), 5), linear.weight)
        assert grams[group.name].tokens == len(rows)
        packed = grams[group.name].mean()
        assert packed.dtype == np.float32
        assert_close(packed, gram_of(rows, group))


@pytest.mark.parametrize("filler", [0, 17], ids=["padding token", "a word"])
@pytest.mark.parametrize("kind", ["pico_bert", "pico_gpt2"])
def test_more_padding_changes_nothing(kind: str, filler: int, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(kind))
    layout = layout_of(model)
    plain = collect_grams(model, padded(sentences(2), 4), layout, limit=UNLIMITED)
    more = collect_grams(model, padded(sentences(2), 4, extra=9, filler=filler), layout, limit=UNLIMITED)
    for name, gram in plain.items():
        assert more[name].tokens == gram.tokens
        assert_close(more[name].mean(), gram.mean())


@pytest.mark.parametrize(
    ("kind", "shape", "kept"),
    [
        ("input", (2, 3, 4), [0, 1, 3]),
        ("input", (6, 4), [0, 1, 3]),
        ("input", (2, 3, 2, 4), [0, 1, 2, 3, 6, 7]),
        ("input", (2, 5, 4), [0, 1, 5]),
        ("target", (10, 4), [0, 1, 5]),
        ("turned", (3, 2, 4), [0, 2, 1]),
        ("turned", (6, 4), [0, 2, 1]),
        ("turned", (5, 2, 4), [0, 2, 1]),
        ("all", (2, 4), [0, 1]),
        ("all", (2, 3), [0, 1]),
        ("table", (1, 6, 4), [0, 1, 2, 3, 4, 5]),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_the_mask_applies_to_tokens_and_to_nothing_else(kind: RowKind, shape: tuple[int, ...], kept: list[int]) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(torch.tensor(shape).prod()).reshape(shape).float()
    torch.testing.assert_close(rows_of(x, kind, mask), x.reshape(-1, shape[-1])[kept])


@pytest.mark.parametrize(
    ("kind", "shape"), [("input", (3, 3, 4)), ("input", (2, 2, 4)), ("turned", (2, 3, 4)), ("input", (7, 4))]
)
def test_rows_of_another_number_of_examples_or_places_are_refused(kind: RowKind, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="examples"):
        rows_of(torch.zeros(shape), kind, torch.ones(2, 3, dtype=torch.bool))


def test_the_size_of_the_batches_changes_nothing(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model, gram={"*": "full", "*intermediate*": "block:5"})
    whole = collect_grams(model, padded(sentences(3), 12), layout, limit=UNLIMITED)
    for size in (1, 5):
        parts = collect_grams(model, padded(sentences(3), size), layout, limit=UNLIMITED)
        for name, gram in whole.items():
            assert parts[name].tokens == gram.tokens
            assert_close(parts[name].mean(), gram.mean())


def test_batches_without_a_mask_count_every_token(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    rows = [row[:3] for row in sentences(4)]
    masked = collect_grams(model, padded(rows, 4), layout, limit=UNLIMITED)
    bare = collect_grams(
        model, ({"input_ids": batch["input_ids"]} for batch in padded(rows, 4)), layout, limit=UNLIMITED
    )
    for name, gram in masked.items():
        assert bare[name].tokens == gram.tokens
        assert_close(bare[name].mean(), gram.mean())


@pytest.mark.parametrize("limit", [1, 2, 13, 40])
def test_the_token_limit_is_exact_and_ends_the_collection(pico_bert: Path, limit: int) -> None:
    model = load(pico_bert)
    layout = layout_of(model, exclude=("*pooler*", "classifier*"))  # every token enters each group that is left
    rows = sentences(5)
    drawn = 0

    def counted() -> Iterator[Batch]:
        nonlocal drawn
        for batch in padded(rows, 3):
            drawn += 1
            yield batch

    done: list[int] = []
    grams = collect_grams(model, counted(), layout, limit=limit, progress=done.append)
    lengths = itertools.accumulate(sum(map(len, rows[start : start + 3])) for start in range(0, len(rows), 3))
    needed = next(number for number, tokens in enumerate(lengths, 1) if tokens >= limit)
    assert drawn == needed
    assert done == list(range(1, needed + 1))
    for group in layout.groups:
        expected = tokens_of(model, padded(rows, 3), group.weights[0].weight)[:limit]
        assert grams[group.name].tokens == limit
        assert_close(grams[group.name].mean(), gram_of(expected, group))


def test_collection_runs_in_evaluation_mode_without_autograd_and_restores_the_model(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    expected = collect_grams(model, padded(sentences(6), 4), layout, limit=UNLIMITED)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    observed = set()
    handle = model.classifier.register_forward_pre_hook(
        lambda module, _: observed.add((module.training, torch.is_grad_enabled()))
    )
    grams = collect_grams(model, padded(sentences(6), 4), layout, limit=UNLIMITED)
    handle.remove()
    assert observed == {(False, False)}
    for name, gram in expected.items():
        np.testing.assert_array_equal(grams[name].mean(), gram.mean())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_hooks_and_mode_are_restored_when_the_model_fails(pico_bert: Path, training: bool) -> None:
    model = load(pico_bert).train(training)
    layout = layout_of(model)
    bad = {"input_ids": torch.tensor([[10_000]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(IndexError):
        collect_grams(model, [*padded(sentences(7), 4), bad], layout, limit=UNLIMITED)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_part_that_was_in_evaluation_mode_stays_there(pico_bert: Path) -> None:
    model = load(pico_bert).train()
    model.bert.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    collect_grams(model, padded(sentences(7), 4), layout_of(load(pico_bert)), limit=UNLIMITED)
    assert {name: module.training for name, module in model.named_modules()} == before


class Experts(nn.Module):
    """Rows go to one of two experts, chosen by the sign of their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(4, 2)
        self.negative = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 4)
        total = torch.zeros(())
        for expert, chosen in ((self.positive, rows[:, 0] > 0), (self.negative, rows[:, 0] <= 0)):
            if chosen.any():
                total = total + expert(rows[chosen]).sum()
        return total


def test_an_expert_that_no_silo_called_takes_the_mean_and_is_named_empty(seeded: torch.Generator) -> None:
    model = Experts()
    x = torch.randn(6, 5, 4, generator=seeded)
    layout = derive_layout(model, {"x": x})
    assert {group.name for group in layout.groups} == {"positive", "negative"}
    x[..., 0] = x[..., 0].abs() + 0.1
    accumulator = Accumulator(layout, alpha=0.9)
    base = trainable(model)
    for silo in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=seeded)
        statistics = collect_statistics(model, [{"x": x + silo}], layout, base=base, examples=6)
        assert statistics.tokens == {"positive": 30, "negative": 0}
        np.testing.assert_array_equal(statistics.block("gram:negative"), 0)
        accumulator.fold(statistics, "silo")
    merged = accumulator.merge()
    assert {step.group: step.outcome for step in merged.steps} == {"positive": "clean", "negative": "empty"}
    mean = accumulator.mean()
    np.testing.assert_array_equal(merged.deltas["negative.weight"], mean["negative.weight"])
    assert np.abs(merged.deltas["positive.weight"] - mean["positive.weight"]).max() > 1e-3


def test_no_real_token_gives_zeros(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model, exclude=("*pooler*", "classifier*"))
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    for gram in collect_grams(model, [batch], layout, limit=UNLIMITED).values():
        assert gram.tokens == 0
        np.testing.assert_array_equal(gram.mean(), 0)


def without_conv1d(model: PreTrainedModel) -> PreTrainedModel:
    """Put a Linear with the transposed weight in the place of each Conv1D."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data = module.weight.data.T.clone()
            linear.bias.data = module.bias.data.clone()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


@pytest.mark.parametrize("structure", ["full", "block:5"])
def test_a_gpt2_merges_as_the_same_model_with_linear_layers(pico_gpt2: Path, structure: str) -> None:
    models = {"conv1d": load(pico_gpt2), "linear": without_conv1d(load(pico_gpt2))}
    layouts = {kind: layout_of(model, gram={"*": structure}) for kind, model in models.items()}
    assert sum(not weight.transposed for _, weight in layouts["conv1d"].linear()) == 8
    assert all(weight.transposed for _, weight in layouts["linear"].linear())
    turned = {weight.weight for _, weight in layouts["conv1d"].linear() if not weight.transposed}
    sums = {kind: Accumulator(layout, alpha=0.9) for kind, layout in layouts.items()}
    bases = {kind: trainable(model) for kind, model in models.items()}
    for silo in range(3):
        rng = np.random.default_rng(silo)
        change = {name: 0.05 * rng.standard_normal(array.shape) for name, array in bases["conv1d"].items()}
        sent: dict[str, Statistics] = {}
        for kind, model in models.items():
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in change:
                        delta = change[name].T if kind == "linear" and name in turned else change[name]
                        parameter.copy_(torch.from_numpy(bases[kind][name] + delta))
            rows = sentences(10 + silo)
            sent[kind] = collect_statistics(model, padded(rows, 4), layouts[kind], base=bases[kind], examples=len(rows))
            sums[kind].fold(sent[kind], f"silo {silo}")
        for group in layouts["conv1d"].groups:
            name = f"gram:{group.name}"
            assert_close(sent["linear"].block(name), sent["conv1d"].block(name))
    merged = {kind: accumulator.merge() for kind, accumulator in sums.items()}
    for name, delta in merged["conv1d"].deltas.items():
        other = merged["linear"].deltas[name]
        assert_close(other.T if name in turned else other, delta, 1e-4)
    assert [s.outcome for s in merged["linear"].steps] == [s.outcome for s in merged["conv1d"].steps]


def test_statistics_are_the_differences_from_the_base_and_only_of_what_is_trained(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    base = trainable(model)
    with torch.no_grad():
        model.classifier.weight += 1
    rows = sentences(8)
    statistics = collect_statistics(model, padded(rows, 4), layout, base=base, examples=len(rows))
    assert set(statistics.blocks) == {block.name for block in layout.blocks}
    assert not any("embeddings" in name for name in statistics.blocks)
    for name in base:
        expected = 1 if name == "classifier.weight" else 0
        np.testing.assert_allclose(statistics.block(f"delta:{name}"), expected, atol=1e-6, err_msg=name)


def test_a_weight_that_diverged_is_refused_by_name(pico_bert: Path) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    base = trainable(model)
    with torch.no_grad():
        model.classifier.weight[1, 2] = torch.nan
    with pytest.raises(ContributionError, match=r"delta:classifier\.weight.* 1 NaN"):
        collect_statistics(model, padded(sentences(9), 4), layout, base=base, examples=12)


def test_a_layout_of_another_architecture_is_refused(pico_bert: Path, pico_gpt2: Path) -> None:
    model = load(pico_bert)
    with pytest.raises(ContributionError, match=r"transformer\.h\.0\.attn\.c_attn\.weight"):
        collect_grams(model, padded(sentences(1), 4), layout_of(load(pico_gpt2)), limit=UNLIMITED)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("width", [8, 32])
def test_a_layout_of_a_model_of_another_width_is_refused(pico_bert: Path, width: int) -> None:
    config = bert_config(60, hidden_size=width, intermediate_size=48, num_labels=3)
    other = BertForSequenceClassification(config)
    with pytest.raises(ContributionError, match="weight"):
        collect_grams(other, padded(sentences(1), 4), layout_of(load(pico_bert)), limit=UNLIMITED)


def test_a_layout_that_takes_a_conv1d_for_a_linear_is_refused(pico_gpt2: Path) -> None:
    layout = layout_of(load(pico_gpt2))
    with pytest.raises(ContributionError, match="c_attn"):
        collect_grams(without_conv1d(load(pico_gpt2)), padded(sentences(1), 4), layout, limit=UNLIMITED)


@pytest.mark.parametrize("members", [(0, 1), (1, 0)], ids=["in order", "second first"])
def test_modules_of_one_group_that_receive_different_tensors_are_refused(
    pico_bert: Path, members: tuple[int, int]
) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    weights = tuple(
        Linear(weight=f"bert.encoder.layer.{n}.attention.self.query.weight", d_out=16, transposed=True) for n in members
    )
    layout = layout.model_copy(update={"groups": (Group(name="made-up", d_in=16, structure="full", weights=weights),)})
    with pytest.raises(ContributionError, match=r"'made-up'.*receives another tensor"):
        collect_grams(model, padded(sentences(1), 4), layout, limit=UNLIMITED)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_subclass_of_a_linear_layer_is_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    model = nn.Sequential(Doubling(4, 2))
    layout = Layout(
        groups=(
            Group(name="g", d_in=4, structure="full", weights=(Linear(weight="0.weight", d_out=2, transposed=True),)),
        ),
        tensors=(Tensor(name="0.weight", shape=(2, 4), merge="regmean"),),
        frozen=("0.bias",),
    )
    with pytest.raises(ContributionError, match=r"0\.weight"):
        collect_grams(model, [{"input": torch.ones(1, 4)}], layout, limit=UNLIMITED)


def test_half_precision_inputs_are_summed_without_losing_small_tokens() -> None:
    # In float16 the sum would stop growing at 2048.
    group = Group(name="g", d_in=1, structure="full", weights=(Linear(weight="w.weight", d_out=1, transposed=True),))
    gram = Gram(group, UNLIMITED)
    for _ in range(3):
        gram.add(torch.ones(3000, 1, dtype=torch.float16))
    assert gram.tokens == 9000
    assert gram.mean() == 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_gram_matrix_of_a_model_in_half_precision_is_of_what_its_layers_receive_multiplied_in_float32(
    half: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 2)).to(half)
    x = torch.randn(300, 6).to(half)
    received = model[0](x).detach().double()
    expected = (received.T @ received / 300).numpy()[np.triu_indices(12)]
    layout = derive_layout(Named(model), {"x": x})
    grams = collect_grams(Named(model), [{"x": x[:100]}, {"x": x[100:]}], layout, limit=10**6)
    np.testing.assert_allclose(grams["model.1"].mean(), expected, rtol=1e-5, atol=1e-5)


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(x)
        return out


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_that_no_mask_tells_of_is_refused_and_not_counted(pico_bert: Path, side: str) -> None:
    model = load(pico_bert)
    layout = layout_of(model)
    batch = next(padded(sentences(8), 8))
    ids = batch["input_ids"] if side == "right" else batch["input_ids"].flip(1)
    with pytest.raises(ModelError, match="attention_mask"):
        collect_grams(model, [{"input_ids": ids}], layout, limit=UNLIMITED)
    same_length = [{"input_ids": batch["input_ids"][:1]}]
    assert all(gram.tokens for gram in collect_grams(model, same_length, layout, limit=UNLIMITED).values())
