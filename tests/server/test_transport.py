"""Optimal transport: a permuted model is matched exactly, and only real feed-forward pairs are."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import ot
import pytest
import torch
import transformers
from scipy.optimize import linear_sum_assignment

from gramfuse_model.parameters import trainable
from gramfuse_protocol.errors import PlanError
from gramfuse_server.merging.methods.transport import feed_forward_pairs, match, transport_mean

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(24).reshape(3, 8) + 3

FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "Bert": ("SequenceClassification", SIZE, "intermediate.dense", "output.dense"),
    "DistilBert": (
        "SequenceClassification",
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        "ffn.lin1",
        "ffn.lin2",
    ),
    "T5": (
        "ConditionalGeneration",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "DenseReluDense.wi",
        "DenseReluDense.wo",
    ),
    "GPT2": (
        "SequenceClassification",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    "ViT": (
        "ImageClassification",
        {key: SIZE[key] for key in SIZE if key != "vocab_size"} | {"image_size": 8, "patch_size": 4},
        "mlp.fc1",
        "mlp.fc2",
    ),
    "Llama": ("SequenceClassification", SIZE, "", ""),
}


def build(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    head, settings, _, _ = FAMILIES[family]
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(**settings, pad_token_id=0)
    model = getattr(transformers, f"{family}For{head}")(config).eval()
    if family == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 8, 8)}
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return model, batch | ({"labels": IDS[:, :5].contiguous()} if family == "T5" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_copy_is_matched_exactly(family: str) -> None:
    model, batch = build(family)
    start = trainable(model)
    _, _, first, second = FAMILIES[family]
    pairs, others = feed_forward_pairs(model, batch, list(start))
    if not first:  # the gate of a gated block would have to be permuted too
        assert not pairs
        assert others == [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
        return
    assert len(pairs) == 2
    assert not others
    assert all(f"{first}.weight" in pair.first and f"{second}.weight" in pair.second for pair in pairs)

    rng = np.random.default_rng(6)
    one = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in start.items()}
    permuted = {name: start[name].astype(np.float64) + delta for name, delta in one.items()}
    for pair in pairs:
        order = rng.permutation(len(permuted[pair.second].T if pair.second_transposed else permuted[pair.second]))
        permuted[pair.first] = np.take(permuted[pair.first], order, axis=0 if pair.first_transposed else 1)
        permuted[pair.second] = np.take(permuted[pair.second], order, axis=1 if pair.second_transposed else 0)
        if pair.bias is not None:
            permuted[pair.bias] = permuted[pair.bias][order]
    other = {name: values - start[name] for name, values in permuted.items()}
    even = [{name: np.array(1.0) for name in start}] * 2
    fused = transport_mean(pairs, start, [one, other], even)
    for name, delta in one.items():
        np.testing.assert_allclose(fused[name], delta, rtol=0, atol=1e-12, err_msg=name)
    plain = {name: (one[name] + other[name]) / 2 for name in start}
    assert any(np.abs(plain[pair.first] - one[pair.first]).max() > 1 for pair in pairs)


def test_the_match_is_that_of_pot_and_of_the_assignment_problem() -> None:
    rng = np.random.default_rng(8)
    units, others = rng.standard_normal((7, 3)), rng.standard_normal((7, 3))
    cost = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in others] for a in units])
    found = match(units, others)
    uniform = ot.unif(7)
    np.testing.assert_allclose(found, 7 * ot.emd(uniform, uniform, cost), atol=1e-12)
    rows, columns = linear_sum_assignment(cost)
    expected = np.zeros((7, 7))
    expected[rows, columns] = 1
    np.testing.assert_array_equal(found, expected)


def test_without_pot_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(PlanError, match=r"pip install 'gramfuse\[transport\]'"):
        match(np.eye(2), np.eye(2))
