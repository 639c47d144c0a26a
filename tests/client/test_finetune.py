"""Local fine-tuning: a function of its arguments, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from gramfuse_client.data.batches import Encoded
from gramfuse_client.data.examples import load
from gramfuse_client.silo_file import Memory, Silo
from gramfuse_client.training.finetune import choose_device, finetune
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError, PlanError

CPU = torch.device("cpu")


@pytest.fixture
def tuned(pico_project: Callable[..., Any], loud_bert: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that fine-tunes a fresh base model: `tuned(training.epochs=2)` as --set settings.

    Its weights are large: of gradients that are rounding errors, AdamW makes whole steps.
    """
    project = pico_project(silos=2, base=loud_bert)
    silo = Silo.read(project.silo("silo-a"))

    def run(*settings: str, progress: Callable[[int, int], None] | None = None, **memory: Any) -> dict[str, np.ndarray]:
        plan = Plan.read(project.plan).override(settings)
        base = load_base(plan, Path(project.directory))
        task = plan.task_of(silo.name)
        examples, _ = load(silo, task)
        encoded = Encoded(examples, base.tokenizer, task)
        finetune(base.model, encoded, plan.training, CPU, progress, memory=Memory(**memory))
        assert not base.model.training
        return {name: p.detach().numpy() for name, p in base.model.named_parameters()}

    return run


def test_the_same_plan_and_data_give_the_same_weights_whatever_was_drawn_before(
    tuned: Callable[..., dict[str, np.ndarray]],
) -> None:
    first = tuned()
    torch.manual_seed(999)
    np.random.seed(999)  # what a silo's other code may do to the global state
    before = torch.get_rng_state()
    second = tuned()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other = tuned("training.seed=2")
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_frozen_parameters_stay_and_all_others_move(tuned: Callable[..., dict[str, np.ndarray]]) -> None:
    start = tuned("training.learning-rate=1e-30", "training.weight-decay=0.0")
    end = tuned()
    for name, values in end.items():
        # A constant added to every key moves no attention weight, so the keys' biases have no gradient.
        if name.endswith("key.bias"):
            continue
        assert np.array_equal(values, start[name]) == ("embeddings" in name), name


def test_progress_counts_every_step(tuned: Callable[..., dict[str, np.ndarray]]) -> None:
    seen: list[tuple[int, int]] = []
    tuned("training.epochs=3", "training.batch-size=10", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 9) for step in range(1, 10)]  # 24 examples in batches of 10, three times


@pytest.mark.parametrize(
    "memory", [{"batch": 4}, {"batch": 1}, {"checkpointing": True}, {"batch": 2, "checkpointing": True}]
)
def test_less_memory_changes_nothing_but_rounding(
    tuned: Callable[..., dict[str, np.ndarray]], memory: dict[str, Any]
) -> None:
    settings = "training.batch-size=8", "training.learning-rate=1e-3"
    start = tuned("training.learning-rate=1e-30", "training.weight-decay=0.0")
    whole, parts = tuned(*settings), tuned(*settings, **memory)
    for name, values in whole.items():
        moved, apart = np.linalg.norm(values - start[name]), np.linalg.norm(parts[name] - values)
        if not name.endswith("key.bias"):  # as above
            assert apart <= 1e-3 * moved, (name, apart / moved)


def test_parts_of_a_batch_must_divide_it(tuned: Callable[..., dict[str, np.ndarray]]) -> None:
    with pytest.raises(PlanError, match=r"memory\.batch"):
        tuned("training.batch-size=8", batch=3)


def test_bfloat16_is_for_products_only(tuned: Callable[..., dict[str, np.ndarray]]) -> None:
    exact, rounded = tuned(), tuned("training.precision=bfloat16")
    assert {values.dtype for values in rounded.values()} == {np.dtype(np.float32)}
    apart = {name: np.abs(exact[name] - rounded[name]).max() for name in exact}
    assert 0 < max(apart.values()) < 0.05


def test_after_training_in_bfloat16_the_model_is_measured_in_float32(pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=2)
    silo, plan = Silo.read(project.silo("silo-a")), Plan.read(project.plan).override(["training.precision=bfloat16"])
    base = load_base(plan, Path(project.directory))
    encoded = Encoded(load(silo, plan.task_of(silo.name))[0], base.tokenizer, plan.task_of(silo.name))
    finetune(base.model, encoded, plan.training, CPU)
    received: list[torch.dtype] = []
    base.model.classifier.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0].dtype))
    with torch.no_grad():
        logits = base.model(**base.tokenizer("a b", return_tensors="pt")).logits
    assert {logits.dtype, *received} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(PlanError, match="cuda"):
        choose_device("cuda")


def test_a_base_model_with_a_weight_that_is_no_number_is_refused_by_name(
    pico_project: Callable[..., Any], pico_bert: Path, tmp_path: Path
) -> None:
    broken = AutoModel.from_pretrained(pico_bert)
    with torch.no_grad():
        broken.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(pico_bert).save_pretrained(tmp_path / "broken")
    plan = Plan.read(pico_project(silos=2).plan)
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight.*NaN"):
        load_base(plan, Path(), override=str(tmp_path / "broken"))
