"""Solves S Δ = T for one group, block by block, and reports how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_protocol.contract.layout import Group
from gramfuse_server.report.schema import Outcome, Step

ROUNDING = 2.0**-24
"""Relative rounding of a float32 statistic."""

TINY = 2.0**-126
"""The smallest normal float32: a smaller diagonal entry means that the feature was never active."""

RIDGES = (0.0, 2.0, 8.0, 32.0, 128.0)
"""Ridges to try in turn, as multiples of the effect of rounding on an eigenvalue, ROUNDING · √width.

Smaller ones would admit directions in which the statistics are only rounding errors.
"""


def solve(group: Group, s: NDArray[np.float64], t: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, Step]:
    """Return Δ with S Δ = T, in float64.

    S is scaled to a unit diagonal first. If Cholesky fails, or the smallest eigenvalue is within the rounding error of
    the statistics, λ·diag(S) is added on the left and λ·diag(S)·mean on the right: directions without data get the
    mean, and N equal silos still yield exactly that silo's weights. Blocks that no ridge can fix, and features that are
    zero everywhere, take the mean.

    Args:
        group: names and shapes.
        s: packed S, (entries,).
        t: T, (features, Σ d_out).
        mean: the weighted mean of the differences, (features, Σ d_out).

    Returns:
        Δ, (features, Σ d_out), and how it went.
    """
    solution = mean.clone()
    jitter, smallest, failed, blocks = 0.0, 1.0, 0, 0
    dead = [0] * (group.experts or 1)
    for part, (first, count, width) in zip(group.blocks.unpack(s), group.blocks.parts, strict=True):
        blocks += count
        rows = slice(first, first + count * width)
        solved = _solve_blocks(
            torch.from_numpy(part), t[rows].view(count, width, -1), mean[rows].reshape(count, width, -1)
        )
        solution[rows] = solved.solution.reshape(count * width, -1)
        jitter, smallest = max(jitter, solved.jitter), min(smallest, solved.smallest_eigenvalue)
        dead[first // group.d_in] += solved.dead
        failed += solved.failed
    empty = [expert for expert, features in enumerate(dead) if features == group.d_in]
    unused = tuple(empty) if group.experts else ()
    outcomes: dict[Outcome, Any] = {
        "empty": len(empty) == len(dead),
        "mean": failed,
        "unused": unused,
        "jitter": jitter,
        "clean": True,
    }
    return solution, Step(
        group=group.name,
        outcome=next(name for name, applies in outcomes.items() if applies),
        jitter=jitter,
        smallest_eigenvalue=smallest,
        dead_features=sum(dead),
        mean_blocks=failed,
        blocks=blocks,
        unused=unused,
    )


@dataclass(frozen=True)
class _Blocks:
    solution: torch.Tensor
    jitter: float
    smallest_eigenvalue: float
    dead: int
    failed: int


def _solve_blocks(s: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> _Blocks:
    """Solve a batch of blocks: s (count, width, width), t and mean (count, width, out)."""
    width = s.shape[-1]
    solution = mean.clone()
    diagonal = s.diagonal(dim1=1, dim2=2)  # (count, width)
    finite = torch.isfinite(s).flatten(1).all(dim=1) & torch.isfinite(t).flatten(1).all(dim=1)
    dead = finite.unsqueeze(1) & ~(diagonal >= TINY)
    scale = torch.where(dead, 1.0, diagonal.clamp_min(torch.finfo(torch.float64).tiny).sqrt()).unsqueeze(2)
    a = s / scale / scale.transpose(1, 2)  # unit diagonal except for dead features
    b = t / scale
    toward = mean * scale
    # A dead feature's row and column are zero: an identity row makes it independent of the others.
    a.masked_fill_(dead.unsqueeze(1) | dead.unsqueeze(2), 0.0)
    a.diagonal(dim1=1, dim2=2)[dead] = 1.0
    b[dead] = mean[dead]
    trusted = ROUNDING * math.sqrt(width)
    todo = torch.nonzero(finite & ~dead.all(dim=1)).flatten()
    used, smallest = 0.0, 1.0
    for ridge in RIDGES:
        if not todo.numel():
            break
        jitter = ridge * trusted
        ridged = a[todo]
        ridged.diagonal(dim1=1, dim2=2).add_(jitter)
        factor, info = torch.linalg.cholesky_ex(ridged)
        eigenvalues = torch.where(info == 0, _smallest_eigenvalue(factor), 0.0)
        if not ridge:
            smallest = float(eigenvalues.min())
        x = torch.cholesky_solve(b[todo] + jitter * toward[todo], factor) / scale[todo]
        good = (eigenvalues >= trusted) & torch.isfinite(x).flatten(1).all(dim=1)
        if good.any():
            solution[todo[good]] = x[good]
            used = jitter
        todo = todo[~good]
    return _Blocks(solution, used, smallest, int(dead.sum()), int((~finite).sum()) + todo.numel())


def _smallest_eigenvalue(factor: torch.Tensor) -> torch.Tensor:
    """Return an upper estimate of the smallest eigenvalue of each L Lᵀ, (count,), by inverse iteration."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*factor.shape[:2], 1, generator=generator, dtype=factor.dtype)
    for _ in range(4):
        x = torch.cholesky_solve(x / x.norm(dim=1, keepdim=True), factor)
    inverse: torch.Tensor = x.norm(dim=1).squeeze(1)
    return 1.0 / inverse
