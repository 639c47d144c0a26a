"""A type of layer that another package adds, by the registry only: in a plan, a run, its report and its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bert import modeling_bert

from gramfuse_cli.commands.plan_show import _preview
from gramfuse_model.layers import LINEAR_KINDS, register_layer
from gramfuse_model.project import Project
from gramfuse_server.run import delivery
from tests.projects import Simulated

WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"


class Doubled(nn.Module):
    """Gives 2 (x W) + b, with W as (inputs, outputs): a product of x all the same, but no `nn.Linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ self.weight + self.bias


@pytest.fixture(autouse=True)
def _doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All feed-forward layers of BERT begin with one."""
    make = modeling_bert.BertIntermediate.__init__

    def __init__(self: Any, config: Any) -> None:
        make(self, config)
        self.dense = Doubled(config.hidden_size, config.intermediate_size)

    monkeypatch.setattr(modeling_bert.BertIntermediate, "__init__", __init__)
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)


@pytest.fixture
def base(pico_bert: Path, tmp_path: Path) -> Path:
    """A base with such layers, whose weights are those of the ordinary one."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(8)
    AutoModel.from_config(AutoConfig.from_pretrained(pico_bert)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(pico_bert).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def registered() -> Iterator[None]:
    register_layer(Doubled, d_in=lambda m: m.weight.shape[0], d_out=lambda m: m.weight.shape[1], transposed=False)
    yield
    del LINEAR_KINDS[Doubled]


def test_a_layer_that_nobody_registered_is_averaged(base: Path, pico_project: Callable[..., Any]) -> None:
    _, layout = Project.read(pico_project(base=base).directory).locked()
    assert {tensor.name: tensor.merge for tensor in layout.tensors}[WEIGHT] == "mean"


@pytest.mark.usefixtures("registered")
def test_a_layer_of_another_package_is_merged_in_closed_form_and_shown_everywhere(
    base: Path, pico_project: Callable[..., Any], in_process_grid: Any, tmp_path: Path
) -> None:
    project = pico_project(silos=3, base=base)
    read = Project.read(project.directory)
    here = Simulated(project.directory, tmp_path)
    shown = [weight for group in _preview(read, here.plan, here.layout)["groups"] for weight in group["weights"]]
    assert WEIGHT in shown
    report = here.run(in_process_grid, simulated=here.laboratory())
    assert WEIGHT.removesuffix(".weight") in {step.group for step in report.solve}
    assert WEIGHT.removesuffix(".weight") in (tmp_path / "run" / "report.json").read_text()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.usefixtures("registered")
def test_a_type_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Doubled"):
        register_layer(Doubled, d_in=lambda _: 1, d_out=lambda _: 1, transposed=False)
