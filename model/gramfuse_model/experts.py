"""Experts that a module stores in two parameters, and the rows that each of them receives.

transformers stores the experts of a mixture in `gate_up_proj`, (experts, 2 · inner, hidden), and `down_proj`, (experts,
hidden, inner). Such a module receives rows, (rows, hidden), the experts of each row, and their weights; it is expected
to return

    y = Σₑ wₑ · down[e] · gate(gate_up[e] · x)

over the experts of a row. A module is recognised by its parameters; whether it computes this formula is tested on rows
of a public batch, with every expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

GATE_UP, DOWN = "gate_up_proj", "down_proj"

TOLERANCE = 1e-4
"""Relative difference below which two rows count as equal; rounding causes 1e-6 or less."""

LOUD = 64.0
"""Factor for a second test with larger rows, which detects modules that clamp large values."""


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module has exactly these two parameters, with matching shapes."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != {GATE_UP, DOWN} or any(parameter.dim() != 3 for parameter in parameters.values()):
        return False
    experts, hidden, inner = parameters[DOWN].shape
    return parameters[GATE_UP].shape == (experts, 2 * inner, hidden)


def received(module: nn.Module, weight: str, rows: torch.Tensor, choices: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the rows that are multiplied with each expert's weight, in order of experts: (rows routed to it, d_in).

    Args:
        module: a module for which `holds_experts` is true.
        weight: `gate_up_proj` or `down_proj`.
        rows: (rows, hidden).
        choices: indices of the experts of each row, (rows, experts per row).
    """
    for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
        routed = rows[(choices == expert).any(dim=1)]
        yield routed if weight == GATE_UP else hidden_units(module, expert, routed)


def hidden_units(module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """Return the gated hidden units of an expert, (rows, inner), whether or not these rows are routed to it."""
    both = functional.linear(rows, module.gate_up_proj[expert])  # type: ignore[index]
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(both)  # type: ignore[operator]
        return gated
    gate, up = both.chunk(2, dim=-1)
    product: torch.Tensor = module.act_fn(gate) * up  # type: ignore[operator]
    return product


def is_understood(module: nn.Module, inputs: Sequence[Any]) -> bool:
    """Return whether a module of experts computes the expected formula, on the rows it receives and with every expert.

    Args:
        module: a module for which `holds_experts` is true.
        inputs: the arguments of a call.
    """
    if len(inputs) != 3 or not all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in inputs):
        return False
    rows, choices, weights = inputs
    if not len(rows) == len(choices) == len(weights) or choices.shape != weights.shape or choices.is_floating_point():
        return False
    experts = len(module.down_proj)  # type: ignore[arg-type]
    index = torch.arange(max(len(rows), experts), device=rows.device)
    repeated = index % len(rows)  # rows are repeated if there are more experts
    rotated = (index.unsqueeze(1) + torch.arange(choices.shape[1], device=rows.device)) % experts
    return all(
        _is_same(module, factor * rows[repeated], chosen.to(choices.dtype), weights[repeated])
        for chosen in (choices[repeated], rotated)
        for factor in (1.0, LOUD)
    )


def _is_same(module: nn.Module, rows: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> bool:
    try:
        returned = module.forward(rows, choices, weights)
        expected = _expected(module, rows, choices, weights)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # it takes other arguments
    if not isinstance(returned, torch.Tensor) or returned.shape != expected.shape:
        return False
    return bool(((returned - expected).norm(dim=1) <= TOLERANCE * expected.norm(dim=1)).all())


def _expected(module: nn.Module, rows: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the expected formula, (rows, hidden)."""
    total = torch.zeros_like(rows)
    for expert, units in enumerate(received(module, DOWN, rows, choices)):
        chosen = choices == expert
        routed = chosen.any(dim=1)
        weight = (weights * chosen).sum(dim=1)[routed].unsqueeze(1)
        total[routed] += (weight * functional.linear(units, module.down_proj[expert])).to(total.dtype)  # type: ignore[index]
    return total
