"""The layout: which weights share an input, which are averaged, and which are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gramfuse_model.derive_layout import derive_layout, plan_layout
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ModelError

BATCH = {
    "input_ids": torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def a_plan(base: Path, merge: str = "", freeze: str = "'*embeddings*'") -> Plan:
    return Plan.parse(
        f"""
        [plan]
        name = "tracing"
        [model]
        base = "{base}"
        task = "classification"
        max-length = 16
        labels = ["a", "b", "c"]
        [training]
        freeze = [{freeze}]
        [merge]
        {merge}
        [privacy]
        secure-aggregation = false
        [[silo]]
        name = "one"
        """
    )


def base_of(plan: Plan) -> Base:
    return load_base(plan, Path())


def groups(layout: Layout) -> list[tuple[str, ...]]:
    return [tuple(weight.weight.removesuffix(".weight") for weight in group.weights) for group in layout.groups]


FULL = Merge(context_free="full")
"""Gram matrices of all layers, of the first too."""


def context_free(layout: Layout) -> set[str]:
    return {tensor.name.removesuffix(".weight") for tensor in layout.tensors if tensor.context_free}


def merged_by(layout: Layout) -> dict[str, str]:
    return {tensor.name: tensor.merge for tensor in layout.tensors}


class Toy(nn.Module):
    """Three linear layers on one input, which is changed in place before the third; one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)
        self.second = nn.Linear(4, 3)
        self.after = nn.Linear(4, 2)
        self.idle = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        total = self.first(x).sum() + self.second(x).sum()
        return total + self.after(x.add_(1)).sum()


def test_query_key_and_value_of_a_bert_share_a_group_and_all_else_stands_alone(pico_bert: Path) -> None:
    layout = derive_layout(base_of(a_plan(pico_bert)).model, BATCH, FULL)
    expected: list[tuple[str, ...]] = []
    for n in range(2):
        layer = f"bert.encoder.layer.{n}"
        attention = f"{layer}.attention.self"
        expected += [
            (f"{attention}.query", f"{attention}.key", f"{attention}.value"),
            (f"{layer}.attention.output.dense",),
            (f"{layer}.intermediate.dense",),
            (f"{layer}.output.dense",),
        ]
    expected += [("bert.pooler.dense",), ("classifier",)]
    assert groups(layout) == expected
    assert [group.d_in for group in layout.groups] == [16, 16, 16, 24] * 2 + [16, 16]
    assert [weight.d_out for weight in layout.groups[2].weights] == [24]
    assert all(weight.transposed for _, weight in layout.linear())
    closed = {name for name, merge in merged_by(layout).items() if merge == "regmean"}
    assert closed == {f"{module}.weight" for members in expected for module in members}


def test_frozen_parameters_are_named_and_belong_to_no_group(pico_bert: Path) -> None:
    model = base_of(
        a_plan(pico_bert, freeze="'*embeddings*', '*layer.0.attention.self.key*', '*layer.1.output*'")
    ).model
    layout = derive_layout(model, BATCH, FULL)
    expected = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert set(layout.frozen) == expected
    assert "bert.encoder.layer.0.attention.self.key.weight" in expected
    assert not expected & {tensor.name for tensor in layout.tensors}
    attention = "bert.encoder.layer.0.attention.self"
    assert groups(layout)[0] == (f"{attention}.query", f"{attention}.value")
    assert not any("layer.1.output" in name for members in groups(layout) for name in members)


def test_a_weight_tied_to_an_embedding_is_averaged() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    layout = derive_layout(model, BATCH)
    assert all("lm_head" not in name for members in groups(layout) for name in members)
    assert merged_by(layout)["transformer.wte.weight"] == "mean"


def test_conv1d_of_a_gpt2_is_stored_untransposed_and_its_head_transposed(pico_gpt2: Path) -> None:
    layout = derive_layout(base_of(a_plan(pico_gpt2, freeze="'*wte*', '*wpe*'")).model, BATCH, FULL)
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    for group, weight in layout.linear():
        assert weight.transposed == (weight.weight == "score.weight")
        stored = (weight.d_out, group.d_in) if weight.transposed else (group.d_in, weight.d_out)
        assert shapes[weight.weight] == stored
    assert ("transformer.h.0.attn.c_attn",) in groups(layout)
    assert len(layout.groups) == 2 * 4 + 1


def test_a_tensor_changed_in_place_between_two_layers_is_not_shared() -> None:
    layout = derive_layout(Toy(), {"x": torch.ones(2, 4)})
    assert groups(layout) == [("first", "second"), ("after",)]


def test_a_module_that_is_never_called_is_averaged() -> None:
    layout = derive_layout(Toy(), {"x": torch.ones(2, 4)})
    assert merged_by(layout)["idle.weight"] == "mean"


def test_excluded_weights_are_averaged(pico_bert: Path) -> None:
    plan = a_plan(pico_bert, merge="exclude = ['classifier*', '*layer.1*']\ncontext-free = 'full'")
    layout = derive_layout(base_of(plan).model, BATCH, plan.merge)
    assert all("layer.0" in name or "pooler" in name for members in groups(layout) for name in members)
    assert merged_by(layout)["classifier.weight"] == "mean"
    assert merged_by(layout)["bert.encoder.layer.1.output.dense.weight"] == "mean"
    assert merged_by(layout)["bert.encoder.layer.0.output.dense.weight"] == "regmean"


@pytest.mark.parametrize("reverse", [False, True])
def test_the_longest_gram_pattern_wins_whatever_the_order(pico_bert: Path, reverse: bool) -> None:
    patterns = {
        "*": "full",
        "*layer.*": "block:4",
        "*.output.dense.weight": "block:8",
        "*attention.output.dense.weight": "diagonal",
    }
    merge = Merge(gram=dict(sorted(patterns.items(), reverse=reverse)), context_free="full")
    layout = derive_layout(base_of(a_plan(pico_bert)).model, BATCH, merge)
    structures = {group.name: group.structure for group in layout.groups}
    for n in range(2):
        layer = f"bert.encoder.layer.{n}"
        assert structures[f"{layer}.attention.output.dense"] == "diagonal"
        assert structures[f"{layer}.output.dense"] == "block:8"
        assert structures[f"{layer}.intermediate.dense"] == "block:4"
    assert structures["classifier"] == "full"


def test_weights_with_one_input_but_different_structures_are_different_groups(pico_bert: Path) -> None:
    merge = Merge(gram={"*": "full", "*query*": "diagonal"}, context_free="full")
    layout = derive_layout(base_of(a_plan(pico_bert)).model, BATCH, merge)
    attention = "bert.encoder.layer.0.attention.self"
    assert groups(layout)[:2] == [(f"{attention}.query",), (f"{attention}.key", f"{attention}.value")]
    assert [group.structure for group in layout.groups[:2]] == ["diagonal", "full"]


def test_a_weight_that_no_gram_pattern_fits_is_an_error_that_names_it(pico_bert: Path) -> None:
    merge = Merge(gram={"*encoder*": "full", "classifier*": "full"}, context_free="full")
    with pytest.raises(ModelError, match=r"merge\.gram.*'bert\.pooler\.dense\.weight'"):
        derive_layout(base_of(a_plan(pico_bert)).model, BATCH, merge)


@pytest.mark.parametrize(
    "merge",
    [Merge(gram={"*": "full", "*quary*": "diagonal"}), Merge(exclude=("*clasifier*",))],
    ids=["gram", "exclude"],
)
def test_a_pattern_that_fits_no_parameter_is_an_error_that_names_it_and_weights_like_it(
    pico_bert: Path, merge: Merge
) -> None:
    closest = r"\*quary\*.*for example, bert\.encoder\.layer\.0\.attention\.self\.query\.weight, "
    with pytest.raises(ModelError, match=rf"{closest}|\*clasifier\*.*for example, classifier\.weight, "):
        derive_layout(base_of(a_plan(pico_bert)).model, BATCH, merge)


# Layers that see tokens without context

FIRST = {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")}


def test_the_layer_behind_the_embeddings_sees_no_context_and_is_averaged(pico_bert: Path) -> None:
    model = base_of(a_plan(pico_bert)).model
    layout, full = derive_layout(model, BATCH), derive_layout(model, BATCH, FULL)
    assert context_free(layout) == context_free(full) == FIRST
    assert groups(layout) == groups(full)[1:]
    assert {merged_by(layout)[f"{name}.weight"] for name in FIRST} == {"mean"}
    (first,) = derive_layout(model, BATCH, Merge(context_free="diagonal")).groups[:1]
    assert (first.structure, {weight.weight.removesuffix(".weight") for weight in first.weights}) == ("diagonal", FIRST)


def test_where_attention_is_off_in_the_base_model_the_next_layers_see_none_either(pico_bert: Path) -> None:
    """A base model that was made to spy: what enters the feed-forward layers has nothing of the other tokens."""
    model = base_of(a_plan(pico_bert)).model
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[0].attention.output.dense.parameters():
            parameter.zero_()
    layer = "bert.encoder.layer.0"
    more = {f"{layer}.intermediate.dense", f"{layer}.output.dense"}
    more |= {name.replace("layer.0", "layer.1") for name in FIRST}
    assert context_free(derive_layout(model, BATCH)) == FIRST | more


class Windows(nn.Module):
    """One layer on single tokens, one on pairs of neighbours, one on a text's mean, one on what all texts share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(40, 4)
        self.own, self.pair, self.mean, self.shared = (nn.Linear(4, 4) for _ in range(4))
        self.table.requires_grad_(requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) * attention_mask.unsqueeze(-1)
        pairs = x + x.roll(1, dims=1)
        shared = self.shared(self.table.weight[:7] * 1.0).sum()
        flat = self.own(x.reshape(-1, 4)).sum()
        return flat + self.pair(pairs).sum() + self.mean(x.sum(1)).sum() + shared


def test_a_layer_of_two_tokens_of_all_or_of_none_does_not_see_single_ones() -> None:
    assert context_free(derive_layout(Windows(), BATCH)) == {"own"}


def test_a_module_that_is_called_again_on_more_context_counts_by_its_first_call() -> None:
    class Again(Windows):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = self.own(self.table(input_ids))
            return self.own(x + x.mean(dim=1, keepdim=True)).sum()

    assert context_free(derive_layout(Again(), BATCH)) == {"own"}


def test_a_batch_of_one_token_shows_nothing_and_makes_no_layout() -> None:
    with pytest.raises(ModelError, match=r"'input_ids'.*different words"):
        derive_layout(Windows(), BATCH | {"input_ids": torch.full((2, 4), 5)})


@pytest.mark.parametrize("structure", ["full", "block:4"])
@pytest.mark.parametrize("kind", ["mean", "diagonal"])
def test_a_pattern_that_asks_for_more_of_such_a_layer_is_an_error_unless_the_plan_says_so(
    pico_bert: Path, kind: Literal["mean", "diagonal"], structure: str
) -> None:
    model = base_of(a_plan(pico_bert)).model
    gram = {"*": structure, "*query*": structure}
    with pytest.raises(ModelError, match=r"'\*query\*'.*layer\.0\.attention\.self\.query.*merge\.context-free"):
        derive_layout(model, BATCH, Merge(gram=gram, context_free=kind))
    narrow = gram | {"*layer.0.attention.self.query*": "diagonal"}
    assert context_free(derive_layout(model, BATCH, Merge(gram=narrow, context_free=kind))) == FIRST
    full = derive_layout(model, BATCH, Merge(gram=gram, context_free="full"))
    assert {group.structure for group in full.groups} == {structure}


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_as_it_was_even_when_the_model_fails(pico_bert: Path, training: bool) -> None:
    model = base_of(a_plan(pico_bert)).model.train(training)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = derive_layout(model, BATCH)
    with pytest.raises(ModelError, match=r"BertForSequenceClassification.*labels.*IndexError: Target 99"):
        derive_layout(model, {**BATCH, "labels": torch.tensor([0, 99])})
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(module.training == training for module in model.modules())
    assert derive_layout(model, BATCH).digest == first.digest


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_looked_at_in_float32_and_stays_as_it_is(
    pico_bert: Path, half: torch.dtype
) -> None:
    """Rounding is no padding: what is the same alone and in a batch is the same in it too."""
    plan = a_plan(pico_bert)
    model, exact = base_of(plan).model.to(half), base_of(plan).model
    exact.load_state_dict(model.state_dict())
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(BATCH["input_ids"]).detach(),
        "attention_mask": BATCH["attention_mask"],
    }
    for batch in (BATCH, embedded):
        assert derive_layout(model, batch).digest == derive_layout(exact, BATCH).digest
    for name, parameter in model.named_parameters():
        assert id(parameter) == objects[name]
        assert parameter.dtype == half
        assert torch.equal(parameter, values[name])


def test_a_part_that_was_in_evaluation_mode_stays_there(pico_bert: Path) -> None:
    model = base_of(a_plan(pico_bert)).model.train()
    model.bert.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    derive_layout(model, BATCH)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_plan_locked_to_another_layout_is_refused(pico_bert: Path) -> None:
    plan = a_plan(pico_bert)
    base = base_of(plan)
    layout = plan_layout(plan, base)
    assert plan_layout(plan.pinned(base.pins, layout.digest), base).digest == layout.digest
    with pytest.raises(ModelError, match=layout.digest):
        plan_layout(plan.pinned(base.pins, "0" * 64), base)
