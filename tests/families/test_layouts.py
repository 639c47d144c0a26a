"""What each family's layout merges in closed form, and its Gram matrices against loops over single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.derive_layout import derive_layout, plan_layout
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.loading.zero_head import load_zero_headed
from gramfuse_model.probing.public_batch import public_batch
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError, ModelError

Pico = Callable[[str], Path]
Batch = dict[str, torch.Tensor]
UNLIMITED = 10**9

LABELLED = 'labels = ["a", "b", "c"]'
CLASSIFICATION = f'task = "classification"\n{LABELLED}'
ANSWERS = 'task = "sequence-to-sequence"'
GENERATION = 'task = "causal-lm"'
PICTURES = f'task = "image-classification"\n{LABELLED}'


def base_of(
    directory: Path, task: str, freeze: str = "", context_free: str = "full", length: int = 16
) -> tuple[Plan, Base]:
    plan = Plan.parse(
        f"""
        [plan]
        name = "families"
        [model]
        base = "{directory}"
        {task}
        max-length = {length}
        [training]
        {freeze}
        [merge]
        context-free = "{context_free}"
        [privacy]
        secure-aggregation = false
        [[silo]]
        name = "one"
        """
    )
    return plan, load_base(plan, Path())


BERT = [
    "0.attention.self.query+key+value 16 input",
    "0.attention.output.dense 16 input",
    "0.intermediate.dense 16 input",
    "0.output.dense 24 input",
]
DEBERTA = ["0.attention.output.dense 16 input", "0.intermediate.dense 16 input", "0.output.dense 24 input"]
T5_ENCODER = ["SelfAttention.q+k+v 16 input", "SelfAttention.o 16 input"]
T5_DECODER = [
    "decoder.block.1.layer.0.SelfAttention.q+k+v 16 target",
    "decoder.block.1.layer.0.SelfAttention.o 16 target",
    "decoder.block.1.layer.1.EncDecAttention.q 16 target",
    "decoder.block.1.layer.1.EncDecAttention.o 16 target",
    "decoder.block.1.layer.2.DenseReluDense.wo 24 target",
    # Keys and values of all decoder layers see one encoder output.
    "decoder.block.0.layer.1.EncDecAttention.k+v+1.layer.1.EncDecAttention.k+v 16 input",
]
LLAMA = [
    "layers.0.self_attn.q_proj+k_proj+v_proj 16 input",
    "layers.0.self_attn.o_proj 16 input",
    "layers.0.mlp.gate_proj+up_proj 16 input",
    "layers.0.mlp.down_proj 24 input",
]
GPT2 = [
    "h.0.attn.c_attn 16 input",
    "h.0.attn.c_proj 16 input",
    "h.0.mlp.c_fc 16 input",
    "h.0.mlp.c_proj 64 input",
]

EXPECTED: dict[tuple[str, str], tuple[list[str], int, list[str], list[str]]] = {
    ("bert", CLASSIFICATION): ([*BERT, "pooler.dense 16 all", "classifier 16 all"], 10, [], ["word_embeddings"]),
    ("distilbert", CLASSIFICATION): (
        [
            "0.attention.q_lin+k_lin+v_lin 16 input",
            "0.attention.out_lin 16 input",
            "0.ffn.lin1 16 input",
            "0.ffn.lin2 24 input",
            "pre_classifier 16 all",
            "classifier 16 all",
        ],
        10,
        [],
        ["word_embeddings"],
    ),
    ("roberta", CLASSIFICATION): (
        [*BERT, "classifier.dense 16 all", "classifier.out_proj 16 all"],
        10,
        [],
        ["word_embeddings", "position_embeddings"],
    ),
    ("deberta-v2", CLASSIFICATION): (
        [
            *DEBERTA,
            "0.attention.self.query_proj+key_proj+value_proj 16 input",
            "0.attention.self.pos_key_proj+pos_query_proj+1.attention.self.pos_key_proj+pos_query_proj 16 table",
            "pooler.dense 16 all",
            "classifier 16 all",
        ],
        11,
        ["deberta.encoder.conv.conv.weight"],
        ["word_embeddings", "rel_embeddings"],
    ),
    ("deberta-v3", CLASSIFICATION): (
        # The table of relative positions goes through the projections of queries and keys too.
        [*DEBERTA, "0.attention.self.query_proj+key_proj 16 input,table", "0.attention.self.value_proj 16 input"],
        12,
        [],
        ["word_embeddings", "rel_embeddings"],
    ),
    ("electra", CLASSIFICATION): (
        ["electra.embeddings_project 12 input", *BERT, "classifier.dense 16 all", "classifier.out_proj 16 all"],
        11,
        [],
        ["word_embeddings"],
    ),
    ("albert", CLASSIFICATION): (
        [
            "embedding_hidden_mapping_in 12 input",
            "albert_layers.0.attention.query+key+value 16 input,input",
            "albert_layers.0.attention.dense 16 input,input",
            "albert_layers.0.ffn 16 input,input",
            "albert_layers.0.ffn_output 24 input,input",
            "pooler 16 all",
            "classifier 16 all",
        ],
        7,
        [],
        ["word_embeddings"],
    ),
    ("t5", ANSWERS): ([*T5_ENCODER, "wi 16 input", *T5_DECODER], 21, [], ["shared", "relative_attention_bias"]),
    ("t5-gated", ANSWERS): (
        [*T5_ENCODER, "wi_0+wi_1 16 input", *T5_DECODER, "lm_head 16 target"],
        22,
        [],
        ["shared", "relative_attention_bias"],
    ),
    ("gpt2", CLASSIFICATION): ([*GPT2, "score 16 input"], 9, [], ["wte", "wpe"]),
    ("gpt2", GENERATION): (GPT2, 8, [], ["wte", "wpe"]),
    ("llama", CLASSIFICATION): ([*LLAMA, "score 16 input"], 9, [], ["embed_tokens"]),
    ("llama", GENERATION): ([*LLAMA, "lm_head 16 input"], 9, [], ["embed_tokens"]),
    ("llama-tied", GENERATION): (LLAMA, 8, [], ["embed_tokens"]),
    ("mixtral", GENERATION): (
        [*LLAMA[:2], "layers.0.mlp.experts.gate_up_proj 16 input", "layers.0.mlp.experts.down_proj 24 input"],
        9,
        ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"],
        ["embed_tokens"],
    ),
    ("vit", PICTURES): (
        [
            "0.attention.q_proj+k_proj+v_proj 16 all",
            "0.attention.o_proj 16 all",
            "0.mlp.fc1 16 all",
            "0.mlp.fc2 24 all",
            "classifier 16 all",
        ],
        9,
        [],
        ["cls_token", "position_embeddings", "patch_embeddings.projection"],
    ),
}
"""For each family and task: some of its groups, how many there are, what else than biases and norms takes the mean, and
what is frozen by default."""


CONTEXT_FREE = {
    "bert": ["encoder.layer.0.attention.self.query+key+value"],
    "distilbert": ["transformer.layer.0.attention.q_lin+k_lin+v_lin"],
    "roberta": ["encoder.layer.0.attention.self.query+key+value"],
    "deberta-v2": ["encoder.layer.0.attention.self.query_proj+key_proj+value_proj"],
    "deberta-v3": ["encoder.layer.0.attention.self.query_proj+key_proj", "encoder.layer.0.attention.self.value_proj"],
    "electra": ["embeddings_project", "encoder.layer.0.attention.self.query+key+value"],
    # Its one layer is the first and all others: no use of it has a Gram matrix.
    "albert": [
        "embedding_hidden_mapping_in",
        "encoder.albert_layer_groups.0.albert_layers.0.attention.query+key+value",
    ],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q+k+v", "decoder.block.0.layer.0.SelfAttention.q+k+v"],
    "t5-gated": ["encoder.block.0.layer.0.SelfAttention.q+k+v", "decoder.block.0.layer.0.SelfAttention.q+k+v"],
    "gpt2": ["h.0.attn.c_attn"],
    "llama": ["layers.0.self_attn.q_proj+k_proj+v_proj"],
    "llama-tied": ["layers.0.self_attn.q_proj+k_proj+v_proj"],
    "mixtral": ["layers.0.self_attn.q_proj+k_proj+v_proj"],
    "vit": ["layers.0.attention.q_proj+k_proj+v_proj"],
}
"""For each family, the layers that see one token or patch at a time."""


def described(layout: Layout) -> list[str]:
    """Each group as `module+last+last d_in rows`; from the second layer on, with the number of the layer."""
    lines = []
    for group in layout.groups:
        modules = [weight.weight.removesuffix(".weight") for weight in group.weights]
        names, parent = [modules[0]], modules[0].rpartition(".")[0]
        for module in modules[1:]:
            own, _, last = module.rpartition(".")
            if own != parent:
                common = next(i for i, (a, b) in enumerate(zip(own, parent, strict=False)) if a != b)
                last = f"{own[own.rfind('.', 0, common) + 1 :]}.{last}"
            names.append(last)
            parent = own
        lines.append(f"{'+'.join(names)} {group.d_in} {','.join(group.rows)}")
    return lines


@pytest.mark.parametrize(
    ("family", "task"), EXPECTED, ids=lambda value: value.partition("\n")[0].replace("task = ", "")
)
def test_what_is_merged_in_closed_form_what_is_averaged_and_what_is_frozen(pico: Pico, family: str, task: str) -> None:
    groups, count, averaged, frozen = EXPECTED[family, task]
    plan, base = base_of(pico(family), task)
    layout = plan_layout(plan, base)
    found = described(layout)
    for group in groups:
        assert any(f".{line}".endswith(f".{group}") for line in found), f"{group} is not among\n" + "\n".join(found)
    assert len(found) == count
    parameters = dict(base.model.named_parameters())
    mean = [tensor.name for tensor in layout.tensors if tensor.merge == "mean"]
    assert [name for name in mean if parameters[name].dim() > 1] == averaged
    for part in frozen:
        assert any(part in name for name in layout.frozen), part
    tables = [m.weight for m in base.model.modules() if isinstance(m, nn.Embedding)]
    assert not any(table.requires_grad for table in tables), "a table of embeddings would leave"
    assert {*layout.frozen, *(tensor.name for tensor in layout.tensors)} == set(parameters)
    # By default all but what sees single tokens or patches is merged like that; the rest is averaged.
    single = {tensor.name for tensor in layout.tensors if tensor.context_free}
    alike = [g for g in layout.groups if {weight.weight for weight in g.weights} <= single]
    names = [line.split()[0] for line in described(layout.model_copy(update={"groups": tuple(alike)}))]
    assert len(names) == len(CONTEXT_FREE[family])
    assert all(f".{name}".endswith(f".{end}") for name, end in zip(names, CONTEXT_FREE[family], strict=True)), names
    assert single == {weight.weight for group in alike for weight in group.weights}
    averaged_plan, base = base_of(pico(family), task, context_free="mean")
    default = plan_layout(averaged_plan, base)
    assert [group for group in layout.groups if group not in alike] == list(default.groups)
    assert {tensor.name for tensor in default.tensors if tensor.context_free} == single
    # It is the same whoever derives it, whatever ran before.
    assert plan_layout(plan, base_of(pico(family), task)[1]).digest == layout.digest


def test_the_word_embeddings_fits_every_model_and_a_pattern_that_fits_nothing_is_an_error(pico: Pico) -> None:
    with pytest.raises(ModelError, match=r"'\*embeddings\*'"):
        base_of(pico("llama"), CLASSIFICATION, "freeze = ['*embeddings*']")
    _, base = base_of(pico("llama"), CLASSIFICATION, "freeze = ['embeddings', '*layers.0.*']")
    trained = [name for name, parameter in base.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any("embed" in name or "layers.0." in name for name in trained)


# Gram matrices


def sentences(seed: int, count: int, least: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 40, size=rng.integers(least, 11)).tolist() for _ in range(count)]


def padded(rows: list[list[int]], filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def batches(rows: list[list[int]], size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        ids, mask = padded(rows[start : start + size])
        yield {"input_ids": ids, "attention_mask": mask}


def single_runs(model: nn.Module, inputs: list[Batch], weight: str) -> list[list[torch.Tensor]]:
    """What one module receives, for each example by itself: one array (rows, d_in) for each of its calls."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    runs = []
    with torch.no_grad():
        for batch in inputs:
            seen.clear()
            model.eval()(**batch)
            runs.append([x.reshape(-1, x.shape[-1]).double() for x in seen])
    handle.remove()
    return runs


def packed(gram: np.ndarray) -> np.ndarray:
    return gram[np.triu_indices(len(gram))]


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def alone(rows: list[list[int]]) -> list[Batch]:
    return [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=int)} for row in rows]


def test_the_gram_matrix_of_alberts_shared_layer_is_the_sum_over_its_uses(pico: Pico) -> None:
    plan, base = base_of(pico("albert"), CLASSIFICATION)
    layout = plan_layout(plan, base)
    rows = sentences(1, 9)
    grams = collect_grams(base.model, batches(rows, 4), layout, limit=UNLIMITED)
    tokens = sum(map(len, rows))
    for group, linear in layout.linear():
        runs = single_runs(base.model, alone(rows), linear.weight)
        uses = [torch.cat([run[use] for run in runs]) for use in range(len(runs[0]))]
        total = sum(x.T @ x for x in uses)
        assert len(uses) == (2 if "albert_layers" in linear.weight else 1)
        if "albert_layers" in linear.weight:
            assert grams[group.name].tokens == 2 * tokens, "both uses of every token"
            # A Gram matrix of the first use alone would be another.
            assert not np.allclose(uses[0].T @ uses[0] / tokens, total / (2 * tokens), rtol=0.01)
        assert_close(grams[group.name].mean(), packed(total.numpy() / sum(map(len, uses))))


@pytest.mark.parametrize("lengths", ["different", "the same"])
@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_encoder_rows_are_masked_by_the_input_and_decoder_rows_by_the_target(
    pico: Pico, family: str, lengths: str
) -> None:
    plan, base = base_of(pico(family), ANSWERS)
    layout = plan_layout(plan, base)
    inputs, targets = sentences(2, 7), [row[:5] for row in sentences(3, 7)]
    if lengths == "the same":  # of the longest in each batch; which rows are real differs all the same
        inputs[0], targets[1] = list(range(4, 16)), list(range(5, 17))
        inputs[4], targets[5] = list(range(4, 16)), list(range(5, 17))
    given = []
    for start in (0, 4):
        (ids, mask), (labels, real) = padded(inputs[start : start + 4]), padded(targets[start : start + 4])
        given.append({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(real == 0, -100)})
        assert (ids.shape == labels.shape) == (lengths == "the same")
    grams = collect_grams(base.model, given, layout, limit=UNLIMITED)
    single = [one | {"labels": torch.tensor([target])} for one, target in zip(alone(inputs), targets, strict=True)]
    for group, linear in layout.linear():
        x = torch.cat([run[0] for run in single_runs(base.model, single, linear.weight)])
        assert len(x) == sum(map(len, targets if group.rows == ("target",) else inputs))
        assert grams[group.name].tokens == len(x)
        assert_close(grams[group.name].mean(), packed((x.T @ x).numpy() / len(x)))


@pytest.mark.parametrize("family", ["longformer", "xlnet"])
def test_what_a_model_pads_or_turns_inside_is_no_token(pico: Pico, family: str) -> None:
    plan, base = base_of(pico(family), CLASSIFICATION)
    layout = plan_layout(plan, base)
    rows = sentences(6, 9)
    given = [base.tokenizer.pad({"input_ids": rows[n : n + 4]}, return_tensors="pt") for n in (0, 4, 8)]
    grams = collect_grams(base.model, given, layout, limit=UNLIMITED)
    kinds = {kind for group in layout.groups for kind in group.rows}
    assert "turned" in kinds
    for group, linear in layout.linear():
        (kind,) = group.rows
        # Each text by itself; what is behind its own rows is padding that the model added.
        runs = single_runs(base.model, alone(rows), linear.weight)
        x = torch.cat([run[0][: len(row) if kind != "all" else None] for run, row in zip(runs, rows, strict=True)])
        assert grams[group.name].tokens == len(x) == (sum(map(len, rows)) if kind != "all" else len(rows))
        assert_close(grams[group.name].mean(), packed((x.T @ x).numpy() / len(x)))


def test_a_text_that_is_longer_than_the_public_ones_is_tried_too(pico: Pico) -> None:
    """From 28 tokens on this BigBird attends to blocks, and not once it saw a shorter text: alone it says another."""
    plan, base = base_of(pico("big-bird"), CLASSIFICATION)
    assert plan_layout(plan, base).groups
    plan, base = base_of(pico("big-bird"), CLASSIFICATION, length=40)
    with pytest.raises(ModelError, match=r"BigBirdForSequenceClassification.*different outputs"):
        plan_layout(plan, base)
    plan, base = base_of(pico("bert"), CLASSIFICATION, length=41)
    with pytest.raises(ModelError, match=r"41 tokens.*model\.max-length"):
        plan_layout(plan, base)


def test_a_tokenizer_that_pads_on_the_wrong_side_is_refused_by_the_name_of_its_setting(pico: Pico) -> None:
    for family, wrong in (("xlnet", "right"), ("bert", "left")):
        plan, base = base_of(pico(family), CLASSIFICATION)
        base.tokenizer.padding_side = wrong
        with pytest.raises(ModelError, match=r'"padding_side": "(left|right)" in its tokenizer_config\.json'):
            plan_layout(plan, base)


def test_a_head_of_zeros_does_not_hide_that_outputs_depend_on_padding(pico: Pico) -> None:
    plan, _ = base_of(pico("xlnet"), CLASSIFICATION)
    base = load_zero_headed(plan, Path())
    base.tokenizer.padding_side = "right"
    with pytest.raises(ModelError, match="padding_side"):
        plan_layout(plan, base)


def test_a_batch_that_cannot_tell_inputs_from_targets_makes_no_layout(pico: Pico) -> None:
    plan, base = base_of(pico("t5"), ANSWERS)
    batch = public_batch(base)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    del batch["decoder_attention_mask"]
    with pytest.raises(ModelError, match="same lengths"):
        derive_layout(base.model, batch)
    del batch["labels"]
    with pytest.raises(ModelError, match="no targets"):
        derive_layout(base.model, batch)
    with pytest.raises(ContributionError, match="no targets"):
        collect_grams(base.model, [batch], plan_layout(plan, base), limit=UNLIMITED)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_relative_positions_count_as_much_as_tokens_whatever_the_size_of_the_batches(pico: Pico, size: int) -> None:
    plan, base = base_of(pico("deberta-v3"), CLASSIFICATION)
    layout = plan_layout(plan, base)
    rows = sentences(4, 9)
    grams = collect_grams(base.model, batches(rows, size), layout, limit=UNLIMITED)
    (group, *_) = (group for group in layout.groups if len(group.rows) > 1)
    for weight in group.weights:
        runs = single_runs(base.model, alone(rows), weight.weight)
        x, table = torch.cat([run[0] for run in runs]), runs[0][1]
        assert grams[group.name].tokens == len(x)
        assert_close(grams[group.name].mean(), packed((x.T @ x / len(x) + table.T @ table / len(table)).numpy()))


def test_what_a_module_receives_by_keyword_is_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            return self.one(input=x).sum() + self.two(x).sum()

    model, x = Named(), torch.arange(24.0).view(2, 3, 4)
    layout = derive_layout(model, {"x": x})
    assert [[weight.weight for weight in group.weights] for group in layout.groups] == [["one.weight", "two.weight"]]
    gram = collect_grams(model, [{"x": x}], layout, limit=UNLIMITED)["one"]
    assert_close(gram.mean(), packed((x.view(-1, 4).T @ x.view(-1, 4) / 6).numpy()))


def test_a_module_that_is_called_more_often_than_the_layout_says_is_refused(pico: Pico) -> None:
    plan, base = base_of(pico("albert"), CLASSIFICATION)
    layout = plan_layout(plan, base)
    base.model.config.num_hidden_layers = base.model.albert.encoder.config.num_hidden_layers = 3
    with pytest.raises(ContributionError, match="more often"):
        collect_grams(base.model, batches(sentences(5, 2), 2), layout, limit=UNLIMITED)
