"""Experts that are one parameter: Gram matrices against the model's own products, and what a merge makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.experts import holds_experts, is_understood
from gramfuse_model.normal_equations import summands
from gramfuse_model.parameters import trainable
from gramfuse_protocol.contract.coverage import coverage, unused_expert_lines
from gramfuse_protocol.contract.layout import Group, Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.report.page.words import explain

Batch = dict[str, torch.Tensor]
UNLIMITED = 10**9
EXPERTS, HIDDEN, INNER, WORDS = 6, 8, 12, 40
A = (1.0, -1.0, 2.0, -2.0, 0.0, 0.0)
B = (1.0, -1.0, 2.0, -2.0, 0.0, 3.0)
"""Multiples of one direction as rows of a router that chooses two: it never chooses 4, with A not 5, with B not 0."""


def mixtral(seed: int = 1, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": EXPERTS}
    config = MixtralConfig(vocab_size=WORDS, num_experts_per_tok=2, initializer_range=0.5, **sizes, **settings)
    model: PreTrainedModel = MixtralForCausalLM(config).eval()
    return model


def moved(model: PreTrainedModel, seed: int, router: tuple[float, ...] | None = None) -> PreTrainedModel:
    """Change all weights, and have the router choose by multiples of one direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if router and name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.tensor(router).unsqueeze(1) * parameter[:1])
    return model


def texts(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, WORDS, size=rng.integers(3, 12)).tolist() for _ in range(count)]


def padded(rows: list[list[int]], size: int, side: str = "right") -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(map(len, chunk))
        pairs = []
        for row in chunk:
            padding = [0] * (width - len(row))
            both = ([*row, *padding], [1] * len(row) + padding)
            pairs.append(both if side == "right" else ([*padding, *row], padding + [1] * len(row)))
        ids, mask = (torch.tensor(part) for part in zip(*pairs, strict=True))
        yield {"input_ids": ids, "attention_mask": mask}


def layout_of(model: PreTrainedModel, *, scaled: bool = False, **merge: Any) -> Layout:
    (batch,) = padded(texts(9, 8), 8)
    return derive_layout(model, batch, Merge(context_free="full", **merge), scaled=scaled)


def groups_of(layout: Layout) -> list[Group]:
    return [group for group in layout.groups if group.experts]


def products(model: PreTrainedModel, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """By tensor, Σ x xᵀ / tokens of each expert, (experts, d_in, d_in): of the model's products, text by text.

    The model runs in float64, expert by expert, without padding.
    """
    model.set_experts_implementation("eager")
    tensors = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    sums = {name: torch.zeros(EXPERTS, p.shape[2], p.shape[2], dtype=torch.float64) for name, p in tensors.items()}
    linear = functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        for name, tensor in tensors.items():
            for expert in range(EXPERTS):
                if weight.shape == tensor.shape[1:] and torch.equal(weight, tensor[expert]):
                    sums[name][expert] += x.T @ x
        return linear(x, weight, bias)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "linear", watched)
        for row in rows:
            model(input_ids=torch.tensor([row]))
    tokens = sum(map(len, rows))
    return {name: total.numpy() / tokens for name, total in sums.items()}


def squares(group: Group, packed: np.ndarray) -> np.ndarray:
    """Full Gram matrices, (experts, d_in, d_in)."""
    return np.concatenate(list(group.blocks.unpack(packed)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 16])
def test_gram_matrices_of_experts_are_those_of_the_products_of_the_model(
    size: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = mixtral(), texts(3, 40)
    layout = layout_of(model)
    found = collect_grams(model, padded(rows, size, side), layout, limit=UNLIMITED)
    expected = products(mixtral().double(), rows, monkeypatch)
    assert {group.name for group in groups_of(layout)} == expected.keys()
    for group in groups_of(layout):
        gram, of = found[group.name], expected[group.name]
        assert gram.tokens == sum(map(len, rows))
        assert sum(bool(one.any()) for one in of) > 2
        np.testing.assert_allclose(squares(group, gram.mean()), of, rtol=0, atol=1e-6 * np.abs(of).max())


def test_of_more_tokens_than_the_limit_the_first_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = mixtral(), texts(3, 8)
    layout = layout_of(model)
    found = collect_grams(model, padded(rows, 3), layout, limit=sum(map(len, rows[:4])))
    expected = products(mixtral().double(), rows[:4], monkeypatch)
    for group in groups_of(layout):
        of = expected[group.name]
        np.testing.assert_allclose(squares(group, found[group.name].mean()), of, atol=1e-6 * np.abs(of).max())


@pytest.mark.parametrize("structure", ["block:3", "diagonal"])
def test_structures_hold_for_each_expert(structure: str) -> None:
    model, rows = mixtral(), texts(3, 10)
    whole, cut = layout_of(model), layout_of(model, gram={"*": "full", "*experts*": structure})
    full, kept = (collect_grams(model, padded(rows, 4), one, limit=UNLIMITED) for one in (whole, cut))
    width = 3 if structure == "block:3" else 1
    for group in groups_of(cut):
        place = np.arange(group.d_in) // width
        blocks = (place[:, None] == place[None, :]).ravel()
        upper = np.triu(np.ones((group.d_in, group.d_in), bool)).ravel()
        expected = [
            one.ravel()[blocks & upper] for one in squares(groups_by(whole)[group.name], full[group.name].mean())
        ]
        found = kept[group.name].mean().reshape(group.experts or 0, -1)
        np.testing.assert_allclose(np.sort(found), np.sort(np.array(expected)), rtol=1e-5, atol=1e-9)


def groups_by(layout: Layout) -> dict[str, Group]:
    return {group.name: group for group in layout.groups}


def two_silos(scaled: bool = False) -> tuple[Layout, dict[str, np.ndarray], list[tuple[PreTrainedModel, Statistics]]]:
    """Two fine-tuned models, whose routers never choose 4; the first not 5, the second not 0."""
    base = mixtral()
    layout, start = layout_of(base, scaled=scaled), trainable(base)
    silos = []
    for seed, router in ((5, A), (6, B)):
        model = moved(mixtral(), seed, router)
        batches = padded(texts(seed, 300), 16)
        silos.append((model, collect_statistics(model, batches, layout, base=start, examples=300)))
    return layout, start, silos


def test_experts_of_two_models_are_merged_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, start, silos = two_silos()
    accumulator = Accumulator(layout, alpha=0.9)
    for _, statistics in silos:
        accumulator.fold(statistics, "silo")
    merged = accumulator.merge()
    grams, weights = [], []
    for (model, _), seed in zip(silos, (5, 6), strict=True):
        weights.append({name: value.astype(np.float64) for name, value in trainable(model).items()})
        grams.append(products(model.double(), texts(seed, 300), monkeypatch))
    for group in groups_of(layout):
        for expert in range(EXPERTS):
            shrunk = [0.9 * g[group.name][expert] + 0.1 * np.diag(np.diag(g[group.name][expert])) for g in grams]
            own = [w[group.name][expert].T for w in weights]
            if expert == 4:
                expected = sum(own) / 2
            else:
                expected = np.linalg.solve(sum(shrunk), sum(g @ w for g, w in zip(shrunk, own, strict=True)))
            found = (start[group.name] + merged.deltas[group.name])[expert].T
            np.testing.assert_allclose(found, expected, atol=1e-5)
            if expert in (1, 2, 3):
                assert np.abs(found - sum(own) / 2).max() > 1e-3


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_experts_that_nobody_uses_are_averaged_and_named_and_others_are_those_of_who_uses_them(alpha: float) -> None:
    layout, _, silos = two_silos()
    accumulator = Accumulator(layout, alpha=alpha)
    for _, statistics in silos:
        accumulator.fold(statistics, "silo")
    merged = accumulator.merge()
    steps = {step.group: step for step in merged.steps}
    for group in groups_of(layout):
        step, found = steps[group.name], merged.deltas[group.name]
        one, other = (statistics.block(f"delta:{group.name}") for _, statistics in silos)
        assert (step.outcome, step.unused, step.mean_blocks) == ("unused", (4,), 0)
        np.testing.assert_allclose(found[4], (one[4].astype(float) + other[4]) / 2, atol=1e-12)
        np.testing.assert_allclose(found[0], one[0], atol=1e-4)
        np.testing.assert_allclose(found[5], other[5], atol=1e-4)
        assert "expert 4" in explain(step)
    taken = 2 * (2 * INNER * HIDDEN + HIDDEN * INNER)  # of both layers, the expert that nobody uses
    trained = sum(math.prod(tensor.shape) for tensor in layout.tensors)
    assert coverage(layout).closed - coverage(layout, merged.steps).closed == pytest.approx(taken / trained)
    (line,) = unused_expert_lines(merged.steps)
    assert all(f"{group.name}: expert 4" in line for group in groups_of(layout))


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_experts_that_saw_a_token_or_two_are_solved(alpha: float) -> None:
    base = mixtral()
    layout, start = layout_of(base), trainable(base)
    accumulator = Accumulator(layout, alpha=alpha)
    for seed in (5, 6):
        model = moved(mixtral(), seed, A)
        accumulator.fold(
            collect_statistics(model, padded([[7, 8, 9]], 1), layout, base=start, examples=1), f"silo {seed}"
        )
    merged = accumulator.merge()
    steps = {step.group: step for step in merged.steps}
    for group in groups_of(layout):
        step = steps[group.name]
        assert step.mean_blocks == 0
        assert (step.jitter > 0) == (alpha == 1), "of so few tokens a Gram matrix has no full rank"
        s, t, _ = accumulator.of_group(group)
        delta = merged.deltas[group.name].transpose(0, 2, 1)  # (experts, d_in, d_out)
        residual = (squares(group, s) @ delta).reshape(t.shape) - t
        assert np.linalg.norm(residual) < 1e-4 * np.linalg.norm(t)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_secure_sum_merges_experts_as_an_open_one(weighting: Literal["uniform", "examples"]) -> None:
    layout, _, silos = two_silos(scaled=True)
    words = np.zeros(layout.sum_entries, np.uint64)
    folded, loaded = (Accumulator(layout, alpha=0.9, weighting=weighting) for _ in range(2))
    for _, statistics in silos:
        folded.fold(statistics, "silo")
        blocks = summands(layout, statistics, alpha=0.9, weighting=weighting)
        scaled = scales(layout, 5, weighting)
        words += np.concatenate(
            [
                encode(values, scale, 5, block.name).reshape(-1)
                for (block, values), (_, scale) in zip(blocks, scaled, strict=True)
            ]
        )
    loaded.load(words, 5)
    one, other = folded.merge(), loaded.merge()
    assert [(s.group, s.outcome, s.unused) for s in one.steps] == [(s.group, s.outcome, s.unused) for s in other.steps]
    for name, delta in one.deltas.items():
        np.testing.assert_allclose(other.deltas[name], delta, atol=1e-5)


def test_exponents_are_known_of_experts_that_public_text_does_not_use() -> None:
    layout = layout_of(moved(mixtral(), 5, A), scaled=True)
    for group in groups_of(layout):
        assert len(group.exponents) == group.d_in
        assert min(group.exponents) > -20


def test_experts_that_compute_something_else_are_averaged() -> None:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "head_dim": 4}
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(vocab_size=WORDS, num_experts_per_tok=2, pad_token_id=0, **sizes)).eval()
    assert not groups_of(layout_of(model))
    assert {t.merge for t in layout_of(model).tensors if "experts" in t.name} == {"mean"}


class Odd(nn.Module):
    """Experts like Mixtral's, but for one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.what = what
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * HIDDEN, 2 * HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(4, 2 * HIDDEN, HIDDEN))

    def act_fn(self, gate: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate)

    def forward(self, x: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for row in range(len(x)):
            for expert, weight in zip(choices[row].tolist(), weights[row], strict=True):
                up = self.gate_up_proj[expert]
                both = (up.T if self.what == "transposed" else up) @ x[row]
                gate, inner = both.chunk(2) if self.what != "interleaved" else (both[::2], both[1::2])
                if self.what == "clamped":
                    inner = inner.clamp(-50, 50)
                if self.what == "last" and expert == 3:
                    gate = -gate
                total[row] += weight * (self.down_proj[expert] @ (functional.silu(gate) * inner))
        return total


@pytest.mark.parametrize("what", ["alike", "transposed", "interleaved", "clamped", "last"])
def test_a_module_is_only_understood_if_all_of_its_experts_compute_what_is_thought(what: str) -> None:
    module = Odd(what)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 2 * HIDDEN, generator=generator)
    choices = torch.randint(0, 3, (20, 2), generator=generator)
    weights = torch.rand(20, 2, generator=generator)
    assert holds_experts(module)
    assert is_understood(module, (rows, choices, weights)) == (what == "alike")
    assert not is_understood(module, (rows, choices))


def test_a_pattern_for_experts_that_are_tied_fits_nothing() -> None:
    model = mixtral()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    with pytest.raises(ModelError, match="experts"):
        layout_of(model, gram={"*": "full", "*experts*": "diagonal"})
