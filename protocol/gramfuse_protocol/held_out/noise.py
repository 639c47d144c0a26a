"""Differential privacy of held-out results: distributed Gaussian noise, to which every silo adds a share.

Each silo adds integers from the discrete Gaussian distribution to its vector (`gramfuse_protocol.held_out.sums`) before
masking it. Let M be the plan's minimum of survivors and c the number of silos that may collude. To the entries of a
group with sensitivity Δ and share s, each silo adds noise of variance

    z² · (Δ·2^f + √d)² / (s · (M − c))      in units of the fixed-point scale 2^f, d entries in the group

so that whichever silos drop out, and even if c silos subtract their own noise, noise of variance at least z²Δ²/s
remains. z makes one release of all groups together (ε, δ)-private when one example is replaced, with δ = DELTA: since
the shares add up to 1, the release is as private as one Gaussian mechanism with noise multiplier z. The sum of M − c
discrete Gaussians is not a discrete Gaussian, but the difference is negligible from σ = 2^8 units (Kairouz, Liu,
Steinke 2021); here σ is at least 2^20.

z comes from `dp_accounting`, whose `GaussianPrivacyLoss` uses the closed form (Balle, Wang 2018). k releases together
are as private as one with noise multiplier z/√k. Importing the library takes about a second and each value a tenth of
one, so the import is lazy and values are cached.
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
    """Return z, the smallest ratio of standard deviation to sensitivity that makes one release (ε, δ)-private."""
    from dp_accounting.pld.common import DifferentialPrivacyParameters
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    mechanism = GaussianPrivacyLoss.from_privacy_guarantee(DifferentialPrivacyParameters(epsilon, delta))
    return float(mechanism.standard_deviation) * (1 + 1e-6)  # the tolerance of the library's search


@cache
def composed_epsilon(epsilon: float, releases: int, delta: float = DELTA) -> float:
    """Return the total ε of several releases, each with noise that makes it (ε, δ)-private by itself.

    Args:
        releases: number of releases, ≥ 1.
        delta: δ of each release, and of all together.
    """
    if releases == 1:
        return epsilon
    from dp_accounting.pld.common import BinarySearchParameters, inverse_monotone_function
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    z = noise_multiplier(epsilon, delta) / math.sqrt(releases)
    search = BinarySearchParameters(0, math.inf, initial_guess=1.0, tolerance=1e-7 * max(1.0, z**-2))
    return float(inverse_monotone_function(GaussianPrivacyLoss(z).get_delta_for_epsilon, delta, search))


def spent(plan: Plan) -> float | None:
    """Return the total ε of a held-out example over all releases of a plan; None if results leave without noise."""
    return None if plan.epsilon is None else composed_epsilon(plan.epsilon, plan.releases)


def variances(plan: Plan, task: Task) -> tuple[int, ...]:
    """Return the variance of one silo's noise for each entry of the vector, in squared fixed-point units, rounded up.

    It is 0 for a plan without noise.
    """
    if plan.epsilon is None:
        return (0,) * sum(group.size for group in groups(task))
    z, honest = noise_multiplier(plan.epsilon), plan.minimum_survivors - plan.privacy.colluding
    result: list[int] = []
    for group in groups(task):
        sensitivity = group.sensitivity * METRICS_SCALE + math.sqrt(group.size)
        result += [math.ceil((z * sensitivity) ** 2 / (group.share * honest))] * group.size
    return tuple(result)


def deviations(plan: Plan, task: Task, silos: int) -> Vector:
    """Return the standard deviation of the noise in a sum over `silos` silos, by entry, in the vector's own units."""
    variance = np.array(variances(plan, task), np.float64)
    return np.sqrt(silos * variance) / METRICS_SCALE


def noisy_words(plan: Plan, task: Task, vector: Vector, random: Random) -> NDArray[np.uint64]:
    """Return a silo's summand in the secure sum of metrics for one candidate: its vector in fixed point plus noise.

    Values outside the fixed-point range are clipped and NaN becomes 0, so every vector has a result.

    Args:
        task: the silo's task.
        vector: sum of its rows, float64 (entries,).
        random: source of entropy; the result is a function of the vector and the random bytes.
    """
    limit = 2.0 ** capacity(len(plan.silo)) / METRICS_SCALE
    scaled = np.rint(np.clip(np.nan_to_num(vector), -limit, limit) * METRICS_SCALE)
    values = [
        int(value) + (discrete_gaussian(variance, random) if variance else 0)
        for value, variance in zip(scaled, variances(plan, task), strict=True)
    ]
    return np.array([value % 2**64 for value in values], np.uint64)


def discrete_gaussian(variance: int, random: Random) -> int:
    """Draw an integer x with probability proportional to exp(−x² / 2σ²), exactly (Canonne, Kamath, Steinke 2020).

    Args:
        variance: σ², ≥ 1.
    """
    scale = math.isqrt(variance) + 1
    while True:
        x = _discrete_laplace(scale, random)
        if _bernoulli_exp((abs(x) * scale - variance) ** 2, 2 * variance * scale * scale, random):
            return x


def _discrete_laplace(scale: int, random: Random) -> int:
    """Draw an integer x with probability proportional to exp(−|x| / scale)."""
    while True:
        rest = _below(scale, random)
        if not _bernoulli_exp(rest, scale, random):
            continue
        times = 0
        while _bernoulli_exp(1, 1, random):
            times += 1
        x, negative = rest + scale * times, _below(2, random)
        if x or not negative:  # otherwise 0 would be drawn twice as often
            return -x if negative else x


def _bernoulli_exp(numerator: int, denominator: int, random: Random) -> bool:
    """Return True with probability exp(−numerator / denominator), exactly; the fraction is ≥ 0."""
    while numerator > denominator:
        if not _bernoulli_exp(1, 1, random):
            return False
        numerator -= denominator
    k = 1  # the series of the exponential function
    while _below(denominator * k, random) < numerator:
        k += 1
    return k % 2 == 1


def _below(limit: int, random: Random) -> int:
    """Draw an integer from 0 to limit − 1 uniformly."""
    bits = (limit - 1).bit_length()
    size = (bits + 7) // 8
    while True:
        x = int.from_bytes(random(size), "little") >> (8 * size - bits)
        if x < limit:
            return x
