"""Adapters in families that differ in how layers are stored, shared and called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from gramfuse_model.adapters.attach import adapters_of
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.probing.public_batch import public_batch
from gramfuse_model.saving import save_adapter, save_model
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError

Pico = Callable[[str], Path]

LABELLED = 'task = "classification"\nlabels = ["a", "b", "c"]'

FAMILIES = {
    "bert": LABELLED,
    "distilbert": LABELLED,
    "albert": LABELLED,  # layers that share their weights
    "deberta-v3": LABELLED,
    "gpt2": LABELLED,  # Conv1D
    "llama-tied": 'task = "causal-lm"',
    "mixtral": 'task = "causal-lm"',  # experts
    "t5": 'task = "sequence-to-sequence"',
    "vit": 'task = "image-classification"\nlabels = ["a", "b", "c"]',
}


def plan_of(directory: Path, task: str, lora: str = "rank = 3") -> Plan:
    return Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "{directory}"\nhead = "same"\n{task}\nmax-length = 16\n'
        f"[training]\nfreeze = []\n[training.lora]\n{lora}\n"
        '[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "one"\n'
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's own use of transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_what_a_family_saves(pico: Pico, tmp_path: Path, family: str) -> None:
    directory = pico(family)
    plan = plan_of(directory, FAMILIES[family], 'rank = 3\noutput = "both"')
    base = load_base(plan, Path())
    layout = plan_layout(plan, base)
    trained = {name for name, parameter in base.model.named_parameters() if parameter.requires_grad}
    adapters = dict(adapters_of(base.model))
    assert {f"{name}.lora_B.default.weight" for name in adapters} <= trained
    assert {group.d_in for group in layout.groups if ".lora_B." in group.name} == {3}
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapters.values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    batch = public_batch(base)
    with torch.no_grad():
        expected = base.model(**batch).logits
        save_adapter(base, plan.model.base, tmp_path / "adapter", task=plan.model.single_task.task)
        save_model(base, tmp_path / "model")
        assert not any("lora" in name for name in base.model.state_dict())
        auto = getattr(transformers, FORMS[plan.model.single_task.task].auto)
        config = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
        origin = auto.from_pretrained(directory, config=config)
        untouched = origin.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(origin, tmp_path / "adapter").eval()
        whole = auto.from_pretrained(tmp_path / "model").eval()
        for model in (loaded, whole):
            found = model(**batch).logits
            assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())), family
    assert not torch.allclose(untouched, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "lora", "named"),
    [
        ("llama-tied", 'modules-to-save = ["embed_tokens"]', "lm_head"),
        ("llama", 'modules-to-save = ["nothing"]', "nothing"),
        ("llama", 'targets = ["nothing"]', "nothing"),
        ("llama", 'targets = ["embed_tokens"]', "Embedding"),
        ("llama", "rank = 17", "16 inputs"),
        ("bert", 'targets = ["classifier"]', "classifier"),
    ],
)
def test_targets_and_modules_that_cannot_be_are_refused_and_named(
    pico: Pico, family: str, lora: str, named: str
) -> None:
    plan = plan_of(pico(family), LABELLED if family == "bert" else 'task = "causal-lm"', lora)
    with pytest.raises(ModelError, match=named):
        load_base(plan, Path())
