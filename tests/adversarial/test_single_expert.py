"""The coordinator hopes for one silo's own Gram matrix in an honest secure sum: that of an expert nobody else uses.

A mixture sends tokens of one kind to few experts. If only one silo has such tokens, all others add zeros to the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from gramfuse_client.guard.policy import check_plan
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.silo_file import Silo
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.parameters import trainable
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import RefusalError
from tests.conftest import PicoProject

EXPERTS = 3
GROUP = "model.layers.0.mlp.experts.gate_up_proj"


def sizes(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
    }


def test_from_full_gram_matrices_the_sum_of_an_expert_that_one_silo_uses_is_that_silos_own() -> None:
    torch.manual_seed(3)
    base = MixtralForCausalLM(MixtralConfig(**sizes(40), initializer_range=0.5)).eval()
    batch = {"input_ids": torch.tensor([[5, 9, 7, 11], [6, 8, 3, 0]]), "attention_mask": torch.ones(2, 4).long()}
    batch["attention_mask"][1, 3] = 0
    layout = derive_layout(base, batch, Merge(context_free="full"), scaled=True)
    own, words = [], [range(4, 16), range(16, 28), range(28, 40)]
    for silo, seen in enumerate(words):
        with torch.no_grad():  # silo 0's tokens go to expert 0, all others to another
            direction = torch.zeros(EXPERTS, 8)
            direction[0 if silo == 0 else 1] = 1.0
            base.model.layers[0].mlp.gate.weight.copy_(100 * direction)
            base.model.layers[0].post_attention_layernorm.weight.copy_(torch.ones(8))
        router = base.model.layers[0].mlp.gate
        forward = router.forward

        def choose(hidden: torch.Tensor, chosen: int = 0 if silo == 0 else 1, forward: Any = forward) -> Any:
            logits, weights, choices = forward(hidden)
            return logits, weights, torch.full_like(choices, chosen)

        router.forward = choose  # type: ignore[method-assign]
        texts = torch.tensor([list(seen)[:6], list(seen)[6:]])
        given = [{"input_ids": texts, "attention_mask": torch.ones_like(texts)}]
        own.append(collect_statistics(base, given, layout, base=trainable(base), examples=2).block(f"gram:{GROUP}"))
        router.forward = forward  # type: ignore[method-assign]
    entries = len(own[0]) // EXPERTS
    total = sum(own)
    assert np.abs(own[0][:entries]).max() > 0
    np.testing.assert_array_equal(total[:entries], own[0][:entries])


@pytest.fixture
def secure_mixture(tmp_path: Path, pico_project: Callable[..., PicoProject], pico_tokenizer: Any) -> PicoProject:
    torch.manual_seed(4)
    MixtralModel(MixtralConfig(**sizes(len(pico_tokenizer)), pad_token_id=0)).save_pretrained(tmp_path / "mixtral")
    pico_tokenizer.save_pretrained(tmp_path / "mixtral")
    made = pico_project(base=tmp_path / "mixtral", secure=True)
    made.replace(made.plan, 'freeze = ["*embeddings*"]', 'freeze = ["embeddings"]')
    return made


def test_by_default_no_gram_matrix_of_an_expert_is_in_the_sum(secure_mixture: PicoProject) -> None:
    _, layout = Project.read(secure_mixture.directory).locked()
    assert layout.groups
    assert not [group for group in layout.groups if group.experts]
    merges = {tensor.name: tensor.merge for tensor in layout.tensors}
    assert merges[GROUP] == "mean"


def test_a_silo_refuses_a_secure_plan_that_asks_for_them_unless_its_owner_allows_it(
    secure_mixture: PicoProject,
) -> None:
    secure_mixture.replace(secure_mixture.plan, "alpha = 0.9", 'alpha = 0.9\nexperts = "full"')
    project = Project.read(secure_mixture.directory)
    plan, layout = project.locked()
    assert {group.experts for group in layout.groups} == {None, EXPERTS}
    path = secure_mixture.silo(secure_mixture.names[0])
    secure_mixture.replace(path, "approved = []", f'approved = ["{plan.digest}"]')
    with pytest.raises(RefusalError, match=r"limits\.experts"):
        check_plan(Silo.read(path), plan)
    secure_mixture.replace(path, "open-uploads", 'experts = "full"\nopen-uploads')
    check_plan(Silo.read(path), plan)
