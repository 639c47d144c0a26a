"""Differential privacy of what leaves of held-out results: Gaussian noise that all silos make together.

Each silo adds integers from the discrete Gaussian distribution to its vector (`gramfuse_protocol.held_out.sums`) before
it masks it. With M the fewest survivors of a plan and c the silos that may collude, each adds, to the entries of a
group of sensitivity Δ and share s, noise of variance

    z² · (Δ·2^f + √d)² / (s · (M − c))      in units of the fixed-point scale 2^f, d entries in the group

so that whoever drops out, and when c silos take their own noise away again, what is left has variance z²Δ²/s at least.
z makes one release of all groups together (ε, δ) for one example replaced, δ = DELTA: with the shares adding up to 1,
it is as private as one Gaussian mechanism of noise multiplier z. The sum of M − c discrete Gaussians is no discrete
Gaussian, but from σ = 2^8 units on nobody could tell (Kairouz, Liu, Steinke 2021); here σ is at least 2^20.

z comes from `dp_accounting`, whose `GaussianPrivacyLoss` has the closed form (Balle, Wang 2018). Several releases are
together as private as one with z divided by the square root of their number. Loading it takes about a second, a figure
a tenth of one, and it is remembered.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.sums import Vector, groups
from gramfuse_protocol.secure_sum.fixed_point import capacity
from gramfuse_protocol.secure_sum.keys import Random
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE

DELTA = 1e-5
"""The δ of every (ε, δ) here."""


@cache
def noise_multiplier(epsilon: float, delta: float = DELTA) -> float:
    """Return the least ratio of the standard deviation to the sensitivity that makes one release (ε, δ)-private."""
    from dp_accounting.pld.common import DifferentialPrivacyParameters
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    wanted = DifferentialPrivacyParameters(epsilon, delta)
    found = GaussianPrivacyLoss.from_privacy_guarantee(wanted)
    return float(found.standard_deviation) * (1 + 1e-6)  # it searches to within that


@cache
def composed_epsilon(epsilon: float, releases: int, delta: float = DELTA) -> float:
    """Return the ε of several releases of one example together, each with the noise that makes it (ε, δ)-private.

    Args:
        releases: 1 or more.
        delta: of each, and of all together.
    """
    if releases == 1:
        return epsilon
    from dp_accounting.pld.common import BinarySearchParameters, inverse_monotone_function
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    z = noise_multiplier(epsilon, delta) / math.sqrt(releases)
    search = BinarySearchParameters(0, math.inf, initial_guess=1.0, tolerance=1e-7 * max(1.0, z**-2))
    return float(inverse_monotone_function(GaussianPrivacyLoss(z).get_delta_for_epsilon, delta, search))


def spent(plan: Plan) -> float | None:
    """Return the ε of a held-out example over all that a plan has leave of it; None if it leaves without noise."""
    return None if plan.epsilon is None else composed_epsilon(plan.epsilon, plan.releases)


def variances(plan: Plan, task: Task) -> tuple[int, ...]:
    """Return the variance of the noise that one silo adds to each entry of the vector, in units: rounded up.

    All zeros for a plan without noise.
    """
    if plan.epsilon is None:
        return (0,) * sum(group.size for group in groups(task))
    z, shares = noise_multiplier(plan.epsilon), plan.minimum_survivors - plan.privacy.colluding
    found: list[int] = []
    for group in groups(task):
        moved = group.sensitivity * METRICS_SCALE + math.sqrt(group.size)
        found += [math.ceil((z * moved) ** 2 / (group.share * shares))] * group.size
    return tuple(found)


def deviations(plan: Plan, task: Task, silos: int) -> Vector:
    """Return the standard deviation of the noise in a sum over so many silos, by entry, in the vector's own units."""
    each = np.array(variances(plan, task), np.float64)
    return np.sqrt(silos * each) / METRICS_SCALE


def noisy_words(plan: Plan, task: Task, vector: Vector, random: Random) -> NDArray[np.uint64]:
    """Return what a silo adds to the secure sum of metrics for one candidate: its vector in fixed point, with noise.

    Whatever the vector holds, there is an answer: what has no place in the range is clipped to it.

    Args:
        task: the silo's own.
        vector: sum of its rows, float64 (entries,).
        random: entropy; for the same vector and the same bytes the words are the same.
    """
    limit = 2.0 ** capacity(len(plan.silo)) / METRICS_SCALE
    scaled = np.rint(np.clip(np.nan_to_num(vector), -limit, limit) * METRICS_SCALE)
    found = [
        int(value) + (discrete_gaussian(variance, random) if variance else 0)
        for value, variance in zip(scaled, variances(plan, task), strict=True)
    ]
    return np.array([value % 2**64 for value in found], np.uint64)


def discrete_gaussian(variance: int, random: Random) -> int:
    """Draw an integer x with probability proportional to exp(−x² / 2σ²), exactly (Canonne, Kamath, Steinke 2020).

    Args:
        variance: σ², 1 or more.
    """
    scale = math.isqrt(variance) + 1
    while True:
        x = _discrete_laplace(scale, random)
        if _happens_exp((abs(x) * scale - variance) ** 2, 2 * variance * scale * scale, random):
            return x


def _discrete_laplace(scale: int, random: Random) -> int:
    """Draw an integer x with probability proportional to exp(−|x| / scale)."""
    while True:
        rest = _below(scale, random)
        if not _happens_exp(rest, scale, random):
            continue
        times = 0
        while _happens_exp(1, 1, random):
            times += 1
        x, negative = rest + scale * times, _below(2, random)
        if x or not negative:  # or else 0 would come twice as often
            return -x if negative else x


def _happens_exp(numerator: int, denominator: int, random: Random) -> bool:
    """Return True with probability exp(−gamma), exactly; gamma is a fraction, 0 or more."""
    while numerator > denominator:
        if not _happens_exp(1, 1, random):
            return False
        numerator -= denominator
    k = 1  # the series of the exponential function
    while _below(denominator * k, random) < numerator:
        k += 1
    return k % 2 == 1


def _below(limit: int, random: Random) -> int:
    """Draw an integer from 0 to limit − 1, each as likely."""
    bits = (limit - 1).bit_length()
    size = (bits + 7) // 8
    while True:
        x = int.from_bytes(random(size), "little") >> (8 * size - bits)
        if x < limit:
            return x
