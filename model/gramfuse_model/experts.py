"""Experts that a module holds as two parameters, and what each of them receives.

transformers keeps the experts of a mixture in `gate_up_proj`, (experts, 2 · inner, hidden), and `down_proj`, (experts,
hidden, inner). Such a module gets rows, (rows, hidden), the experts of each, and their weights; it is thought to return

    y = Σₑ wₑ · down[e] · gate(gate_up[e] · x)

over the experts of a row. Whether a module is of that kind is seen by its parameters, and whether it computes that is
tried out: on rows of a public batch, with every expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

GATE_UP, DOWN = "gate_up_proj", "down_proj"

TOLERANCE = 1e-4
"""Share of its length by which a row may differ and be the same; rounding makes it 1e-6 or less."""

LOUD = 64.0
"""Rows are tried as they are, and so many times as large: what clamps large values computes something else."""


def holds_experts(module: nn.Module) -> bool:
    """Whether these two parameters are all that a module has, with shapes that fit."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != {GATE_UP, DOWN} or any(parameter.dim() != 3 for parameter in parameters.values()):
        return False
    experts, hidden, inner = parameters[DOWN].shape
    return parameters[GATE_UP].shape == (experts, 2 * inner, hidden)


def received(module: nn.Module, weight: str, rows: torch.Tensor, choices: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield for each expert in order the rows that its weight is multiplied with, (routed to it, d_in).

    Args:
        module: of which `holds_experts` is true.
        weight: `gate_up_proj` or `down_proj`.
        rows: (rows, hidden).
        choices: indices of the experts of each row, (rows, any).
    """
    for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
        routed = rows[(choices == expert).any(dim=1)]
        yield routed if weight == GATE_UP else hidden_units(module, expert, routed)


def hidden_units(module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Return what comes out of an expert's gate, (rows, inner), whether these rows are routed to it or not."""
    both = functional.linear(rows, module.gate_up_proj[expert])  # type: ignore[index]
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(both)  # type: ignore[operator]
        return gated
    gate, up = both.chunk(2, dim=-1)
    product: torch.Tensor = module.act_fn(gate) * up  # type: ignore[operator]
    return product


def is_understood(module: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether a module of experts computes what is thought, on rows that it receives and with every expert.

    Args:
        module: of which `holds_experts` is true.
        inputs: what it is called with.
    """
    if len(inputs) != 3 or not all(isinstance(one, torch.Tensor) and one.dim() == 2 for one in inputs):
        return False
    rows, choices, weights = inputs
    if not len(rows) == len(choices) == len(weights) or choices.shape != weights.shape or choices.is_floating_point():
        return False
    experts = len(module.down_proj)  # type: ignore[arg-type]
    number = torch.arange(max(len(rows), experts), device=rows.device)
    again = number % len(rows)
    turns = (number.unsqueeze(1) + torch.arange(choices.shape[1], device=rows.device)) % experts
    return all(
        _is_same(module, factor * rows[again], chosen.to(choices.dtype), weights[again])
        for chosen in (choices[again], turns)
        for factor in (1.0, LOUD)
    )


def _is_same(module: nn.Module, rows: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> bool:
    try:
        returned = module.forward(rows, choices, weights)
        expected = _computed(module, rows, choices, weights)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # it takes something else
    if not isinstance(returned, torch.Tensor) or returned.shape != expected.shape:
        return False
    return bool(((returned - expected).norm(dim=1) <= TOLERANCE * expected.norm(dim=1)).all())


def _computed(module: nn.Module, rows: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what the module is thought to, (rows, hidden)."""
    total = torch.zeros_like(rows)
    for expert, units in enumerate(received(module, DOWN, rows, choices)):
        chosen = choices == expert
        routed = chosen.any(dim=1)
        weight = (weights * chosen).sum(dim=1)[routed].unsqueeze(1)
        total[routed] += (weight * functional.linear(units, module.down_proj[expert])).to(total.dtype)  # type: ignore[index]
    return total
